//! The devices of one VM.

use vmm::pl011::Pl011;
use vmm::platform::{UART, UART_INTID, UART_SIZE};

use crate::vm::Vm;

/// The devices, and what their interrupt lines were last.
#[derive(Debug)]
pub(crate) struct Devices {
    uart: Pl011,
    uart_line: bool,
}

/// There is no device at this address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NoDevice;

impl Devices {
    /// All after reset.
    pub(crate) const fn new() -> Self {
        Self {
            uart: Pl011::new(),
            uart_line: false,
        }
    }

    /// A read by the guest.
    pub(crate) fn read(&mut self, vm: Vm, ipa: u64) -> Result<u64, NoDevice> {
        let offset = uart_offset(ipa)?;
        let value = self.uart.read(offset);
        self.update(vm);
        Ok(value.into())
    }

    /// A write; gives the byte that the UART sends.
    pub(crate) fn write(&mut self, vm: Vm, ipa: u64, value: u64) -> Result<Option<u8>, NoDevice> {
        let offset = uart_offset(ipa)?;
        let sent = self.uart.write(offset, value as u32);
        self.update(vm);
        Ok(sent)
    }

    /// A key for the guest.
    pub(crate) fn type_key(&mut self, vm: Vm, byte: u8) {
        self.uart.receive(byte);
        self.update(vm);
    }

    /// Tells EL2 the line if it has changed.
    fn update(&mut self, vm: Vm) {
        let line = self.uart.line();
        if line != self.uart_line && vm.set_line(UART_INTID, line).is_ok() {
            self.uart_line = line;
        }
    }
}

fn uart_offset(ipa: u64) -> Result<u64, NoDevice> {
    ipa.checked_sub(UART)
        .filter(|offset| *offset < UART_SIZE)
        .ok_or(NoDevice)
}
