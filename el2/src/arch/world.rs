//! The world switch: a guest's registers in, the host's out, and back.
//!
//! Without VHE the two share EL1's registers, so all of them change places. What differs between
//! the worlds is in three groups: EL1's own registers ([`El1`]), what EL2 tells the core about EL1
//! (stage 2, traps, timer offset: [`Controls`]), and FP, which changes only when the guest uses it.
//!
//! Order (spec/arm.md 3.9; errata 1319367 and 1165522): going in, walks are off before the first
//! foreign register is loaded, and come on with TCR_EL1 as the last one; going out the same.

use core::sync::atomic::{AtomicU64, Ordering};

use el2::esr;
use el2::features::Features;

use super::host_regs::Stage2Regs;
use super::instructions::{self, isb};
use super::profiling::{self, Profiling};
use super::regs::{self, mrs, msr, set_vectors};
use super::tlb::{MMU_ON, NO_WALKS};

/// General registers, PC and PSTATE; guest.S knows the layout.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(16))]
pub(crate) struct GuestRegs {
    /// x0 to x30.
    pub(crate) x: [u64; 31],
    /// While the vCPU is not loaded; else it is in ELR_EL2.
    pc: u64,
    /// While the vCPU is not loaded; else it is in SPSR_EL2.
    pstate: u64,
    /// EL2's stack pointer while the guest runs.
    el2_sp: u64,
}

const _: () = assert!(core::mem::offset_of!(GuestRegs, x) == 0);
const _: () = assert!(core::mem::offset_of!(GuestRegs, el2_sp) == 264);

impl GuestRegs {
    /// Register `number` as an instruction names it: 31 is the zero register.
    pub(crate) fn get(&self, number: u8) -> u64 {
        self.x.get(usize::from(number)).copied().unwrap_or(0)
    }

    /// Writes it.
    pub(crate) fn set(&mut self, number: u8, value: u64) {
        if let Some(register) = self.x.get_mut(usize::from(number)) {
            *register = value;
        }
    }

    /// Makes a vCPU that is not loaded step over the instruction that trapped with this syndrome.
    pub(crate) fn skip(&mut self, esr: u64) {
        (self.pc, self.pstate) = esr::behind(self.pc, self.pstate, esr);
    }

    /// Loads PC and PSTATE for the next entry.
    fn load_return(&self) {
        msr!("elr_el2", self.pc);
        regs::return_as(self.pstate);
    }

    /// Saves them.
    fn save_return(&mut self) {
        self.pc = mrs!("elr_el2");
        self.pstate = mrs!("spsr_el2");
    }
}

// SAFETY: as guest.S has them. FP is the worlds' alone, EL2 is built without; `FpState` has the
// layout that both sides assert.
unsafe extern "C" {
    fn guest_enter(registers: *mut GuestRegs) -> u64;
    safe fn fp_save(state: &mut FpState);
    safe fn fp_load(state: &FpState);
    static guest_vectors: u8;
    static forgetful_guest_vectors: u8;
    static vectors: u8;
}

/// FP and SIMD; guest.S knows the layout.
#[derive(Clone, Debug)]
#[repr(C, align(16))]
pub(crate) struct FpState {
    q: [u128; 32],
    fpsr: u64,
    fpcr: u64,
}

impl FpState {
    /// All zero.
    pub(crate) const fn new() -> Self {
        Self {
            q: [0; 32],
            fpsr: 0,
            fpcr: 0,
        }
    }
}

