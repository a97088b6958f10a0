//! From firmware to the host.
//!
//! 1. [`boot_primary`], where the boot loader put the image, MMU off: read the device tree, choose
//!    EL2's memory (the highest free range), copy the image there, enter the copy.
//! 2. `boot_primary` again, in the copy, with what was read: build EL2's map, turn the MMU on, move to the real stack.
//! 3. [`boot_main`]: log, pools, page states, the other cores, the host's stage 2, the shim, the host's
//!    device tree.
//! 4. `after_boot`: what only 1 to 3 need becomes the host's memory; then down to EL1.
//!
//! Whatever is wrong ends in one line `ravelin: fatal: ...` on the console.

use abi::Counter;
use board::{
    AddrRange, Board, BoardError, HostTree, MAX_CPUS, MAX_RESERVED, PAGE_SIZE, Placement, Power,
    RangeList, Tree, check_header, highest_free, patch_for_host,
};
use el2::counters::Counters;
use el2::features::{Features, IdRegisters};
use el2::guest::idregs::HardwareIds;
use el2::guest::smccc::{Mitigation, Mitigations};
use el2::layout::Layout;
use el2::overwrite::{self, Request};
use el2::ownership::Ownership;
use el2::page_state::{Owner, PageStates};
use el2::psci::StartOrder;
use heapless::Vec;

use crate::arch::cpu::{self, CpuData};
use crate::arch::firmware;
use crate::arch::frames;
use crate::arch::gic::PhysicalGic;
use crate::arch::mem::{self, Image};
use crate::arch::mmu::{self, EarlyTables, Map};
use crate::arch::{regs, self_test};
use crate::console::say;
use crate::console::{self, fatal};
use crate::entropy::Entropy;
use crate::host::HostMemory;
use crate::hypervisor::{self, Hypervisor, Machine};
use crate::iommu;
use crate::protect::Pages;
use crate::smp;
use crate::vm;

/// Bytes that the host's device tree may grow by: EL2's and the shim's changes.
const TREE_SLACK: u64 = 0x8000;
/// Alignment of the shim: that of a Linux kernel.
const SHIM_ALIGN: u64 = 2 << 20;

/// What the two entries pass on.
#[derive(Debug)]
pub(crate) struct Boot {
    tree: Tree<'static>,
    board: Board<'static>,
    tree_range: AddrRange,
    features: Features,
    layout: Layout,
    /// EL2's memory; in the first entry where it is to be.
    el2: AddrRange,
    entered: u64,
    settings: mmu::Settings,
    /// What EL2's own map left of the pool's largest part.
    pool: AddrRange,
    /// Memory may hold what protected guests had before a reset.
    overwrite: bool,
}

/// Entry from entry.S. Where the boot loader put us, `size` is 0 and `argument` the device tree;
/// where we put ourselves, `size` is that of EL2's memory and `argument` what [`place`] left there.
#[unsafe(no_mangle)]
extern "C" fn boot_primary(argument: u64, entered: u64, size: u64, current_el: u64) -> ! {
    let image = Image::here();
    if size == 0 {
        first_entry(argument, entered, current_el, &image)
    }
    let mut boot: Boot = mem::take_over(argument);
    console::set(boot.board.console);
    let cpu = own_map(&mut boot, &image);
    cpu::continue_boot(cpu, &mut boot)
}

#[inline(never)] // Boards are large: the second entry has room on the stack for its own.
fn first_entry(argument: u64, entered: u64, current_el: u64, image: &Image) -> ! {
    match read_board(argument) {
        Ok((parsed, board, range)) => {
            let boot = prepare(parsed, board, range, entered, current_el, image);
            place(boot, image)
        }
        Err(error) => {
            // At another level our exception vectors are not in force: no probing.
            if regs::at_el2() {
                console::probe_last_resort();
            }
            fatal(format_args!("{error}"))
        }
    }
}

type Parsed = (Tree<'static>, Board<'static>, AddrRange);

