//! Protected VMs on this machine: the library's transitions, over real pages.

use board::AddrRange;
use el2::guest_memory::{Contents, GuestPages};
use el2::host_map::HostMap;
use el2::overwrite;
use el2::vm_table::Estate;
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

/// This machine's memory, for the library.
pub(crate) fn estate(hypervisor: &Hypervisor) -> Estate<'_, 'static, HostMap<Tables>, Pages> {
    Estate {
        ownership: &hypervisor.ownership,
        host: hypervisor.host.map(),
        contents: &Pages,
    }
}

impl Vm {
    /// Its memory, for transitions.
    pub(crate) fn pages<'a>(
        &'a self,
        hypervisor: &'a Hypervisor,
    ) -> GuestPages<'a, 'static, Stage2<ArmStage2, Tables>, HostMap<Tables>, Pages> {
        self.state.pages(&estate(hypervisor))
    }
}
