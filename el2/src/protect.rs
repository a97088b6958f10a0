//! Protected VMs on this machine: the library's transitions, over real pages.

use abi::{DonationKind, ErrorCode};
use board::AddrRange;
use el2::guest_memory::{Contents, GuestPages};
use el2::host_map::HostMap;
use el2::measure::Start;
use el2::overwrite;
use el2::protection::Protection;
use el2::psci::StartOrder;
use el2::vm_error::Refusal;
use memslot::pending::Work;
use stage2::{ArmStage2, Stage2};

use crate::arch::mem;
use crate::arch::tables::Tables;
use crate::hypervisor::Hypervisor;
use crate::vm::Vm;

/// Pages by their physical address, at which EL2 maps them.
#[derive(Debug)]
pub(crate) struct Pages;

impl Contents for Pages {
    fn wipe(&self, pages: AddrRange) {
        mem::wipe(pages);
    }

    fn settle(&self, pages: AddrRange) {
        mem::clean_invalidate_to_poc(pages);
    }

    fn show(&self, pages: AddrRange, to: &mut dyn FnMut(&[u8])) {
        to(mem::donated_bytes(pages));
    }
}

impl overwrite::Memory for Pages {
    fn word(&self, address: u64) -> u64 {
        mem::word_at(address)
    }

    fn put(&self, address: u64, words: [u64; overwrite::WORDS]) {
        mem::put_words(address, words);
    }

    fn wipe(&self, range: AddrRange) {
        mem::wipe(range);
    }
}

impl Vm {
    /// The protection of a VM that has one.
    pub(crate) fn protection(&self) -> Result<&Protection, ErrorCode> {
        self.protection.as_ref().ok_or(ErrorCode::NotPermitted)
    }

    /// Its memory, for transitions.
    pub(crate) fn pages<'a>(
        &'a self,
        hypervisor: &'a Hypervisor,
    ) -> GuestPages<'a, 'static, Stage2<ArmStage2, Tables>, HostMap<Tables>, Pages> {
        GuestPages {
            memory: &self.memory,
            ownership: &hypervisor.ownership,
            host: hypervisor.host.map(),
            contents: &Pages,
            index: self.index,
        }
    }

    /// Gives the guest pages of the host; the memory that has moved.
    pub(crate) fn donate_memory(
        &self,
        hypervisor: &Hypervisor,
        ipa: u64,
        pages: u64,
        kind: DonationKind,
    ) -> Result<AddrRange, Refusal> {
        let mut stage = self.protection()?.stage();
        self.pages(hypervisor).donate(&mut stage, ipa, pages, kind)
    }

    /// Completes the measurement and makes vCPU 0 runnable.
    pub(crate) fn seal(&self, entry: u64, context: u64) -> Result<u64, Refusal> {
        let protection = self.protection()?;
        let first = self.vcpu(0)?;
        if self.memory.pending().contains(Work::UNFINISHED) {
            // Behind the seal nobody could complete the lock.
            return Err(ErrorCode::Busy.into());
        }
        let start = Start {
            vcpus: self.config.vcpus,
            entry,
            context,
        };
        protection.seal(&start, || {
            let order = StartOrder { entry, context };
            let ordered = self.power.order(first.index, order);
            ordered.map_err(|_| ErrorCode::Invalid)
        })
    }
}