fn read_board(address: u64) -> Result<Parsed, BoardError> {
    let size = check_header(address, mem::header_at(address))?;
    let range = AddrRange::with_size(address, size as u64).ok_or(BoardError::BadSize(0))?;
    let tree = Tree::new(mem::device_tree(range))?;
    console::set(tree.console());
    let mut board = Board::read(&tree)?;
    board.reserve(range)?;
    Ok((tree, board, range))
}

/// Checks the core and plans the layout.
fn prepare(
    tree: Tree<'static>,
    board: Board<'static>,
    tree_range: AddrRange,
    entered: u64,
    current_el: u64,
    image: &Image,
) -> Boot {
    if current_el != 2 << 2 {
        fatal(format_args!(
            "entered at EL{}, but this is a hypervisor: enter at EL2 (QEMU: -machine virt,virtualization=on)",
            current_el >> 2
        ));
    }
    let features = Features::decode(&regs::id_registers());
    if !features.granule_4k {
        fatal(format_args!("this core has no 4 KiB granule at stage 2"));
    }
    let cpus = board.cpus.len() as u64;
    let Some(layout) = Layout::new(image.end - image.start, cpus, board.memory.total()) else {
        fatal(format_args!("the device tree's memory sizes overflow"));
    };
    Boot {
        tree,
        board,
        tree_range,
        features,
        layout,
        el2: tree_range,
        entered,
        settings: mmu::Settings {
            ttbr0: 0,
            tcr: 0,
            mair: 0,
            sctlr: 0,
        },
        pool: tree_range,
        overwrite: false,
    }
}

fn range_or_die(start: u64, size: u64) -> AddrRange {
    match AddrRange::with_size(start, size) {
        Some(range) => range,
        None => fatal(format_args!(
            "empty or wrapping range {start:#x} + {size:#x}"
        )),
    }
}

/// Copies the image to the highest free memory and enters it there, with what was read so far in
/// the end of the pool.
///
/// The highest, so that the host keeps the low memory that its devices' DMA may be limited to.
#[inline(never)] // As above.
fn place(mut boot: Boot, image: &Image) -> ! {
    let mut taken = boot.board.reserved.clone();
    let here = range_or_die(image.start, image.end - image.start);
    if let Err(error) = taken.insert(here.grow_to_pages(), "reserved ranges") {
        fatal(format_args!("{error}"));
    }
    // Before anything is written: what says so may be where EL2 goes.
    boot.overwrite = overwrite::is_requested(&Pages, &boot.board.memory, &taken);
    let want = Placement {
        size: boot.layout.size,
        align: el2::layout::ALIGN,
        limit: 1 << boot.features.pa_bits.min(48),
    };
    let Some(there) = highest_free(&boot.board.memory, &taken, want) else {
        fatal(format_args!("{}", BoardError::NoRoom(want.size >> 10)));
    };
    boot.el2 = there;
    if boot.overwrite {
        let copies = boot.layout.copies(there.start());
        overwrite::carry_over(&Pages, there, &copies);
    }
    let entered = boot.entered;
    const { assert!(size_of::<Boot>() as u64 <= overwrite::STRIDE - PAGE_SIZE) };
    let file = range_or_die(image.start, image.file_end - image.start);
    mem::place_image(file, there);
    let argument = mem::hand_over(boot, there);
    let entry = there.start() + (mem::placed_entry() - image.start);
    mem::enter_copy(entry, argument, entered, there.size())
}

