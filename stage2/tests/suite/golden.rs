//! Raw descriptors, typed by hand from the manuals (Arm ARM D8.3 to D8.6; SDM vol. 3C 29.3.2,
//! and memory-type bytes of EPT leaves).

use stage2::{
    Age, ArmConfig, ArmFeatures, ArmStage2, Combine, ConfigError, Device, EncodeError, Entry, Ept,
    EptConfig, Execute, ForceWriteBack, Granule, LeafAttrs, Level, MemType, Offered, Pa, Perms,
    SwBits, TableFormat, WideAddresses, WordKind,
};

const FULL: ArmFeatures = ArmFeatures {
    fwb: ForceWriteBack::On,
    execute: Execute::Split,
    wide: WideAddresses::Off,
};

fn config(granule: Granule, bits: u8, features: ArmFeatures) -> ArmConfig {
    ArmConfig {
        granule,
        input_bits: bits,
        output_bits: bits,
        features,
        start: None,
    }
}

fn arm(granule: Granule, bits: u8, features: ArmFeatures) -> ArmStage2 {
    ArmStage2::new(&config(granule, bits, features)).expect("a known shape")
}

fn leaf<F: TableFormat>(format: &F, pa: u64, attrs: LeafAttrs, level: Level) -> u64 {
    let entry = Entry::Leaf {
        pa: Pa::new(pa),
        attrs,
    };
    let raw = format.encode(&entry, level).expect("can be said");
    assert_eq!(format.decode(raw, level), entry);
    raw
}

#[test]
fn arm_pages_and_blocks() {
    let v8 = arm(Granule::K4, 40, ArmFeatures::V8_0);
    let normal = LeafAttrs::normal(Perms::RWX);
    assert_eq!(
        leaf(&v8, 0x12_3456_7000, normal, Level::PAGE),
        0x0000_0012_3456_77ff
    );
    assert_eq!(
        leaf(&v8, 0x12_3460_0000, normal, Level::L2),
        0x0000_0012_3460_07fd
    );
    assert_eq!(
        leaf(&v8, 0x12_4000_0000, normal, Level::L1),
        0x0000_0012_4000_07fd
    );
    let data = LeafAttrs::normal(Perms::RW);
    assert_eq!(leaf(&v8, 0, data, Level::PAGE), 0x0040_0000_0000_07ff);
    let device = LeafAttrs::device(Perms::RW);
    assert_eq!(
        leaf(&v8, 0x900_0000, device, Level::PAGE),
        0x0040_0000_0900_04c7
    );
    let read_old = LeafAttrs::normal(Perms::READ).with_age(Age::Old);
    assert_eq!(leaf(&v8, 0, read_old, Level::PAGE), 0x0040_0000_0000_037f);
    let marked = normal.with_sw(SwBits::try_new(0b1010).expect("four bits"));
    assert_eq!(leaf(&v8, 0, marked, Level::PAGE), 0x0500_0000_0000_07ff);
}

#[test]
fn arm_memory_types_with_and_without_forced_write_back() {
    let (v8, fwb) = (
        arm(Granule::K4, 40, ArmFeatures::V8_0),
        arm(Granule::K4, 40, FULL),
    );
    let field = |format: &ArmStage2, mem, combine| {
        let attrs = LeafAttrs::new(Perms::RW, mem, combine);
        format.encode_attrs(&attrs).map(|raw| raw >> 2 & 0xf)
    };
    let honour = Combine::HonourGuest;
    assert_eq!(field(&v8, MemType::WriteBack, honour), Ok(0b1111));
    assert_eq!(field(&v8, MemType::WriteThrough, honour), Ok(0b1010));
    assert_eq!(field(&v8, MemType::NonCacheable, honour), Ok(0b0101));
    assert_eq!(field(&fwb, MemType::WriteBack, honour), Ok(0b0111));
    assert_eq!(
        field(&fwb, MemType::WriteBack, Combine::ForceStage2),
        Ok(0b0110)
    );
    assert_eq!(field(&fwb, MemType::NonCacheable, honour), Ok(0b0101));
    for (number, device) in [Device::NGnRnE, Device::NGnRE, Device::NGRE, Device::GRE]
        .into_iter()
        .enumerate()
    {
        assert_eq!(
            field(&v8, MemType::Device(device), honour),
            Ok(number as u64)
        );
        assert_eq!(
            field(&fwb, MemType::Device(device), honour),
            Ok(number as u64)
        );
    }
    let unsupported = |mem| Err(EncodeError::UnsupportedType(mem));
    assert_eq!(
        field(&fwb, MemType::WriteThrough, honour),
        unsupported(MemType::WriteThrough)
    );
    assert_eq!(
        field(&v8, MemType::Uncached, honour),
        unsupported(MemType::Uncached)
    );
    let cannot = EncodeError::CannotCombine(MemType::WriteBack, Combine::ForceStage2);
    assert_eq!(
        field(&v8, MemType::WriteBack, Combine::ForceStage2),
        Err(cannot)
    );
}

