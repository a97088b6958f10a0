//! Roots lent to importers: what is refused, who is told.

#![expect(clippy::unwrap_used, reason = "a step that cannot be done fails")]

use std::sync::Mutex;

use stage2::{
    EncodeError, ExportError, FaultRequest, Importer, InvalidateListener, Ipa, IpaRange, Level,
    MapError, MapRequest, Pa, Perms, SwBits,
};

use crate::kit::*;

/// An importer that writes down what it is told.
#[derive(Default)]
struct Device(Mutex<Vec<IpaRange>>);

impl InvalidateListener for Device {
    fn invalidate(&self, range: IpaRange) {
        self.0.lock().unwrap().push(range);
    }
}

impl Device {
    fn leaked() -> &'static Self {
        Box::leak(Box::default())
    }

    fn told(&self) -> Vec<IpaRange> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// A walker that can do all that the tests' tables ask for.
fn importer(listener: &'static Device) -> Importer {
    Importer {
        listener,
        must_be_zero: 0,
        output_bits: 40,
        coarsest_leaf: Level::L1,
    }
}

/// A software bit of Arm descriptors.
const MARK: u64 = 1 << 55;

#[test]
fn the_exported_root_says_what_a_walker_must_know() {
    let machine = machine(8);
    let mut space = space(&machine);
    let root = space.export(MARK).unwrap();
    let meta = root.meta();
    assert_eq!(meta.root, space.root());
    assert_eq!(meta.geometry, *space.geometry());
    assert_eq!((meta.output_bits, meta.coarsest_leaf), (40, Level::L1));
    assert_eq!(meta.reserved_bits, MARK);
    assert!(space.unexport(root).is_ok());
}

#[test]
fn a_root_is_exported_once() {
    let machine = machine(8);
    let mut space = space(&machine);
    let root = space.export(0).unwrap();
    assert_eq!(space.export(0).unwrap_err(), ExportError::Busy);
    assert!(space.unexport(root).is_ok());
    let again = space.export(0).unwrap();
    assert!(space.unexport(again).is_ok());
}

#[test]
fn bits_that_are_needed_or_in_use_cannot_be_reserved() {
    let machine = machine(8);
    let mut space = space(&machine);
    assert_eq!(space.export(0b11).unwrap_err(), ExportError::NeededBits(3));
    map(&mut space, 0x8000_0000, 2 * PAGE, 0);
    let flag = 1 << 10;
    let taken = ExportError::InUse(0x8000_0000);
    assert_eq!(space.export(flag).unwrap_err(), taken);
    let root = space.export(MARK).unwrap();
    assert!(space.unexport(root).is_ok());
}

#[test]
fn nothing_gets_a_reserved_bit_while_the_root_is_exported() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, GIB, PAGE, GIB);
    let not_readable = LeafRequest::marked(0);
    let root = space.export(MARK).unwrap();
    let clash = EncodeError::ReservedByImporter(MARK);
    assert_eq!(space.map(&not_readable), Err(MapError::Encode(clash)));
    let window = range(0, PAGE);
    let fault = FaultRequest::new(window.start(), window, Pa::new(0), not_readable.attrs);
    assert_eq!(space.fault(&fault), Err(MapError::Encode(clash)));
    assert_eq!(mapped(&machine), [(GIB, 3, GIB)]);
    assert!(space.unexport(root).is_ok());
    assert!(space.map(&not_readable).is_ok());
    assert_clean(&machine);
}

/// Requests for a leaf with the marking software bit.
struct LeafRequest;

impl LeafRequest {
    fn marked(ipa: u64) -> stage2::MapRequest {
        let marked = normal().with_sw(stage2::SwBits::try_new(1).unwrap());
        stage2::MapRequest {
            attrs: marked,
            ..request(ipa, PAGE, ipa)
        }
    }
}

#[test]
fn output_and_block_bits_are_reserved_too() {
    let machine = machine(8);
    let mut space = space(&machine);
    let high = 1 << 39;
    let root = space.export(high).unwrap();
    let clash = MapError::Encode(EncodeError::ReservedByImporter(high));
    let far = request(0, 2 * PAGE, (1 << 39) - PAGE);
    assert_eq!(space.map(&far), Err(clash));
    assert!(space.map(&request(0, PAGE, (1 << 39) - PAGE)).is_ok());
    let permission = space.relax_perms(Ipa::new(0), Perms::EXEC);
    assert!(permission.is_ok());
    assert!(space.unexport(root).is_ok());
}

#[test]
fn a_walker_that_cannot_do_what_the_table_holds_is_refused() {
    let machine = machine(8);
    let mut space = space(&machine);
    let root = space.export(MARK).unwrap();
    let device = Device::leaked();
    let refused = |importer| space.register(&root, importer).unwrap_err();
    let strict = Importer {
        must_be_zero: MARK | 1 << 56,
        ..importer(device)
    };
    assert_eq!(refused(strict), ExportError::NotPromised(1 << 56));
    let narrow = Importer {
        output_bits: 39,
        ..importer(device)
    };
    assert_eq!(refused(narrow), ExportError::TooWide(40));
    let fine = Importer {
        coarsest_leaf: Level::L2,
        ..importer(device)
    };
    assert_eq!(refused(fine), ExportError::LargeLeaf(Level::L1));
    assert_eq!(space.unregister(device), Err(ExportError::Unknown));
    let exact = Importer {
        must_be_zero: MARK,
        ..importer(device)
    };
    assert_eq!(space.register(&root, exact), Ok(()));
    assert_eq!(refused(exact), ExportError::Busy);
    assert_eq!(space.unregister(device), Ok(()));
    assert!(space.unexport(root).is_ok());
}