/// Builds EL2's map in the start of the pool, turns the MMU on, and gives this core its data.
fn own_map(boot: &mut Boot, image: &Image) -> &'static CpuData {
    let (Some(pool), _) = boot.layout.pools(boot.el2.start()) else {
        fatal(format_args!("EL2's memory has no pool"));
    };
    let mut map = Map::new(EarlyTables::from_pool(pool));
    if let Err(error) = map_all(&mut map, boot, image) {
        fatal(format_args!("EL2's own map: {error}"));
    }
    boot.settings = map.settings(boot.features.pa_bits);
    boot.pool = range_or_die(map.pages_left_from(), pool.end() - map.pages_left_from());
    mmu::enable_first(&boot.settings);
    let me = boot
        .board
        .cpus
        .iter()
        .position(|cpu| cpu.mpidr == regs::mpidr());
    let Some(me) = me else {
        fatal(format_args!(
            "the boot core's mpidr {:#x} is not in the device tree",
            regs::mpidr()
        ));
    };
    let data = cpu_data(boot, me);
    data.adopt();
    data
}

fn map_all(map: &mut Map, boot: &Boot, image: &Image) -> Result<(), aarch64_paging::MapError> {
    let range = |start, end| range_or_die(start, end - start);
    for ram in boot.board.memory.as_slice() {
        for part in ram.without(boot.board.no_map.as_slice(), boot.el2) {
            map.map(part, mmu::DATA)?;
        }
    }
    map.map(range(image.start, image.boot_text_end), mmu::TEXT)?;
    let boot_constants = range(image.boot_text_end, image.boot_rodata_end);
    map.map(boot_constants, mmu::CONSTANTS)?;
    map.map(range(image.boot_rodata_end, image.boot_end), mmu::DATA)?;
    map.map(range(image.boot_end, image.text_end), mmu::TEXT)?;
    map.map(range(image.text_end, image.rodata_end), mmu::CONSTANTS)?;
    map.map(range(image.rodata_end, image.end), mmu::DATA)?;
    for index in 0..boot.board.cpus.len() {
        let block = cpu_block(boot, index);
        map.map(block.stack, mmu::DATA)?;
        map.map(block.emergency, mmu::DATA)?;
        map.map(block.data, mmu::DATA)?;
    }
    let rest = boot.el2.start() + boot.layout.low_pool;
    map.map(range(rest, boot.el2.end()), mmu::DATA)?;
    let power = boot.board.power.map(|Power::BcmPm(base)| base);
    let console = boot.board.console.map(|console| console.base);
    for device in [power, console].into_iter().flatten() {
        let page = device - device % PAGE_SIZE;
        map.map(range(page, page + PAGE_SIZE), mmu::DEVICE)?;
    }
    let iommu = iommu_of(boot).map(|iommu| iommu.registers);
    for registers in iommu.into_iter().chain(boot.board.generator) {
        map.map(registers.grow_to_pages(), mmu::DEVICE)?;
    }
    for registers in PhysicalGic::mapped(boot.board.gic.as_ref()) {
        map.map(registers, mmu::DEVICE)?;
    }
    Ok(())
}

fn cpu_block(boot: &Boot, index: usize) -> el2::layout::CpuBlock {
    match boot.layout.cpu(boot.el2.start(), index as u64) {
        Some(block) => block,
        None => fatal(format_args!("no block for CPU {index}")),
    }
}

fn cpu_data(boot: &Boot, index: usize) -> &'static CpuData {
    let mpidr = boot.board.cpus.get(index).map_or(0, |cpu| cpu.mpidr);
    CpuData::create(&cpu_block(boot, index), (index as u64, mpidr))
}

/// Everything that needs the MMU. entry.S comes here, on this core's own stack.
#[unsafe(no_mangle)]
extern "C" fn boot_main(boot: &mut Boot) -> ! {
    let Some(cpu) = cpu::this_cpu() else {
        fatal(format_args!("the boot core has no data"));
    };
    console::start_log(boot.board.chosen.log_level);
    announce(boot);
    let cpus: Vec<&'static CpuData, MAX_CPUS> = (0..boot.board.cpus.len())
        .map(|index| {
            if index as u64 == cpu.index {
                cpu
            } else {
                cpu_data(boot, index)
            }
        })
        .collect();
    cpu::publish_secondary_boot(boot.settings, &cpus);
    let entry = Image::here().secondary_entry;
    smp::start_others(&boot.board, boot.features, &cpus, entry);
    report_cpus(&cpus);
    if boot.overwrite {
        // Not before the other cores have left where the boot loader had them.
        wipe_remains(boot);
    }
    let hypervisor = assemble(boot, cpus);
    if let Some(test) = boot.board.chosen.self_test {
        self_test::provoke(test);
    }
    // The parked cores may turn themselves off in firmware now that they can see there is one.
    cpu::send_event();
    let order = load_host(boot, hypervisor);
    report(boot, hypervisor);
    cpu::end_boot(cpu, order)
}