#[test]
fn arm_execution_with_and_without_split() {
    let (v8, xnx) = (
        arm(Granule::K4, 40, ArmFeatures::V8_0),
        arm(Granule::K4, 40, FULL),
    );
    let field = |format: &ArmStage2, perms| {
        format
            .encode_attrs(&LeafAttrs::normal(perms))
            .map(|raw| raw >> 53 & 3)
    };
    let (kernel, user) = (
        Perms::READ | Perms::EXEC_KERNEL,
        Perms::READ | Perms::EXEC_USER,
    );
    assert_eq!(field(&xnx, Perms::RWX), Ok(0b00));
    assert_eq!(field(&xnx, user), Ok(0b01));
    assert_eq!(field(&xnx, Perms::RW), Ok(0b10));
    assert_eq!(field(&xnx, kernel), Ok(0b11));
    assert_eq!(field(&v8, Perms::RWX), Ok(0b00));
    assert_eq!(field(&v8, Perms::RW), Ok(0b10));
    assert_eq!(field(&v8, user), Err(EncodeError::UnsupportedPerms(user)));
    assert_eq!(
        field(&v8, kernel),
        Err(EncodeError::UnsupportedPerms(kernel))
    );
}

#[test]
fn what_the_architecture_forbids_is_refused() {
    let v8 = arm(Granule::K4, 40, ArmFeatures::V8_0);
    let refused = |mem| {
        v8.encode_attrs(&LeafAttrs::new(Perms::RWX, mem, Combine::HonourGuest))
            .unwrap_err()
    };
    let device = MemType::Device(Device::GRE);
    assert_eq!(refused(device), EncodeError::ExecutableDevice(Device::GRE));
    assert_eq!(
        refused(MemType::NonCacheable),
        EncodeError::ExecutableNonCacheable
    );
    let attrs = LeafAttrs::normal(Perms::RW);
    let at = |pa, level| {
        v8.encode(
            &Entry::Leaf {
                pa: Pa::new(pa),
                attrs,
            },
            level,
        )
        .unwrap_err()
    };
    let (pa, level) = (Pa::new(0x1000), Level::L2);
    assert_eq!(at(0x1000, level), EncodeError::Misaligned { pa, level });
    assert_eq!(at(0, Level::L0), EncodeError::NoLeafAt(Level::L0));
    let far = EncodeError::OutOfRange {
        pa: Pa::new(1 << 40),
        bits: 40,
    };
    assert_eq!(at(1 << 40, Level::PAGE), far);
    let table = |level| v8.encode(&Entry::Table(Pa::new(0x1000)), level);
    assert_eq!(table(Level::L2), Ok(0x1003));
    assert_eq!(table(Level::PAGE), Err(EncodeError::NoTableAt(Level::PAGE)));
}

#[test]
fn high_address_bits_go_where_each_granule_keeps_them() {
    let wide = ArmFeatures {
        wide: WideAddresses::On,
        ..ArmFeatures::V8_0
    };
    let normal = LeafAttrs::normal(Perms::RWX);
    let high = 0xf_ffff_ffff_0000;
    let lpa2 = arm(Granule::K4, 52, wide);
    assert_eq!(
        leaf(&lpa2, 0xf_ffff_ffff_f000, normal, Level::PAGE),
        0x0003_ffff_ffff_f7ff
    );
    assert_eq!(leaf(&lpa2, 0x8_0000_0000_0000, normal, Level::PAGE), 0x6ff);
    let lpa2_16 = arm(Granule::K16, 52, wide);
    assert_eq!(
        leaf(&lpa2_16, high, normal, Level::PAGE),
        0x0003_ffff_ffff_07ff
    );
    let lpa = arm(Granule::K64, 52, ArmFeatures::V8_0);
    assert_eq!(leaf(&lpa, high, normal, Level::PAGE), 0x0000_ffff_ffff_f7ff);
    let table = Entry::Table(Pa::new(high));
    assert_eq!(lpa.encode(&table, Level::L2), Ok(0x0000_ffff_ffff_f003));
    assert_eq!(lpa.decode(0x0000_ffff_ffff_f003, Level::L2), table);
}