macro_rules! context {
    ($(#[$doc:meta])* $name:ident { $($field:ident = $register:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default)]
        pub(crate) struct $name {
            $(pub(crate) $field: u64,)*
        }

        impl $name {
            /// Reads the core's.
            #[inline]
            fn read() -> Self {
                Self { $($field: mrs!($register),)* }
            }

            /// Writes the core's.
            #[inline]
            fn write(&self) {
                $(msr!($register, self.$field);)*
            }
        }
    };
}

context! {
    /// EL1's and EL0's own registers, but SCTLR_EL1 and TCR_EL1, which have an order.
    El1 {
        cpacr = "cpacr_el1",
        ttbr0 = "ttbr0_el1",
        ttbr1 = "ttbr1_el1",
        esr = "esr_el1",
        afsr0 = "afsr0_el1",
        afsr1 = "afsr1_el1",
        far = "far_el1",
        mair = "mair_el1",
        vbar = "vbar_el1",
        contextidr = "contextidr_el1",
        amair = "amair_el1",
        cntkctl = "cntkctl_el1",
        par = "par_el1",
        tpidr_el1 = "tpidr_el1",
        tpidr_el0 = "tpidr_el0",
        tpidrro_el0 = "tpidrro_el0",
        sp_el1 = "sp_el1",
        sp_el0 = "sp_el0",
        elr = "elr_el1",
        spsr = "spsr_el1",
        csselr = "csselr_el1",
        mdscr = "mdscr_el1",
    }
}

context! {
    /// Pointer authentication keys.
    Keys {
        ia_low = "s3_0_c2_c1_0",
        ia_high = "s3_0_c2_c1_1",
        ib_low = "s3_0_c2_c1_2",
        ib_high = "s3_0_c2_c1_3",
        da_low = "s3_0_c2_c2_0",
        da_high = "s3_0_c2_c2_1",
        db_low = "s3_0_c2_c2_2",
        db_high = "s3_0_c2_c2_3",
        ga_low = "s3_0_c2_c3_0",
        ga_high = "s3_0_c2_c3_1",
    }
}

context! {
    /// Numbers of software contexts, for the core's predictors (FEAT_CSV2_2).
    SoftwareContext {
        el0 = "s3_3_c13_c0_7",
        el1 = "s3_0_c13_c0_7",
    }
}

context! {
    /// What EL2 tells the core about EL1; stage 2 and HCR_EL2 have their own place.
    Controls {
        cptr = "cptr_el2",
        mdcr = "mdcr_el2",
        hstr = "hstr_el2",
        cnthctl = "cnthctl_el2",
        cntvoff = "cntvoff_el2",
        vmpidr = "vmpidr_el2",
        vpidr = "vpidr_el2",
    }
}

context! {
    /// The virtual timer.
    Timer {
        cval = "cntv_cval_el0",
        ctl = "cntv_ctl_el0",
    }
}

/// What a vCPU keeps between its runs.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) regs: GuestRegs,
    pub(crate) el1: El1,
    pub(crate) sctlr: u64,
    pub(crate) tcr: u64,
    keys: Keys,
    software: SoftwareContext,
    fp: FpState,
    /// The host's FP registers while the guest's are in the core.
    host_fp: FpState,
    /// CNTV_CTL_EL0 and CNTV_CVAL_EL0.
    pub(crate) timer: Timer,
    /// VDISR_EL2: what DISR_EL1 is to a guest.
    deferred_error: u64,
    /// HCR_EL2 while it runs.
    pub(crate) hcr: u64,
}

/// HCR_EL2 bits (Arm ARM D24.2.53).
pub(crate) mod hcr {
    pub(crate) const VM: u64 = 1;
    pub(crate) const PTW: u64 = 1 << 2;
    pub(crate) const SWIO: u64 = 1 << 1;
    pub(crate) const FMO: u64 = 1 << 3;
    pub(crate) const IMO: u64 = 1 << 4;
    pub(crate) const AMO: u64 = 1 << 5;
    pub(crate) const VSE: u64 = 1 << 8;
    pub(crate) const FB: u64 = 1 << 9;
    pub(crate) const BSU_INNER: u64 = 1 << 10;
    pub(crate) const TWI: u64 = 1 << 13;
    pub(crate) const TID3: u64 = 1 << 18;
    pub(crate) const TSC: u64 = 1 << 19;
    pub(crate) const TIDCP: u64 = 1 << 20;
    pub(crate) const TACR: u64 = 1 << 21;
    pub(crate) const TSW: u64 = 1 << 22;
    pub(crate) const TVM: u64 = 1 << 26;
    pub(crate) const RW: u64 = 1 << 31;
    pub(crate) const TLOR: u64 = 1 << 35;
    pub(crate) const TERR: u64 = 1 << 36;
    pub(crate) const POINTER_AUTH: u64 = 1 << 40 | 1 << 41;
    pub(crate) const FWB: u64 = 1 << 46;
    pub(crate) const EN_SCXT: u64 = 1 << 53;
    pub(crate) const TID5: u64 = 1 << 58;
}