#[inline(never)] // Its frame would stay on the small stack for as long as its caller's.
fn announce(boot: &Boot) {
    let board = &boot.board;
    say!(
        Info,
        "Ravelin {} at EL2 on {}",
        env!("CARGO_PKG_VERSION"),
        board.model
    );
    say!(
        Info,
        "{} MiB of RAM in {} range(s), {} CPU(s), firmware {:?}, GIC {}",
        board.memory.total() >> 20,
        board.memory.as_slice().len(),
        board.cpus.len(),
        board.psci,
        match board.gic {
            Some(board::Gic::V2 { .. }) => "v2",
            Some(board::Gic::V3 { .. }) => "v3",
            None => "unknown",
        }
    );
    let f = &boot.features;
    say!(
        Info,
        "PA {} bits, VMID {} bits, stage-2 force-write-back {}, XNX {}, range TLBI {}, CTR.IDC {} DIC {}",
        f.pa_bits,
        if f.vmid16 { 16 } else { 8 },
        f.fwb,
        f.xnx,
        f.tlbi_range,
        f.idc,
        f.dic
    );
    say!(Debug, "RAM {:?}", board.memory.as_slice());
    say!(
        Debug,
        "reserved {:?}, no-map {:?}, firmware's {:?}",
        board.reserved.as_slice(),
        board.no_map.as_slice(),
        board.firmware.as_slice()
    );
}