#[test]
fn registers_for_each_start_level() {
    let start = |granule, bits, features| {
        let format = arm(granule, bits, features);
        let shape = format.geometry();
        let start = shape.start_level().number();
        (
            start,
            shape.root_tables(),
            format.t0sz(),
            format.sl0(),
            format.sl2(),
            format.tg0(),
        )
    };
    let v8 = ArmFeatures::V8_0;
    let wide = ArmFeatures {
        wide: WideAddresses::On,
        ..v8
    };
    assert_eq!(start(Granule::K4, 32, v8), (2, 4, 32, 0, 0, 0));
    assert_eq!(start(Granule::K4, 36, v8), (1, 1, 28, 1, 0, 0));
    assert_eq!(start(Granule::K4, 40, v8), (1, 2, 24, 1, 0, 0));
    assert_eq!(start(Granule::K4, 44, v8), (0, 1, 20, 2, 0, 0));
    assert_eq!(start(Granule::K4, 48, v8), (0, 1, 16, 2, 0, 0));
    assert_eq!(start(Granule::K4, 52, wide), (0, 16, 12, 2, 0, 0));
    assert_eq!(start(Granule::K16, 40, v8), (2, 16, 24, 1, 0, 2));
    assert_eq!(start(Granule::K16, 48, v8), (1, 2, 16, 2, 0, 2));
    assert_eq!(start(Granule::K64, 40, v8), (2, 1, 24, 1, 0, 1));
    assert_eq!(start(Granule::K64, 48, v8), (1, 1, 16, 2, 0, 1));
    let five = ArmConfig {
        start: Some(Level::MINUS_1),
        ..config(Granule::K4, 52, wide)
    };
    let five = ArmStage2::new(&five).expect("LPA2 has five levels");
    assert_eq!((five.sl0(), five.sl2(), five.ds(), five.ps()), (0, 1, 1, 6));
}

/// VTCR_EL2.PS: 32, 36, 40, 42, 44, 48 and 52 bits.
#[test]
fn the_output_size_is_the_next_that_the_register_can_say() {
    let ps = |output_bits| {
        let config = ArmConfig {
            output_bits,
            ..config(Granule::K64, 32, ArmFeatures::V8_0)
        };
        ArmStage2::new(&config).expect("a valid size").ps()
    };
    let sizes = [
        (32, 0),
        (33, 1),
        (36, 1),
        (37, 2),
        (40, 2),
        (41, 3),
        (42, 3),
        (43, 4),
        (44, 4),
        (45, 5),
        (48, 5),
        (49, 6),
        (52, 6),
    ];
    for (bits, expected) in sizes {
        assert_eq!(ps(bits), expected, "{bits} bits");
    }
}

/// Arm ARM D8.3: bits 1:0 = 01 is a block, and reserved at level 3.
#[test]
fn a_block_descriptor_at_the_page_level_is_invalid() {
    let format = ArmStage2::new(&config(Granule::K4, 40, ArmFeatures::V8_0)).expect("valid");
    assert_eq!(format.kind(0x4000_0001, Level::PAGE), WordKind::Invalid);
    assert_eq!(format.kind(0x4000_0003, Level::PAGE), WordKind::Leaf);
    assert_eq!(format.kind(0x4000_0001, Level::L2), WordKind::Leaf);
    assert_eq!(format.kind(0x4000_0003, Level::L2), WordKind::Table);
    assert_eq!(format.kind(0x4000_0002, Level::L2), WordKind::Invalid);
}

#[test]
fn contradictions_are_refused() {
    let refused = |config: ArmConfig| ArmStage2::new(&config).unwrap_err();
    let v8 = ArmFeatures::V8_0;
    let base = config(Granule::K4, 40, v8);
    let five = ArmConfig {
        start: Some(Level::MINUS_1),
        ..base
    };
    assert_eq!(refused(five), ConfigError::StartLevel(Level::MINUS_1));
    let short = ArmConfig {
        start: Some(Level::L2),
        ..base
    };
    assert_eq!(refused(short), ConfigError::StartLevel(Level::L2));
    assert_eq!(
        refused(config(Granule::K4, 52, v8)),
        ConfigError::OutputBits(52)
    );
    assert_eq!(
        refused(config(Granule::K4, 31, v8)),
        ConfigError::OutputBits(31)
    );
    let narrow = ArmConfig {
        output_bits: 36,
        ..base
    };
    assert_eq!(
        refused(narrow),
        ConfigError::InputBeyondOutput {
            input: 40,
            output: 36
        }
    );
    let zero = ArmConfig {
        start: Some(Level::L0),
        ..config(Granule::K16, 48, v8)
    };
    assert_eq!(refused(zero), ConfigError::StartLevel(Level::L0));
}