/// HCR_EL2 of a guest (spec/arm.md 2.13); TVM comes and goes with the guest's caches.
pub(crate) fn guest_hcr(features: &Features) -> u64 {
    let fwb = if features.fwb { hcr::FWB } else { 0 };
    let keys = if features.pauth { hcr::POINTER_AUTH } else { 0 };
    let lor = if features.lor { hcr::TLOR } else { 0 };
    // What the identification registers hide, and what nothing else would trap.
    let error_records = if features.ras { hcr::TERR } else { 0 };
    let tags = if features.mte { hcr::TID5 } else { 0 };
    let contexts = if features.scxtnum { hcr::EN_SCXT } else { 0 };
    hcr::VM
        | hcr::PTW
        | hcr::SWIO
        | hcr::FMO
        | hcr::IMO
        | hcr::AMO
        | hcr::FB
        | hcr::BSU_INNER
        | hcr::TWI
        | hcr::TID3
        | hcr::TSC
        | hcr::TIDCP
        | hcr::TACR
        | hcr::TSW
        | hcr::RW
        | fwb
        | keys
        | lor
        | error_records
        | tags
        | contexts
}

/// SCTLR_EL1 of a core that starts: RES1 bits, MMU and caches off.
const SCTLR_START: u64 = 0x30d0_0800;
/// EL1h, D, A, I and F masked.
const PSTATE_START: u64 = 0b00101 | 0xf << 6;

impl Context {
    /// A vCPU that has just been turned on: everything zero but what the architecture defines.
    pub(crate) fn new(features: &Features) -> Self {
        Self {
            regs: GuestRegs::default(),
            el1: El1::default(),
            sctlr: SCTLR_START,
            tcr: 0,
            keys: Keys::default(),
            software: SoftwareContext::default(),
            fp: FpState::new(),
            host_fp: FpState::new(),
            timer: Timer::default(),
            deferred_error: 0,
            hcr: guest_hcr(features),
        }
    }

    /// Starts over at `entry` with `x0`, as CPU_ON does.
    pub(crate) fn restart(&mut self, features: &Features, entry: u64, x0: u64) {
        *self = Self::new(features);
        self.regs.x[0] = x0;
        self.regs.pc = entry;
        self.regs.pstate = PSTATE_START;
    }
}

/// What belongs to the VM rather than to one of its vCPUs.
#[derive(Debug)]
pub(crate) struct VmWorld {
    pub(crate) stage2: Stage2Regs,
    /// CNTVOFF_EL2: what the virtual counter is behind the physical one; 0 until it starts.
    time_offset: AtomicU64,
}

impl VmWorld {
    pub(crate) const fn new(stage2: Stage2Regs) -> Self {
        Self {
            stage2,
            time_offset: AtomicU64::new(0),
        }
    }

    /// A VM's time begins with its first instruction, not while the host loads it; a reset does not
    /// set it back. Whoever comes first decides.
    pub(crate) fn start_time(&self) {
        let now = super::regs::ticks();
        let _ = (self.time_offset).compare_exchange(0, now, Ordering::AcqRel, Ordering::Relaxed);
    }

    pub(crate) fn time_offset(&self) -> u64 {
        self.time_offset.load(Ordering::Relaxed)
    }
}

/// The host's side while a guest is loaded.
#[derive(Debug, Default)]
pub(crate) struct HostWorld {
    el1: El1,
    sctlr: u64,
    tcr: u64,
    keys: Keys,
    software: SoftwareContext,
    controls: Controls,
    timer: Timer,
    stage2: Stage2Regs,
    hcr: u64,
    hcrx: u64,
    /// VBAR_EL2.
    vectors: u64,
    profiling: Profiling,
    traps: FineTraps,
    pc: u64,
    pstate: u64,
    /// The guest's FP registers are in the core.
    fp_is_guests: bool,
}