fn report_cpus(cpus: &[&'static CpuData]) {
    let up = cpus.iter().filter(|cpu| cpu.power.is_alive()).count();
    say!(Info, "{up} of {} CPU(s) at EL2", cpus.len());
}

/// Wipes all RAM that the host gets and that nobody has written since the reset, or that a protected guest could
/// not have had. The tree, which boot reads yet, comes when boot is over.
#[inline(never)] // Its frame would stay on the small stack for as long as its caller's.
fn wipe_remains(boot: &Boot) {
    let board = &boot.board;
    // The last two may not merge with others, as their pages do.
    let mut spared = RangeList::<{ MAX_RESERVED + 2 }>::new();
    let set_aside = board.set_aside.as_slice().iter().copied();
    let loaded = board.chosen.initrd.into_iter().chain([boot.tree_range]);
    for range in set_aside.chain(loaded) {
        if let Err(error) = spared.insert(range, "reserved ranges") {
            fatal(format_args!("{error}"));
        }
    }
    let parts = || {
        let ram = board.memory.as_slice().iter();
        ram.flat_map(|ram| ram.without(spared.as_slice(), boot.el2))
    };
    let total: u64 = parts().map(AddrRange::size).sum();
    say!(
        Warn,
        "memory may hold a protected guest's secrets from before the reset: wiping {} MiB",
        total >> 20
    );
    let (mut said, second) = (regs::ticks(), regs::ticks_per_second());
    overwrite::wipe(&Pages, parts(), |done| {
        if regs::ticks().saturating_sub(said) > second {
            said = regs::ticks();
            say!(Info, "wiped {} of {} MiB", done >> 20, total >> 20);
        }
    });
}

/// Builds the hypervisor and publishes it.
#[inline(never)] // Its frame would stay on the small stack for as long as its caller's.
fn assemble(boot: &Boot, cpus: Vec<&'static CpuData, MAX_CPUS>) -> &'static Hypervisor {
    let words = mem::page_state_words(
        boot.el2.start() + boot.layout.states,
        boot.board.memory.total(),
    );
    let Some(pages) = PageStates::new(boot.board.memory.clone(), words) else {
        fatal(format_args!("page states do not fit"));
    };
    if !pages.transfer(boot.el2, Owner::Host, Owner::Hypervisor) {
        fatal(format_args!("EL2's memory {:?} is not all RAM", boot.el2));
    }
    reserve_no_map(boot, &pages);
    for ram in boot.board.memory.as_slice() {
        let reserved = boot.board.set_aside.as_slice().iter();
        let parts = reserved.filter_map(|range| {
            AddrRange::new(range.start().max(ram.start()), range.end().min(ram.end()))
        });
        parts.for_each(|part| pages.reserve(part));
    }
    let (_, others) = boot.layout.pools(boot.el2.start());
    let parts = others.into_iter().flatten().chain([boot.pool]);
    let pool = frames::create_el2_pool(parts);
    let ram_end = boot
        .board
        .memory
        .as_slice()
        .iter()
        .map(|ram| ram.end())
        .max();
    let smmu = iommu_of(boot).filter(|tree| iommu::check(tree, pool, ram_end.unwrap_or(0)));
    let features = walkable(boot, smmu, pool);
    let mut host = match HostMemory::new(&features, pool, pages.memory(), boot.el2) {
        Ok(host) => host,
        Err(error) => fatal(format_args!("host stage 2: {}", error.reason())),
    };
    let machine = Machine {
        psci: boot.board.psci,
        psci_gives_back: boot.board.psci_gives_back,
        power: boot.board.power,
        entered: boot.entered,
        wipe_at_end: boot.overwrite.then_some(boot.tree_range),
    };
    let gic = PhysicalGic::probe(boot.board.gic.as_ref(), boot.features.gic_sysregs);
    let firmware = boot.board.firmware.as_slice().iter().copied();
    let has_firmware = machine.psci == Some(board::PsciConduit::Smc);
    let id = regs::id_registers();
    let entropy = Entropy::find(id.isar0, has_firmware, boot.board.generator);
    let generator = entropy.as_ref().and_then(Entropy::registers);
    let driven = smmu.map(|tree| tree.registers).into_iter().chain(generator);
    let driven: Vec<AddrRange, 2> = driven.collect();
    let tables = boot.board.gic_tables.iter().copied();
    let devices = gic.private().into_iter().chain(driven.iter().copied());
    for range in devices.chain(tables).chain(firmware) {
        if !host.hide(range) {
            fatal(format_args!("too many ranges to hide from the host"));
        }
    }
    isolate_dma(boot, smmu, pool, &mut host);
    report_gic_tables(&boot.board);
    report_entropy(boot, entropy.as_ref());
    hypervisor::publish(Hypervisor {
        machine,
        features: features.with_controller(boot.board.gic.as_ref()),
        counters: Counters::new(),
        cpus,
        ownership: Ownership::new(pages),
        overwrite: Request::new(boot.layout.copies(boot.el2.start()), boot.overwrite),
        host,
        gic,
        vms: &vm::VMS,
        ids: hardware_ids(&id),
        mitigations: mitigations(has_firmware),
        own_devices: own_devices(boot, &gic, &driven),
        entropy,
    })
}

/// The IOMMU, if the board has one that EL2 tries to drive.
fn iommu_of(boot: &Boot) -> Option<&board::Iommu> {
    boot.board.iommu.as_ref()
}

/// What tables are made for: the CPUs, and the IOMMU that may walk them.
fn walkable(
    boot: &Boot,
    smmu: Option<&board::Iommu>,
    pool: &'static frames::FramePool,
) -> Features {
    let bits = smmu.map_or(u8::MAX, |tree| iommu::output_bits(tree, pool));
    Features {
        pa_bits: boot.features.pa_bits.min(bits),
        ..boot.features
    }
}

/// Puts the host's stage 2 before the DMA of its devices.
#[inline(never)] // Its frame would stay on the small stack for as long as its caller's.
fn isolate_dma(
    boot: &Boot,
    smmu: Option<&board::Iommu>,
    pool: &'static frames::FramePool,
    host: &mut HostMemory,
) {
    let Some(tree) = smmu else {
        say!(
            Warn,
            "DMA is not isolated: there is no SMMUv3 before PCI devices that can be used"
        );
        return;
    };
    match iommu::start(tree, pool, host, &boot.board.doorbells) {
        Ok(()) => say!(Info, "DMA of PCI devices goes through stage 2 (SMMUv3)"),
        Err(error) => say!(Error, "DMA is not isolated: the SMMUv3: {error}"),
    }
    if tree.others > 0 {
        say!(
            Warn,
            "DMA behind {} more SMMU(s) is not isolated",
            tree.others
        );
    }
}

/// Tables of the interrupt controller are past every stage 2: what makes it use them is nobody's.
fn report_gic_tables(board: &Board<'_>) {
    for range in &board.gic_tables {
        log::info!(
            "the host has no ITS, nor message-signalled interrupts by it: {range:?} is hidden"
        );
    }
    if board.gic_tables_left_out > 0 {
        fatal(format_args!(
            "the interrupt controller has too many ITSs to hide"
        ));
    }
}

/// Says where random numbers for guests come from; without a source their calls for some are refused.
fn report_entropy(boot: &Boot, entropy: Option<&Entropy>) {
    let source = match entropy {
        Some(Entropy::Instruction) => "the core's RNDR",
        Some(Entropy::Firmware) => "firmware's TRNG",
        Some(Entropy::Generator(..)) => "the board's RNG200",
        None if boot.board.generator.is_some() => "none, the board's RNG200 does not answer",
        None => "none, this machine has no source",
    };
    say!(Info, "entropy for guests: {source}");
}

/// Memory that firmware says nobody may map is given to nobody. What is firmware's own the host
/// does not reach either: from there it could change what EL2 calls.
fn reserve_no_map(boot: &Boot, pages: &PageStates<'_>) {
    for range in boot.board.no_map.as_slice() {
        for ram in boot.board.memory.as_slice() {
            let (start, end) = (range.start().max(ram.start()), range.end().min(ram.end()));
            if let Some(part) = AddrRange::new(start, end)
                && !pages.transfer(part.grow_to_pages(), Owner::Host, Owner::Firmware)
            {
                say!(
                    Warn,
                    "no-map memory {part:?} overlaps other reserved memory"
                );
            }
        }
    }
}

const fn hardware_ids(id: &IdRegisters) -> HardwareIds {
    HardwareIds {
        pfr0: id.pfr0,
        pfr1: id.pfr1,
        isar0: id.isar0,
        isar1: id.isar1,
        isar2: id.isar2,
        mmfr0: id.mmfr0,
        mmfr1: id.mmfr1,
        mmfr2: id.mmfr2,
    }
}

/// How firmware says that this core stands to the Spectre-class attacks.
fn mitigations(has_firmware: bool) -> Mitigations {
    let ask = |id: u64| {
        let call = u64::from(el2::smc::SMCCC_ARCH_FEATURES_ID);
        let answer = firmware::call(call, [id, 0, 0, 0, 0, 0, 0])[0];
        Mitigation::from_firmware(answer.cast_signed() as i32)
    };
    if !has_firmware {
        return Mitigations::default();
    }
    Mitigations {
        workaround_1: ask(0x8000_8000),
        workaround_2: ask(0x8000_7fff),
        workaround_3: ask(0x8000_3fff),
    }
}

/// Registers that no guest may be given: the interrupt controller's, and those that EL2 uses, `driven`
/// among them.
fn own_devices(boot: &Boot, gic: &PhysicalGic, driven: &[AddrRange]) -> Vec<AddrRange, 16> {
    let power = boot.board.power.map(|Power::BcmPm(base)| base);
    let console = boot.board.console.map(|console| console.base);
    let pages = [power, console].into_iter().flatten();
    let pages = pages.filter_map(|at| AddrRange::with_size(at - at % PAGE_SIZE, PAGE_SIZE));
    let gic = gic.owned().into_iter().flatten();
    let tables = boot.board.gic_tables.iter().copied();
    let regions = gic.chain(driven.iter().copied()).chain(tables);
    regions.map(AddrRange::grow_to_pages).chain(pages).collect()
}

/// Copies the shim and the host's device tree into the host's memory.
#[inline(never)] // Its frame would stay on the small stack for as long as its caller's.
fn load_host(boot: &Boot, hypervisor: &Hypervisor) -> StartOrder {
    let shim = mem::shim();
    let shim_size = el2::layout::image_size(shim)
        .unwrap_or(0)
        .max(shim.len() as u64);
    let shim_size = shim_size.next_multiple_of(PAGE_SIZE);
    let tree_size = (boot.tree_range.size() + TREE_SLACK).next_multiple_of(PAGE_SIZE);
    let mut taken = boot.board.reserved.clone();
    if let Err(error) = taken.insert(boot.el2, "reserved ranges") {
        fatal(format_args!("{error}"));
    }
    let want = Placement {
        size: shim_size + tree_size,
        align: SHIM_ALIGN,
        limit: 1 << boot.features.pa_bits.min(48),
    };
    let Some(range) = highest_free(&boot.board.memory, &taken, want) else {
        fatal(format_args!("{}", BoardError::NoRoom(want.size >> 10)));
    };
    let bytes = mem::host_memory(range);
    let (shim_bytes, tree_bytes) = bytes.split_at_mut(shim_size as usize);
    shim_bytes[..shim.len()].copy_from_slice(shim);
    let alive = hypervisor.cpus.iter().filter(|cpu| cpu.power.is_alive());
    let cpus: Vec<u64, MAX_CPUS> = alive.map(|cpu| cpu.mpidr).collect();
    let host = HostTree {
        el2: resident(boot),
        cpus: &cpus,
        iommu: iommu_of(boot)
            .filter(|iommu| hypervisor.own_devices.contains(&iommu.registers))
            .map(|iommu| iommu.phandle),
        generator: hypervisor.generator().is_some(),
    };
    if let Err(error) = patch_for_host(boot.tree.fdt(), tree_bytes, &host) {
        fatal(format_args!("{error}"));
    }
    mem::clean_invalidate_to_poc(range);
    mem::invalidate_icache();
    say!(
        Debug,
        "host: shim at {:#x}, device tree at {:#x}",
        range.start(),
        range.start() + shim_size
    );
    StartOrder {
        entry: range.start(),
        context: range.start() + shim_size,
    }
}

/// What of EL2's memory stays EL2's.
fn resident(boot: &Boot) -> AddrRange {
    let start = Image::here().boot_end;
    range_or_die(start, boot.el2.end() - start)
}

fn report(boot: &Boot, hypervisor: &Hypervisor) {
    let (image, el2) = (Image::here(), resident(boot));
    say!(
        Info,
        "memory: {} KiB resident at {:#x}..{:#x}, image {} KiB and {} KiB for boot alone, {} table pages in use",
        el2.size() >> 10,
        el2.start(),
        el2.end(),
        (image.end - image.boot_end) >> 10,
        (image.boot_end - image.start) >> 10,
        hypervisor.host.tables_in_use()
    );
    debug_assert_eq!(hypervisor.counters.get(Counter::Hypercalls), 0);
    match hypervisor.gic {
        PhysicalGic::None(why) => say!(Warn, "no guests on this machine: {why}"),
        _ => say!(Debug, "guests: GICv{}", hypervisor.gic.version()),
    }
}