#[test]
fn blocks_stand_only_where_the_architecture_has_them() {
    let levels = |format: &ArmStage2| {
        [Level::L0, Level::L1, Level::L2, Level::PAGE].map(|level| format.supports_leaf(level))
    };
    let v8 = ArmFeatures::V8_0;
    let wide = ArmFeatures {
        wide: WideAddresses::On,
        ..v8
    };
    assert_eq!(levels(&arm(Granule::K4, 48, v8)), [false, true, true, true]);
    assert_eq!(
        levels(&arm(Granule::K4, 52, wide)),
        [true, true, true, true]
    );
    assert_eq!(
        levels(&arm(Granule::K16, 48, v8)),
        [false, false, true, true]
    );
    assert_eq!(
        levels(&arm(Granule::K16, 52, wide)),
        [false, true, true, true]
    );
    assert_eq!(
        levels(&arm(Granule::K64, 48, v8)),
        [false, false, true, true]
    );
    assert_eq!(
        levels(&arm(Granule::K64, 52, v8)),
        [false, true, true, true]
    );
}

fn ept(access_dirty: Offered) -> Ept {
    let (execute_only, gigabyte) = (Offered::No, Offered::Yes);
    Ept::new(&EptConfig {
        output_bits: 46,
        execute_only,
        gigabyte,
        access_dirty,
    })
    .expect("valid")
}

#[test]
fn ept_leaves_have_the_known_low_bytes() {
    let ept = ept(Offered::No);
    let low = |mem, combine| {
        let attrs = LeafAttrs::new(Perms::RWX, mem, combine);
        leaf(&ept, 0x1234_5000, attrs, Level::PAGE)
    };
    let (honour, force) = (Combine::HonourGuest, Combine::ForceStage2);
    assert_eq!(low(MemType::WriteBack, force), 0x1234_5077);
    assert_eq!(low(MemType::WriteBack, honour), 0x1234_5037);
    assert_eq!(low(MemType::Uncached, force), 0x1234_5047);
    assert_eq!(low(MemType::Uncached, honour), 0x1234_5007);
    assert_eq!(low(MemType::NonCacheable, honour), 0x1234_500f);
    assert_eq!(low(MemType::WriteThrough, honour), 0x1234_5027);
    assert_eq!(low(MemType::WriteProtected, honour), 0x1234_502f);
    let block = LeafAttrs::normal(Perms::RW);
    assert_eq!(leaf(&ept, 0x4000_0000, block, Level::L1), 0x4000_00b3);
    assert_eq!(
        ept.encode(&Entry::Table(Pa::new(0x5000)), Level::L0),
        Ok(0x5007)
    );
    assert_eq!(ept.pointer(Pa::new(0x7000)), 0x701e);
}

#[test]
fn ept_flags_and_refusals() {
    let (flags, none) = (ept(Offered::Yes), ept(Offered::No));
    let old = LeafAttrs::normal(Perms::RW).with_age(Age::Old);
    assert_eq!(leaf(&flags, 0, old, Level::PAGE), 0x33);
    assert_eq!(
        leaf(&flags, 0, old.with_age(Age::Young), Level::PAGE),
        0x133
    );
    assert_eq!(none.encode_attrs(&old), Err(EncodeError::NoAccessFlag));
    assert_eq!(flags.pointer(Pa::new(0x7000)), 0x705e);
    for perms in [
        Perms::empty(),
        Perms::WRITE,
        Perms::EXEC,
        Perms::READ | Perms::EXEC_USER,
    ] {
        let refused = Err(EncodeError::UnsupportedPerms(perms));
        assert_eq!(none.encode_attrs(&LeafAttrs::normal(perms)), refused);
    }
    let device = LeafAttrs::device(Perms::RW);
    assert!(matches!(
        none.encode_attrs(&device),
        Err(EncodeError::UnsupportedType(_))
    ));
    assert!(!none.supports_leaf(Level::L0));
}

#[test]
fn a_raw_word_of_any_bits_decodes() {
    let formats = [
        arm(Granule::K4, 48, FULL),
        arm(Granule::K64, 52, ArmFeatures::V8_0),
    ];
    let mut raw = 1u64;
    for _ in 0..20_000 {
        raw ^= raw << 13;
        raw ^= raw >> 7;
        raw ^= raw << 17;
        for level in [Level::L1, Level::L2, Level::PAGE] {
            for format in &formats {
                let _ = format.decode(raw, level);
                let leaf = format.decode_attrs(raw);
                assert_eq!(format.maintenance(raw), leaf.maintenance(), "{raw:#x}");
            }
            let _ = ept(Offered::Yes).decode(raw, level);
        }
    }
}