/// CPTR_EL2 of a guest that has not used FP yet: TCPAC (no trap of CPACR_EL1 is needed: clear),
/// TAM, TTA, TSM, TFP, TZ, RES1 bits (Arm ARM D24.2.33, without VHE).
const CPTR_GUEST: u64 = 0x22ff | 1 << 8 | 1 << 10 | 1 << 12 | 1 << 20 | 1 << 30;
/// CPTR_EL2.TFP.
const CPTR_TFP: u64 = 1 << 10;
/// MDCR_EL2 of a guest: TPMCR, TPM, TDE clear, TDA, TDOSA, TDRA, TDCC (Arm ARM D24.2.103). See
/// [`profiling::traps`] for the rest.
const MDCR_TRAPS: u64 = 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 27;
/// What stays of the host's MDCR_EL2: HPMN, and HPMD and HCCD, for EL2 between the guest's exits.
const MDCR_KEPT: u64 = 0x1f | 1 << 17 | 1 << 23;
/// MPAM2_EL2 of a guest: its accesses to MPAM0_EL1 and MPAM1_EL1, which keep the host's values, trap.
const MPAM_TRAPS: u64 = 1 << 49 | 1 << 48;
/// CNTHCTL_EL2: the physical counter can be read (EL1PCTEN), the physical timer traps.
const CNTHCTL_GUEST: u64 = 1;
/// VMPIDR_EL2: RES1 bit 31.
const MPIDR_RES1: u64 = 1 << 31;

/// Fine-grained traps, where they exist. A guest's are all zero: what has a negative name traps.
#[derive(Clone, Copy, Debug, Default)]
struct FineTraps {
    registers: [u64; 5],
    second: [u64; 5],
}

macro_rules! each_trap {
    ($array:expr, $do:ident, $($register:literal),+) => {{
        let mut values = $array.iter_mut();
        $(if let Some(value) = values.next() { $do!($register, value); })+
    }};
}

macro_rules! read_trap {
    ($register:literal, $value:ident) => {
        *$value = mrs!($register)
    };
}
macro_rules! write_trap {
    ($register:literal, $value:ident) => {
        msr!($register, *$value)
    };
}

impl FineTraps {
    fn read(features: &Features) -> Self {
        let mut traps = Self::default();
        if features.fgt {
            each_trap!(
                traps.registers,
                read_trap,
                "s3_4_c1_c1_4",
                "s3_4_c1_c1_5",
                "s3_4_c1_c1_6",
                "s3_4_c3_c1_4",
                "s3_4_c3_c1_5"
            );
        }
        if features.fgt2 {
            each_trap!(
                traps.second,
                read_trap,
                "s3_4_c3_c1_2",
                "s3_4_c3_c1_3",
                "s3_4_c3_c1_7",
                "s3_4_c3_c1_0",
                "s3_4_c3_c1_1"
            );
        }
        traps
    }

    #[inline]
    fn write(mut self, features: &Features) {
        if features.fgt {
            each_trap!(
                self.registers,
                write_trap,
                "s3_4_c1_c1_4",
                "s3_4_c1_c1_5",
                "s3_4_c1_c1_6",
                "s3_4_c3_c1_4",
                "s3_4_c3_c1_5"
            );
        }
        if features.fgt2 {
            each_trap!(
                self.second,
                write_trap,
                "s3_4_c3_c1_2",
                "s3_4_c3_c1_3",
                "s3_4_c3_c1_7",
                "s3_4_c3_c1_0",
                "s3_4_c3_c1_1"
            );
        }
    }
}

