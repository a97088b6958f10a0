//! Whole exits of a guest: any exception, any registers, on a vCPU without a machine whose VM is made of the
//! library's own objects. What must become of each is worked out anew by [`oracle`], from the manual's
//! numbers.

mod check;
mod input;
mod oracle;

use std::collections::BTreeSet;
use std::ops::Range;

use abi::Exit;
use arbitrary::{Result, Unstructured};
use el2::exits::testing::{Did, FakeVcpu, FakeVm, Ground, OWNED_PAGES, RAM, Shape, TAKEN_PAGE};
use el2::exits::{Next, flush, handle};
use el2::vgic::GicVersion;
use oracle::{Before, Fate};

const PAGE: u64 = 4096;

/// What a guest has done that counts for its later exits.
struct Known {
    /// Pages of RAM that are a protected guest's.
    owned: BTreeSet<u64>,
    /// It says where its devices are.
    enrolled: bool,
    /// What it has said, in order: which pages, and whether they are named or forgotten.
    told: Vec<(Range<u64>, bool)>,
    /// Tables are there.
    tables: bool,
}

/// Runs one input.
pub(crate) fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(shape) = shape(&mut input) else { return };
    let ground = Ground::new();
    let ownership = ground.ownership();
    let vm = FakeVm::new(&ground, &ownership, shape);
    let mut vcpu = FakeVcpu::new(&vm, 0);
    if shape.vcpus > 1 {
        enable_sgis(&vm);
    }
    let mut known = Known {
        owned: (0..OWNED_PAGES)
            .filter(|page| *page != TAKEN_PAGE)
            .collect(),
        enrolled: false,
        told: Vec::new(),
        tables: true,
    };
    while !input.is_empty() {
        if step(&mut input, &mut vcpu, &mut known).is_err() {
            break;
        }
    }
    assert_eq!(vm.violations(), Vec::<String>::new());
}

/// All vCPUs take SGIs: of group 1 with a GICv3.
fn enable_sgis(vm: &FakeVm<'_>) {
    let _kicks = vm.vgic.dist_write(0, 0, 4, 3);
    for vcpu in 0..vm.shape.vcpus.into() {
        let _kicks = match vm.shape.gic {
            GicVersion::V2 => vm.vgic.dist_write(vcpu, 0x100, 4, 0xffff),
            GicVersion::V3 => {
                let _kicks = vm.vgic.redist_write(vcpu, 0x1_0080, 4, 0xffff_ffff);
                vm.vgic.redist_write(vcpu, 0x1_0100, 4, 0xffff)
            }
        };
    }
}

fn shape(input: &mut Unstructured<'_>) -> Result<Shape> {
    Ok(Shape {
        protected: input.arbitrary()?,
        gic: *input.choose(&[GicVersion::V2, GicVersion::V3])?,
        vcpus: input.int_in_range(1..=8)?,
    })
}

fn step(
    input: &mut Unstructured<'_>,
    vcpu: &mut FakeVcpu<'_, '_>,
    known: &mut Known,
) -> Result<()> {
    match input.int_in_range(0..=15u8)? {
        0 => surroundings(input, vcpu, known),
        1 => asynchronous(input, vcpu),
        2..=3 => register(input, vcpu),
        4..=6 => call(input, vcpu, known),
        7 => other(input, vcpu),
        _ => abort(input, vcpu, known),
    }
}

/// What the host, devices and other vCPUs do meanwhile.
fn surroundings(
    input: &mut Unstructured<'_>,
    vcpu: &mut FakeVcpu<'_, '_>,
    known: &mut Known,
) -> Result<()> {
    known.tables = !input.ratio(1, 8u8)?;
    vcpu.vm
        .allow_tables(if known.tables { None } else { Some(0) });
    vcpu.lines = input::lines(input)?;
    vcpu.waits_here = input.arbitrary()?;
    vcpu.now = input.arbitrary::<u16>()?.into();
    vcpu.virtual_deadline = input.arbitrary()?;
    let intid = input.int_in_range(32..=40)?;
    let _kicks = vcpu.vm.vgic.set_spi(intid, input.arbitrary()?);
    Ok(())
}

/// Before an exit the guest was anywhere, with anything in its registers.
fn prepare(input: &mut Unstructured<'_>, vcpu: &mut FakeVcpu<'_, '_>) -> Result<()> {
    let seed: u64 = input.arbitrary()?;
    for (n, register) in (0..).zip(&mut vcpu.registers.0) {
        *register = seed.rotate_left(n).wrapping_add(n.into());
    }
    // EL1 with its own stack pointer, EL0, EL1 with the other one; AArch32 at EL0, with and without T.
    vcpu.pstate = *input.choose(&[0x5, 0x5, 0x0, 0x4, 0x10, 0x30])?;
    vcpu.pc = input.arbitrary::<u32>()?.into();
    vcpu.el1.vbar = u64::from(input.arbitrary::<u8>()?) << 11;
    vcpu.exit = None;
    let _did = vcpu.take_did();
    Ok(())
}