const TYPES: [MemType; 9] = [
    MemType::WriteBack,
    MemType::WriteThrough,
    MemType::WriteProtected,
    MemType::NonCacheable,
    MemType::Uncached,
    MemType::Device(Device::NGnRnE),
    MemType::Device(Device::NGnRE),
    MemType::Device(Device::NGRE),
    MemType::Device(Device::GRE),
];

/// Every combination of what a leaf can say.
fn all_attrs() -> impl Iterator<Item = LeafAttrs> {
    let perms = (0..16).map(Perms::from_bits_retain);
    perms.flat_map(|perms| {
        TYPES.into_iter().flat_map(move |mem| {
            [Combine::HonourGuest, Combine::ForceStage2]
                .into_iter()
                .flat_map(move |combine| {
                    [Age::Young, Age::Old].map(|age| {
                        let sw = SwBits::try_new(perms.bits() ^ 0b1001).expect("four bits");
                        LeafAttrs::new(perms, mem, combine)
                            .with_age(age)
                            .with_sw(sw)
                    })
                })
        })
    })
}

/// Returns how many of all combinations can be said. Reads back what each says, owes what it
/// owes, and lets a walk tell tables from leaves.
fn sayable<F: TableFormat>(format: &F, table: u64) -> usize {
    let mut said = 0;
    for attrs in all_attrs() {
        let owing = format.encode_owing(&attrs);
        assert_eq!(owing.map(|(raw, _)| raw), format.encode_attrs(&attrs));
        let Ok((word, owed)) = owing else { continue };
        said += 1;
        assert_eq!(owed, attrs.maintenance());
        for level in [Level::PAGE, Level::L2] {
            let pa = Pa::new(format.geometry().slot_size(level) * 3);
            let raw = format.leaf_word(word, pa, level);
            let entry = Entry::Leaf { pa, attrs };
            assert_eq!(format.decode(raw, level), entry);
            assert_eq!(format.attrs_word(raw, level), word);
            assert_eq!(format.maintenance(raw), owed);
            assert!(level.is_page() || format.plain_table(raw).is_none());
        }
    }
    let word = format.table_word(Pa::new(table));
    assert_eq!(format.plain_table(word), Some(Pa::new(table)));
    assert_eq!(format.plain_table(0), None);
    said
}

#[test]
fn all_that_can_be_said_reads_back_and_owes_what_it_should() {
    let table = 0x12_3456_0000;
    let joint = ArmFeatures {
        execute: Execute::Joint,
        ..FULL
    };
    let split = ArmFeatures {
        execute: Execute::Split,
        ..ArmFeatures::V8_0
    };
    let wide = ArmFeatures {
        wide: WideAddresses::On,
        ..FULL
    };
    // Types times permissions times ages: those that may be fetched, and those that may not.
    let arm = |granule, bits, features| sayable(&arm(granule, bits, features), table);
    assert_eq!(arm(Granule::K4, 40, ArmFeatures::V8_0), 2 * (2 * 8 + 5 * 4));
    assert_eq!(arm(Granule::K4, 40, split), 2 * (2 * 16 + 5 * 4));
    assert_eq!(arm(Granule::K16, 40, joint), 2 * (2 * 8 + 5 * 4));
    assert_eq!(arm(Granule::K64, 52, FULL), 2 * (2 * 16 + 5 * 4));
    assert_eq!(arm(Granule::K4, 52, wide), 2 * (2 * 16 + 5 * 4));
    let ept = |offered| {
        let format = Ept::new(&EptConfig {
            output_bits: 46,
            execute_only: offered,
            gigabyte: offered,
            access_dirty: offered,
        });
        sayable(&format.expect("a known shape"), table)
    };
    // Five types, honoured and forced: R, RW, RX, RWX, and X where it is offered.
    assert_eq!(ept(Offered::No), 5 * 2 * 4);
    assert_eq!(ept(Offered::Yes), 5 * 2 * 5 * 2);
}

/// A table whose address has high bits elsewhere is not plain, and is one all the same.
#[test]
fn tables_with_high_addresses_are_found_the_long_way() {
    let wide = ArmFeatures {
        wide: WideAddresses::On,
        ..FULL
    };
    for (granule, features, pa) in [
        (Granule::K4, wide, 1 << 50),
        (Granule::K16, wide, 3 << 50),
        (Granule::K64, FULL, 1 << 48),
    ] {
        let format = arm(granule, 52, features);
        let word = format.table_word(Pa::new(pa));
        assert_eq!(format.plain_table(word), None);
        assert_eq!(format.decode(word, Level::L2), Entry::Table(Pa::new(pa)));
    }
}
