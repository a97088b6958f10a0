//! Registers (IHI 0070 6.2): offsets in bytes, and fields.

pub(super) const IDR0: u32 = 0x0;
pub(super) const IDR1: u32 = 0x4;
pub(super) const IDR3: u32 = 0xc;
pub(super) const IDR5: u32 = 0x14;
pub(super) const CR0: u32 = 0x20;
pub(super) const CR0ACK: u32 = 0x24;
pub(super) const CR1: u32 = 0x28;
pub(super) const CR2: u32 = 0x2c;
pub(super) const GBPA: u32 = 0x44;
pub(super) const IRQ_CTRL: u32 = 0x50;
pub(super) const GERROR: u32 = 0x60;
pub(super) const GERRORN: u32 = 0x64;
pub(super) const STRTAB_BASE: u32 = 0x80;
pub(super) const STRTAB_BASE_CFG: u32 = 0x88;
pub(super) const CMDQ_BASE: u32 = 0x90;
pub(super) const CMDQ_PROD: u32 = 0x98;
pub(super) const CMDQ_CONS: u32 = 0x9c;
pub(super) const EVENTQ_BASE: u32 = 0xa0;
pub(super) const EVENTQ_PROD: u32 = 0x1_00a8;
pub(super) const EVENTQ_CONS: u32 = 0x1_00ac;

pub(super) const CR0_SMMUEN: u32 = 1;
pub(super) const CR0_EVENTQEN: u32 = 1 << 2;
pub(super) const CR0_CMDQEN: u32 = 1 << 3;
/// ATSCHK: what devices say they have translated themselves is checked, too.
pub(super) const CR0_ATSCHK: u32 = 1 << 4;
/// Tables and queues: inner shareable, write-back inside and outside.
pub(super) const CR1_CACHED: u32 = 0b11_01_01 | 0b11_01_01 << 6;
/// RECINVSID: unknown streams are recorded. PTM: the CPUs' own TLBIs do not reach the SMMU.
pub(super) const CR2_RECORD_PRIVATE: u32 = 1 << 1 | 1 << 2;
/// GBPA: abort everything while the SMMU is off.
pub(super) const GBPA_ABORT: u32 = 1 << 20;
pub(super) const GBPA_UPDATE: u32 = 1 << 31;
/// GERROR: the command queue has stopped.
pub(super) const GERROR_CMDQ: u32 = 1;
/// An event was lost: the flag in PROD differs from that in CONS.
pub(super) const OVERFLOW: u32 = 1 << 31;
/// RA or WA of a base register: allocate in caches.
pub(super) const ALLOCATE: u64 = 1 << 62;
