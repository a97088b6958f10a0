//! The world switch: a guest's registers in, the host's out, and back.
//!
//! Without VHE the two share EL1's registers, so all of them change places. What differs between
//! the worlds is in three groups: EL1's own registers ([`El1`]), what EL2 tells the core about EL1
//! (stage 2, traps, timer offset: [`HostControls`]), and FP, which changes only when the guest uses it.
//!
//! Order (spec/arm.md 3.9; errata 1319367 and 1165522): going in, walks are off before the first
//! foreign register is loaded, and come on with TCR_EL1 as the last one; going out the same.

use core::sync::atomic::{AtomicU64, Ordering};

use el2::exits::{PendingLoad, Registers};
use el2::features::Features;

use super::controls::{CPTR_GUEST, CPTR_GUEST_WITH_FP, HostControls, Parts};
use super::host_regs::Stage2Regs;
use super::instructions::{self, isb};
use super::profiling::Profiling;
use super::regs::{self, mrs, msr};
use super::tlb::{MMU_ON, NO_WALKS};

/// General registers, PC and PSTATE; guest.S knows the layout.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(16))]
pub(crate) struct GuestRegs {
    /// x0 to x30.
    pub(crate) x: Registers,
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
    /// Completes a load of a vCPU that is not loaded, with the host's value.
    #[inline]
    pub(crate) fn complete(&mut self, load: PendingLoad, value: u64) {
        let at = (self.pc, self.pstate);
        (self.pc, self.pstate) = load.complete(&mut self.x, at, value);
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
                // Read before the first write, which the compiler moves no read across: in pairs.
                let Self { $($field,)* } = *self;
                $(msr!($register, $field);)*
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
    /// The virtual timer.
    Timer {
        cval = "cntv_cval_el0",
        ctl = "cntv_ctl_el0",
    }
}

/// What a vCPU keeps between its runs. What each run moves comes first, within reach of the instructions
/// that move two registers.
#[derive(Clone, Debug)]
#[repr(C)]
pub(crate) struct Context {
    pub(crate) regs: GuestRegs,
    pub(crate) el1: El1,
    pub(crate) sctlr: u64,
    pub(crate) tcr: u64,
    /// CNTV_CTL_EL0 and CNTV_CVAL_EL0.
    pub(crate) timer: Timer,
    /// HCR_EL2 while it runs.
    pub(crate) hcr: u64,
    /// VDISR_EL2: what DISR_EL1 is to a guest.
    deferred_error: u64,
    keys: Keys,
    software: SoftwareContext,
    fp: FpState,
    /// The host's FP registers while the guest's are in the core.
    host_fp: FpState,
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
    pub(crate) const TID1: u64 = 1 << 16;
    pub(crate) const TID3: u64 = 1 << 18;
    pub(crate) const TSC: u64 = 1 << 19;
    pub(crate) const TIDCP: u64 = 1 << 20;
    pub(crate) const TACR: u64 = 1 << 21;
    pub(crate) const TSW: u64 = 1 << 22;
    pub(crate) const TVM: u64 = 1 << 26;
    pub(crate) const RW: u64 = 1 << 31;
    pub(crate) const TLOR: u64 = 1 << 35;
    pub(crate) const TERR: u64 = 1 << 36;
    pub(crate) const TEA: u64 = 1 << 37;
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
    let error_records = if features.ras {
        hcr::TERR | hcr::TEA
    } else {
        0
    };
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
        | hcr::TID1
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
        self.regs.x.set(0, x0);
        self.regs.pc = entry;
        self.regs.pstate = PSTATE_START;
    }
}

/// What belongs to the VM rather than to one of its vCPUs.
#[derive(Debug)]
pub(crate) struct VmWorld {
    pub(crate) stage2: Stage2Regs,
    /// The VM is protected: the host's event counters stand still while it runs.
    uncounted: bool,
    /// CNTVOFF_EL2: what the virtual counter is behind the physical one; 0 until it starts.
    time_offset: AtomicU64,
}