impl HostWorld {
    /// Loads the guest in the place of the host, whose registers were just read.
    pub(crate) fn load_guest(&self, features: &Features, vm: &VmWorld, index: u8, guest: &Context) {
        let host = self;
        if features.speculative_at {
            msr!("tcr_el1", host.tcr | NO_WALKS);
            isb();
            msr!("sctlr_el1", host.sctlr | MMU_ON);
            isb();
        }
        guest.el1.write();
        if features.pauth {
            guest.keys.write();
        }
        if features.scxtnum {
            guest.software.write();
        }
        load_controls(features, vm, index, &host.controls);
        if features.fgt {
            FineTraps::default().write(features);
        }
        // The tables behind VTTBR are the guest's.
        msr!("vtcr_el2", vm.stage2.vtcr);
        msr!("vttbr_el2", vm.stage2.vttbr);
        regs::set_hcr(guest.hcr);
        if features.hcx {
            msr!("s3_4_c1_c2_2", 0); // HCRX_EL2
        }
        guest.timer.write();
        if features.ras {
            msr!("s3_4_c12_c1_1", guest.deferred_error); // VDISR_EL2
            msr!("s3_4_c5_c2_3", 0); // VSESR_EL2: a virtual SError without a syndrome
        }
        guest.regs.load_return();
        load_walk_registers(features, guest.sctlr, guest.tcr);
        set_vectors(vectors_for_guest(host.vectors));
    }

    /// Reads everything of the host that a guest will replace.
    pub(crate) fn save(&mut self, features: &Features) {
        if features.sme {
            leave_streaming_mode();
        }
        // First, while what the host's buffers are written through is still the host's.
        self.profiling = Profiling::stop(features);
        self.timer = Timer::read();
        // The host's timer must not fire for the guest.
        msr!("cntv_ctl_el0", 0);
        self.el1 = El1::read();
        self.sctlr = mrs!("sctlr_el1");
        self.tcr = mrs!("tcr_el1");
        if features.pauth {
            self.keys = Keys::read();
        }
        self.controls = Controls::read();
        self.stage2 = Stage2Regs {
            vtcr: mrs!("vtcr_el2"),
            vttbr: mrs!("vttbr_el2"),
        };
        self.hcr = mrs!("hcr_el2");
        self.vectors = mrs!("vbar_el2");
        if features.hcx {
            self.hcrx = mrs!("s3_4_c1_c2_2");
        }
        if features.fgt {
            self.traps = FineTraps::read(features);
        }
        self.pc = mrs!("elr_el2");
        self.pstate = mrs!("spsr_el2");
    }

    /// Saves the guest and loads the host.
    pub(crate) fn load_host(&mut self, features: &Features, guest: &mut Context) {
        self.return_fp(guest);
        guest.regs.save_return();
        guest.timer = Timer::read();
        msr!("cntv_ctl_el0", 0);
        guest.el1 = El1::read();
        guest.sctlr = mrs!("sctlr_el1");
        guest.tcr = mrs!("tcr_el1");
        if features.pauth {
            guest.keys = Keys::read();
        }
        if features.scxtnum {
            guest.software = SoftwareContext::read();
        }
        if features.ras {
            guest.deferred_error = mrs!("s3_4_c12_c1_1");
        }
        if features.speculative_at {
            msr!("tcr_el1", guest.tcr | NO_WALKS);
            isb();
            msr!("sctlr_el1", guest.sctlr | MMU_ON);
            isb();
        }
        self.el1.write();
        if features.pauth {
            self.keys.write();
        }
        if features.scxtnum {
            self.software.write();
        }
        self.controls.write();
        if features.mpam {
            msr!("s3_4_c10_c5_0", 0); // MPAM2_EL2, as `host_regs` has it
        }
        if features.fgt {
            self.traps.write(features);
        }
        note_serror(guest);
        // What was there when the guest was loaded.
        msr!("vtcr_el2", self.stage2.vtcr);
        msr!("vttbr_el2", self.stage2.vttbr);
        regs::set_hcr(self.hcr);
        if features.hcx {
            msr!("s3_4_c1_c2_2", self.hcrx);
        }
        msr!("elr_el2", self.pc);
        regs::return_as(self.pstate);
        self.timer.write();
        load_walk_registers(features, self.sctlr, self.tcr);
        self.profiling.resume(features);
        set_vectors(self.vectors);
    }

    /// The guest uses FP for the first time in this run: its registers in, the host's out.
    pub(crate) fn lend_fp(&mut self, guest: &mut Context) {
        msr!("cptr_el2", CPTR_GUEST & !CPTR_TFP);
        isb();
        fp_save(&mut guest.host_fp);
        fp_load(&guest.fp);
        self.fp_is_guests = true;
    }

