//! What becomes of a VM: stopped, reset, destroyed.

use core::sync::atomic::Ordering;

use abi::{ErrorCode, VmConfig};
use spin::Mutex;

use super::Memory;
use super::guest::{Guest, State, reason};
use super::ram::with_heap;
use crate::vm::{Refused, Vm};

impl Guest {
    /// Ends a VM that has never run; gives the reason back.
    pub(super) fn give_up(&self, why: &'static str) -> &'static str {
        self.stop();
        self.bury(State::Stopped, State::Killed);
        why
    }

    /// Ends it, whatever it does now.
    pub(crate) fn stop(&self) {
        for from in [State::Running, State::Paused, State::Resetting] {
            if self.change(from, State::Stopped) {
                return;
            }
        }
    }

    /// What is due when no vCPU is inside: the core of its first vCPU does it.
    pub(super) fn attend(&self, memory: &Mutex<Memory>, core: usize) -> Option<&'static str> {
        let mine = self.vcpus.first().is_some_and(|vcpu| vcpu.core == core);
        if !mine || self.inside.load(Ordering::Acquire) != 0 {
            return None;
        }
        match self.state() {
            State::Resetting => {
                if let Err(why) = self.start_over(&mut memory.lock()) {
                    self.change(State::Resetting, State::Stopped);
                    return Some(why);
                }
                self.change(State::Resetting, State::Running);
                Some("reset")
            }
            State::PoweredOff => self.bury(State::PoweredOff, State::Gone),
            State::Stopped => self.bury(State::Stopped, State::Killed),
            State::Running | State::Paused | State::Gone | State::Killed => None,
        }
    }

    pub(super) fn start_over(&self, memory: &mut Memory) -> Result<(), &'static str> {
        // First: their DMA must not meet what is loaded.
        self.reset_functions(memory)?;
        if self.config.protected {
            self.build_again(memory)?;
        } else {
            self.vm().reset().map_err(reason)?;
        }
        self.devices.lock().reset();
        for vcpu in &self.vcpus {
            vcpu.until.store(0, Ordering::Relaxed);
        }
        if self.config.protected {
            self.protect(memory)
        } else {
            self.load()
        }
    }

    /// A protected VM is not reset, what is in it is its own: it ends, and another one begins.
    pub(super) fn build_again(&self, memory: &mut Memory) -> Result<(), &'static str> {
        self.end().map_err(reason)?;
        let config = VmConfig {
            vcpus: self.config.vcpus,
            protected: true,
            devices: false,
        };
        let vm = with_heap(memory, || Vm::create(config, self.state_pages)).map_err(reason)?;
        self.handle.store(vm.handle(), Ordering::Release);
        Ok(())
    }

    /// Destroys the VM and takes everything back.
    pub(super) fn end(&self) -> Result<(), Refused> {
        self.release_functions();
        self.vm().destroy()?;
        while self.vm().reclaim()?.is_some() {}
        Ok(())
    }

    pub(super) fn bury(&self, from: State, to: State) -> Option<&'static str> {
        match self.end() {
            Ok(()) => {
                self.change(from, to);
                Some(to.name())
            }
            // Somebody is still on the way out, or there is more to do: again with the next round.
            Err(refused) if matches!(refused.code, ErrorCode::Busy | ErrorCode::Again) => None,
            Err(_) => {
                self.change(from, State::Killed);
                Some("can't be destroyed")
            }
        }
    }
}