impl VmWorld {
    pub(crate) const fn new(stage2: Stage2Regs, is_protected: bool) -> Self {
        Self {
            stage2,
            uncounted: is_protected,
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

/// The host's side while a guest is loaded: what the host itself can change.
#[derive(Debug, Default)]
pub(crate) struct HostWorld {
    el1: El1,
    sctlr: u64,
    tcr: u64,
    timer: Timer,
    pc: u64,
    pstate: u64,
    keys: Keys,
    software: SoftwareContext,
    profiling: Profiling,
    /// PMCR_EL0, where the host's counters stand still and did not before.
    counting: Option<u64>,
    /// The guest's FP registers are in the core.
    fp_is_guests: bool,
}

impl HostWorld {
    /// Reads everything of the host that a guest will replace. `features` and `parts` are this core's.
    #[inline(never)] // Here and below: few registers for what is around, and offsets that fit.
    pub(crate) fn save(&mut self, features: &Features, parts: Parts) {
        if parts.sme() {
            leave_streaming_mode();
        }
        if parts.profiles() {
            // First, while what the host's buffers are written through is still the host's.
            self.profiling = Profiling::stop(features);
        }
        self.timer = Timer::read();
        // The host's timer must not fire for the guest.
        msr!("cntv_ctl_el0", 0);
        self.el1 = El1::read();
        self.sctlr = mrs!("sctlr_el1");
        self.tcr = mrs!("tcr_el1");
        if parts.pauth() {
            self.keys = Keys::read();
        }
        if parts.scxtnum() {
            self.software = SoftwareContext::read();
        }
        self.pc = mrs!("elr_el2");
        self.pstate = mrs!("spsr_el2");
    }

    /// Loads the guest in the place of the host, whose registers were just read.
    #[inline(never)]
    pub(crate) fn load_guest(
        &mut self,
        controls: &HostControls,
        vm: &VmWorld,
        index: u8,
        guest: &Context,
    ) {
        let parts = controls.parts;
        if vm.uncounted && parts.pmu() {
            self.stop_counters();
        }
        if parts.speculative_at() {
            stop_walks(self.sctlr, self.tcr);
        }
        guest.el1.write();
        if parts.pauth() {
            guest.keys.write();
        }
        if parts.scxtnum() {
            guest.software.write();
        }
        controls.load_guest(index, vm.time_offset());
        // The tables behind VTTBR are the guest's.
        msr!("vtcr_el2", vm.stage2.vtcr);
        msr!("vttbr_el2", vm.stage2.vttbr);
        regs::set_hcr(guest.hcr);
        guest.timer.write();
        if parts.ras() {
            msr!("s3_4_c12_c1_1", guest.deferred_error); // VDISR_EL2
            msr!("s3_4_c5_c2_3", 0); // VSESR_EL2: a virtual SError without a syndrome
        }
        guest.regs.load_return();
        load_walk_registers(parts, guest.sctlr, guest.tcr);
        controls.load_guest_vectors();
    }

    /// Saves the guest.
    #[inline(never)]
    pub(crate) fn save_guest(&mut self, parts: Parts, guest: &mut Context) {
        self.return_fp(guest);
        guest.regs.save_return();
        guest.timer = Timer::read();
        msr!("cntv_ctl_el0", 0);
        guest.el1 = El1::read();
        guest.sctlr = mrs!("sctlr_el1");
        guest.tcr = mrs!("tcr_el1");
        if parts.pauth() {
            guest.keys = Keys::read();
        }
        if parts.scxtnum() {
            guest.software = SoftwareContext::read();
        }
        if parts.ras() {
            guest.deferred_error = mrs!("s3_4_c12_c1_1");
        }
        note_serror(guest);
        if parts.speculative_at() {
            stop_walks(guest.sctlr, guest.tcr);
        }
    }

    /// Loads the host in the place of the guest, whose registers were just saved.
    #[inline(never)]
    pub(crate) fn load_host(&mut self, features: &Features, controls: &HostControls) {
        let parts = controls.parts;
        self.el1.write();
        if parts.pauth() {
            self.keys.write();
        }
        if parts.scxtnum() {
            self.software.write();
        }
        controls.load_host();
        controls.load_hcr();
        msr!("elr_el2", self.pc);
        regs::return_as(self.pstate);
        self.timer.write();
        load_walk_registers(parts, self.sctlr, self.tcr);
        if parts.profiles() {
            self.profiling.resume(features);
        }
        if let Some(control) = self.counting.take() {
            msr!("pmcr_el0", control);
        }
        controls.load_host_vectors();
    }

    /// A counter has no VMID: what it counts of a protected guest, the host would read (Arm ARM D19.10.8,
    /// PMCR_EL0.E; its P and C read as zero).
    fn stop_counters(&mut self) {
        const E: u64 = 1;
        let control = mrs!("pmcr_el0");
        if control & E != 0 {
            msr!("pmcr_el0", control & !E);
            self.counting = Some(control);
        }
    }

    /// The guest uses FP for the first time in this run: its registers in, the host's out.
    pub(crate) fn lend_fp(&mut self, guest: &mut Context) {
        msr!("cptr_el2", CPTR_GUEST_WITH_FP);
        isb();
        fp_save(&mut guest.host_fp);
        fp_load(&guest.fp);
        self.fp_is_guests = true;
    }

    /// The vCPU starts over while it is loaded: the FP registers in the core are the host's again, and the
    /// next use of FP traps.
    pub(crate) fn end_loan(&mut self, guest: &mut Context) {
        self.return_fp(guest);
        msr!("cptr_el2", CPTR_GUEST);
        isb();
    }

    #[inline]
    fn return_fp(&mut self, guest: &mut Context) {
        if self.fp_is_guests {
            // `lend_fp` has opened FP.
            fp_save(&mut guest.fp);
            fp_load(&guest.host_fp);
            self.fp_is_guests = false;
        }
    }
}

/// No walk of stage 1 begins from here on, speculatively or not, with registers of EL1's that had these
/// values.
fn stop_walks(sctlr: u64, tcr: u64) {
    msr!("tcr_el1", tcr | NO_WALKS);
    isb();
    msr!("sctlr_el1", sctlr | MMU_ON);
    isb();
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
#[inline]
fn load_walk_registers(parts: Parts, sctlr: u64, tcr: u64) {
    if parts.speculative_at() {
        isb();
    }
    msr!("sctlr_el1", sctlr);
    if parts.speculative_at() {
        isb();
    }
    msr!("tcr_el1", tcr);
    isb();
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

/// Makes a virtual SError pending for the guest that is loaded.
pub(crate) fn pend_serror(guest: &mut Context) {
    guest.hcr |= hcr::VSE;
    set_hcr(guest.hcr);
}

/// Makes the guest that is loaded trap when it writes SCTLR_EL1 and the like, or not.
pub(crate) fn trap_vm_registers(guest: &mut Context, trap: bool) {
    note_serror(guest);
    guest.hcr &= !hcr::TVM;
    if trap {
        guest.hcr |= hcr::TVM;
    }
    set_hcr(guest.hcr);
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
    let parts = Parts::of(features);
    guest.el1.write();
    if parts.pauth() {
        guest.keys.write();
    }
    if parts.scxtnum() {
        guest.software.write();
    }
    set_hcr(guest.hcr);
    guest.regs.load_return();
    load_walk_registers(parts, guest.sctlr, guest.tcr);
}

/// Forgets what this core has cached for another vCPU of the VM that is loaded: they share a VMID,
/// but each has its own ASIDs, and a TLBI that does not broadcast is meant for the vCPU's own core.
pub(crate) fn forget_other_vcpu() {
    instructions::tlbi_vmalle1();
    instructions::ic_iallu();
    instructions::dsb_nsh();
    isb();
}