#[test]
fn there_is_room_for_four_importers() {
    let machine = machine(8);
    let mut space = space(&machine);
    let root = space.export(0).unwrap();
    let devices = [(); 5].map(|()| Device::leaked());
    for device in &devices[..4] {
        assert_eq!(space.register(&root, importer(device)), Ok(()));
    }
    let fifth = importer(devices[4]);
    assert_eq!(space.register(&root, fifth), Err(ExportError::Full));
    let (root, left) = space.unexport(root).unwrap_err();
    assert_eq!(left, ExportError::Imported(4));
    assert_eq!(space.unregister(devices[1]), Ok(()));
    assert_eq!(space.register(&root, fifth), Ok(()));
    for device in [0, 2, 3, 4].map(|n| devices[n]) {
        assert_eq!(space.unregister(device), Ok(()));
    }
    assert!(space.unexport(root).is_ok());
}

#[test]
fn another_spaces_token_is_refused() {
    let machines = [machine(8), machine(8)];
    let (mut mine, mut other) = (space(&machines[0]), space(&machines[1]));
    // Two machines put their roots at the same address; a table before it moves one.
    map(&mut other, 0, PAGE, 0);
    let moved = stage2::Stage2::new(arm(stage2::ForceWriteBack::Off), &machines[1], 6);
    let mut moved = moved.unwrap();
    let (root, foreign) = (mine.export(0).unwrap(), moved.export(0).unwrap());
    let device = Device::leaked();
    let refused = mine.register(&foreign, importer(device));
    assert_eq!(refused, Err(ExportError::Foreign));
    let (foreign, error) = mine.unexport(foreign).unwrap_err();
    assert_eq!(error, ExportError::Foreign);
    assert!(mine.unexport(root).is_ok());
    assert!(moved.unexport(foreign).is_ok());
}

#[test]
fn importers_hear_of_what_is_taken_away_and_of_nothing_else() {
    let machine = machine(8);
    let mut space = space(&machine);
    let root = space.export(0).unwrap();
    let device = Device::leaked();
    space.register(&root, importer(device)).unwrap();
    map(&mut space, 0, 4 * PAGE, GIB);
    assert_eq!(device.told(), []);
    space.zap(range(PAGE, PAGE)).unwrap();
    assert_eq!(device.told(), [range(PAGE, PAGE)]);
    space.write_protect(range(2 * PAGE, PAGE)).unwrap();
    assert_eq!(device.told(), [range(2 * PAGE, PAGE)]);
    space.unmap(range(0, PAGE)).unwrap();
    assert_eq!(device.told(), [range(0, PAGE)]);
    space.unregister(device).unwrap();
    assert_eq!(device.told(), [range(0, 1 << 39)]);
    space.zap_all();
    assert_eq!(device.told(), []);
    assert!(space.unexport(root).is_ok());
    assert_clean(&machine);
}

#[test]
fn an_exported_space_is_not_destroyed_and_leaks_when_dropped() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, 0);
    let root = space.export(0).unwrap();
    let mut space = space.destroy().unwrap_err();
    assert_eq!(mapped(&machine).len(), 1);
    assert!(space.unexport(root).is_ok());
    let _leaked = space.export(0).unwrap();
    drop(space);
    assert_eq!(machine.tables_in_use(), 3);
}

#[test]
fn an_importer_says_what_it_wants_zero() {
    let text = format!("{:?}", importer(Device::leaked()));
    assert_eq!(text, "Importer { must_be_zero: 0, .. }");
}

/// Whether the table of the page exists or not, and in bits of attributes and of addresses.
#[test]
fn no_page_gets_a_reserved_bit() {
    let machine = machine(8);
    let mut space = space(&machine);
    map(&mut space, 0, PAGE, GIB);
    let high = 1 << 39;
    let root = space.export(MARK | high).unwrap();
    let marked = MapRequest {
        attrs: normal().with_sw(SwBits::try_new(1).unwrap()),
        ..request(0, PAGE, GIB)
    };
    for (ipa, asked, clash) in [
        (PAGE, marked, MARK),
        (GIB, marked, MARK),
        (PAGE, request(0, PAGE, high), high),
        (GIB, request(0, PAGE, high), high),
    ] {
        let ipa = Ipa::new(ipa);
        let refused = MapError::Encode(EncodeError::ReservedByImporter(clash));
        assert_eq!(space.map(&MapRequest { ipa, ..asked }), Err(refused));
        let window = range(ipa.get(), PAGE);
        let fault = FaultRequest::new(ipa, window, asked.pa, asked.attrs);
        assert_eq!(space.fault(&fault), Err(refused));
    }
    assert_eq!(mapped(&machine), [(0, 3, GIB)]);
    assert!(space.unexport(root).is_ok());
}
