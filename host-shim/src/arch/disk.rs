//! The machine's own virtio block device, where there is one: QEMU's.

use alloc::alloc::{alloc_zeroed, dealloc};
use alloc::boxed::Box;
use core::alloc::Layout;
use core::fmt;
use core::ptr::NonNull;

use board::AddrRange;
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceType, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use vmm::virtio::block::{Disk, DiskError, SECTOR};

/// DMA out of the host's heap. RAM is identity mapped, and the device of an emulator is coherent.
#[derive(Debug)]
struct HostDma;

fn pages(count: usize) -> Option<Layout> {
    let bytes = count.checked_mul(PAGE_SIZE)?;
    Layout::from_size_align(bytes, PAGE_SIZE).ok()
}

// SAFETY: the heap hands out each page once, and zeroed; addresses are identity mapped.
unsafe impl Hal for HostDma {
    fn dma_alloc(count: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let Some(layout) = pages(count).filter(|layout| layout.size() > 0) else {
            return (0, NonNull::dangling());
        };
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc_zeroed(layout) };
        // Address 0 tells the driver that there was nothing.
        NonNull::new(memory).map_or((0, NonNull::dangling()), |memory| {
            (memory.expose_provenance().get() as u64, memory)
        })
    }

    unsafe fn dma_dealloc(_: PhysAddr, memory: NonNull<u8>, count: usize) -> i32 {
        if let Some(layout) = pages(count) {
            // SAFETY: the caller's promise: it came from `dma_alloc` with this count.
            unsafe { dealloc(memory.as_ptr(), layout) };
        }
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        // Only the PCI transport asks, which we don't use.
        NonNull::new(core::ptr::with_exposed_provenance_mut(address as usize))
            .unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().expose_provenance().get() as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// The device behind its driver, which waits for each request's end.
struct HostDisk(VirtIOBlk<HostDma, MmioTransport<'static>>);

impl fmt::Debug for HostDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostDisk({} sectors)", self.0.capacity())
    }
}

/// The driver counts in blocks of 512 bytes, too.
const _: () = assert!(SECTOR == virtio_drivers::device::blk::SECTOR_SIZE);

impl Disk for HostDisk {
    fn sectors(&self) -> u64 {
        self.0.capacity()
    }

    fn is_read_only(&self) -> bool {
        self.0.readonly()
    }

    fn read(&mut self, sector: u64, to: &mut [u8]) -> Result<(), DiskError> {
        self.0
            .read_blocks(sector as usize, to)
            .map_err(|_| DiskError)
    }

    fn write(&mut self, sector: u64, from: &[u8]) -> Result<(), DiskError> {
        self.0
            .write_blocks(sector as usize, from)
            .map_err(|_| DiskError)
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        self.0.flush().map_err(|_| DiskError)
    }
}

/// The block device behind the first of these registers that has one.
pub(crate) fn find(registers: &[AddrRange]) -> Option<Box<dyn Disk>> {
    registers.iter().find_map(|range| {
        let header = core::ptr::with_exposed_provenance_mut(range.start() as usize);
        let size = range.size() as usize;
        // SAFETY: the device tree says that a virtio device's registers are there; they are mapped
        // as device memory, and nobody else uses them.
        let transport = unsafe { MmioTransport::new(NonNull::new(header)?, size) }.ok()?;
        if transport.device_type() != DeviceType::Block {
            return None;
        }
        let disk: Box<dyn Disk> = Box::new(HostDisk(VirtIOBlk::new(transport).ok()?));
        Some(disk)
    })
}