fn abort(
    input: &mut Unstructured<'_>,
    vcpu: &mut FakeVcpu<'_, '_>,
    known: &mut Known,
) -> Result<()> {
    prepare(input, vcpu)?;
    let (esr, ipa) = (input::abort(input)?, input::ipa(input)?);
    vcpu.esr = esr;
    // Only the IPA's own bits are where the architecture has them; all others are anything.
    vcpu.far = input.arbitrary::<u64>()? & !0xfff | ipa & 0xfff;
    let page = (ipa >> 12 << 4) & 0xfff_ffff_fff0;
    vcpu.hpfar = page | input.arbitrary::<u64>()? & !0xfff_ffff_fff0;
    vcpu.stage1 = (!input.ratio(1, 8u8)?).then_some(ipa & !0xfff);
    let before = Before::new(vcpu);
    let fate = oracle::of_abort(&before, vcpu, known);
    let next = handle(vcpu, input::vector(&before));
    check::check(&before, vcpu, next, &fate);
    if let Fate::Load { rt, size, .. } = fate {
        let value = input.arbitrary()?;
        vcpu.complete(value);
        let expected = oracle::loaded(&before, size, value);
        check::completed(&before, vcpu, rt, expected);
    }
    Ok(())
}

fn register(input: &mut Unstructured<'_>, vcpu: &mut FakeVcpu<'_, '_>) -> Result<()> {
    prepare(input, vcpu)?;
    // Nobody makes a system register's trap from AArch32.
    vcpu.pstate &= !0x30;
    vcpu.esr = 0x18 << 26 | 1 << 25 | u64::from(input::register(input)?);
    if vcpu.registers.0[0] & 1 == 0 {
        // An SGI for some vCPUs; caches that come and go.
        vcpu.registers
            .0
            .iter_mut()
            .for_each(|value| *value &= 0x0f00_00ff);
    }
    let before = Before::new(vcpu);
    let next = handle(vcpu, input::vector(&before));
    check::register(&before, vcpu, next);
    // What it leaves is done when it runs on.
    let pending = core::mem::take(&mut vcpu.lines.pending);
    assert_eq!(flush(vcpu), Next::Resume);
    vcpu.lines.pending = pending;
    Ok(())
}

fn call(
    input: &mut Unstructured<'_>,
    vcpu: &mut FakeVcpu<'_, '_>,
    known: &mut Known,
) -> Result<()> {
    prepare(input, vcpu)?;
    vcpu.pstate &= !0x30;
    vcpu.registers.answer(input::call(input)?);
    vcpu.esr = 0x16 << 26 | 1 << 25 | u64::from(input.ratio(1, 32u8)?);
    vcpu.attributes = input.arbitrary()?;
    let before = Before::new(vcpu);
    let next = handle(vcpu, input::vector(&before));
    check::call(&before, vcpu, next);
    if next == Next::Resume {
        learn(&before, vcpu, known);
    }
    if let Some(Exit::VcpuOff | Exit::SystemOff | Exit::SystemReset { .. }) = vcpu.exit {
        vcpu.vm.start();
    }
    Ok(())
}

/// Remembers what a call that has succeeded says about pages.
fn learn(before: &Before, vcpu: &FakeVcpu<'_, '_>, known: &mut Known) {
    let [id, ipa, ..] = before.registers.0;
    let [0, moved, ..] = vcpu.registers.0 else {
        return;
    };
    if !vcpu.vm.shape.protected || before.esr & 0xffff != 0 {
        return;
    }
    let pages = |count: u64| ipa / PAGE..(ipa / PAGE).saturating_add(count);
    match id {
        0xc600_0006 => known.enrolled = true,
        0xc600_0007 => known.told.push((pages(1), true)),
        0xc600_000a => known.told.push((pages(moved), true)),
        0xc600_0008 | 0xc600_000b => known.told.push((pages(moved), false)),
        0xc600_0009 => {
            let first = (ipa - RAM) / PAGE;
            known
                .owned
                .retain(|page| !(first..first + moved).contains(page));
        }
        _ => {}
    }
}

/// WFI, the first use of FP, and classes that mean nothing.
fn other(input: &mut Unstructured<'_>, vcpu: &mut FakeVcpu<'_, '_>) -> Result<()> {
    prepare(input, vcpu)?;
    let class = match input.int_in_range(0..=3u8)? {
        0 => 0x01,
        1 => 0x07,
        _ => input.int_in_range(0..=0x3fu64)?,
    };
    if matches!(class, 0x16 | 0x18 | 0x20 | 0x24) {
        return Ok(());
    }
    vcpu.esr = class << 26 | u64::from(input.arbitrary::<u32>()? & 0x3ff_ffff);
    let before = Before::new(vcpu);
    let next = handle(vcpu, input::vector(&before));
    match class {
        0x01 => check::wait(&before, vcpu, next),
        0x07 => {
            check::check(&before, vcpu, next, &Fate::Again);
            assert_eq!(before.did(vcpu), [Did::LendFp]);
        }
        _ => check::check(&before, vcpu, next, &Fate::Undefined),
    }
    Ok(())
}

fn asynchronous(input: &mut Unstructured<'_>, vcpu: &mut FakeVcpu<'_, '_>) -> Result<()> {
    prepare(input, vcpu)?;
    let kind = input.int_in_range(1..=3u64)?;
    let before = Before::new(vcpu);
    let next = handle(vcpu, input::vector(&before) | kind);
    check::asynchronous(&before, vcpu, next, kind);
    Ok(())
}