    fn return_fp(&mut self, guest: &mut Context) {
        if !self.fp_is_guests {
            return;
        }
        // `lend_fp` has opened FP.
        fp_save(&mut guest.fp);
        fp_load(&guest.host_fp);
        self.fp_is_guests = false;
    }
}

fn load_controls(features: &Features, vm: &VmWorld, index: u8, host: &Controls) {
    let controls = Controls {
        cptr: CPTR_GUEST,
        mdcr: host.mdcr & MDCR_KEPT | MDCR_TRAPS | profiling::traps(features),
        hstr: 0,
        cnthctl: CNTHCTL_GUEST,
        cntvoff: vm.time_offset(),
        vmpidr: MPIDR_RES1 | u64::from(index),
        vpidr: host.vpidr,
    };
    controls.write();
    if features.mpam {
        msr!("s3_4_c10_c5_0", MPAM_TRAPS);
    }
}

/// A guest has no streaming mode, and its vector instructions must not be those of one. A host that is
/// in it loses its vector registers by leaving it (Arm ARM B1.4.7, effect of PSTATE.SM).
fn leave_streaming_mode() {
    const SM: u64 = 1;
    let svcr = mrs!("s3_3_c4_c2_2");
    if svcr & SM != 0 {
        msr!("s3_3_c4_c2_2", svcr & !SM);
    }
}

/// Walks come on as the last thing.
fn load_walk_registers(features: &Features, sctlr: u64, tcr: u64) {
    if features.speculative_at {
        isb();
    }
    msr!("sctlr_el1", sctlr);
    if features.speculative_at {
        isb();
    }
    msr!("tcr_el1", tcr);
    isb();
}

/// The vectors of a guest on a core whose own are these.
fn vectors_for_guest(own: u64) -> u64 {
    let plain = (&raw const vectors).addr() as u64;
    if own == plain {
        (&raw const guest_vectors).addr() as u64
    } else {
        (&raw const forgetful_guest_vectors).addr() as u64
    }
}

/// Runs the guest until its next exception; gives the vector's number.
#[inline]
pub(crate) fn enter(guest: &mut Context) -> u64 {
    let vector: u64;
    // SAFETY: the guest is loaded (the caller holds a `HostWorld`), behind its own stage 2; guest.S
    // restores what is not named here as lost. Most is: the compiler keeps little across an entry,
    // and saving all that a call must preserve costs more.
    unsafe {
        core::arch::asm!(
            "bl {enter}",
            enter = sym guest_enter,
            inout("x0") &raw mut guest.regs => vector,
            out("x20") _,
            out("x21") _,
            out("x22") _,
            out("x23") _,
            out("x24") _,
            out("x25") _,
            out("x26") _,
            out("x27") _,
            out("x28") _,
            clobber_abi("C"),
        );
    }
    vector
}

/// Writes HCR_EL2 of the guest that is loaded.
pub(crate) fn set_hcr(value: u64) {
    regs::set_hcr(value);
}

/// Notes whether the virtual SError of the guest that is loaded is still pending: the core clears
/// HCR_EL2.VSE when the guest takes it (Arm ARM D24.2.53), and it must not come twice.
pub(crate) fn note_serror(guest: &mut Context) {
    if guest.hcr & hcr::VSE != 0 {
        guest.hcr &= !hcr::VSE | mrs!("hcr_el2");
    }
}

/// Loads a vCPU that is loaded already anew, after its registers were replaced: EL1's, not FP.
pub(crate) fn reload(features: &Features, guest: &Context) {
    guest.el1.write();
    if features.pauth {
        guest.keys.write();
    }
    if features.scxtnum {
        guest.software.write();
    }
    set_hcr(guest.hcr);
    guest.regs.load_return();
    load_walk_registers(features, guest.sctlr, guest.tcr);
}

/// Forgets what this core has cached for another vCPU of the VM that is loaded: they share a VMID,
/// but each has its own ASIDs, and a TLBI that does not broadcast is meant for the vCPU's own core.
pub(crate) fn forget_other_vcpu() {
    instructions::tlbi_vmalle1();
    instructions::ic_iallu();
    instructions::dsb_nsh();
    isb();
}
