//! [`Ports`]: the machine's I/O ports.

use super::{
    boot::{PM1_CONTROL, PM1_EVENT, SLEEP_ENABLE},
    console::Console,
    flush::FlushTimer,
    refuse::failed,
    wall_clock::WallClock,
};
use crate::control::Refusal;
use crate::sync::lock;
use serde::{Deserialize, Serialize};
use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};
use vm_guest_protocol::boot::BOOT_MARK_PORT;
use vm_superio::{Serial, SerialState, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

/// The keyboard controller's data port.
const KEYBOARD_DATA: u16 = 0x60;
/// The keyboard controller's port for commands and status.
pub(super) const KEYBOARD_COMMAND: u16 = 0x64;
/// The command that resets the machine.
pub(super) const KEYBOARD_RESET: u8 = 0xfe;
/// What the status port says: always ready for a command, which kernels wait for before they reset, and always with
/// data to read, from which their keyboard drivers see at once that there is no controller.
const KEYBOARD_STATUS: u8 = 0xfd;

const SERIAL: u16 = 0x3f8;
const SERIAL_END: u16 = SERIAL + 8;
const CLOCK_INDEX: u16 = 0x70;
const CLOCK_DATA: u16 = 0x71;

/// In the PM1 control register: the machine is in ACPI mode (ACPI 6.5, section 4.8.3.2.1).
const SCI_ENABLE: u16 = 1;

/// What a write to a port brings about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing beyond the device.
    None,
    /// The machine is reset.
    Reset,
    /// The machine is powered off.
    PowerOff,
    /// The agent says how far it has come, for the first time.
    Mark(u8),
}

/// The devices behind I/O ports: serial port, clock, power, reset and boot marks. Ports of KVM's own devices do not
/// come here; others read as all ones, as without a device.
#[derive(Debug)]
pub(super) struct Ports {
    serial: Serial<SerialLine, NoEvents, Printer>,
    clock: WallClock,
    pm1_enable: [u8; 2],
    pm1_control: u16,
    marks: [bool; 256],
}

/// The ports' registers as plain data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct PortsState {
    /// Divisor low and high, interrupt enable and identification, line control and status, modem control and status,
    /// scratch.
    serial: [u8; 9],
    received: Vec<u8>,
    clock: WallClock,
    pm1_enable: [u8; 2],
    pm1_control: u16,
}

impl Ports {
    /// Makes them, with the serial port's interrupt line.
    ///
    /// # Errors
    /// When the line cannot be shared.
    pub(super) fn new(
        serial_line: &EventFd,
        console: Arc<Mutex<Console>>,
        flush: Arc<FlushTimer>,
    ) -> Result<Self, Refusal> {
        let line = serial_line.try_clone().map_err(|error| failed("serial line", error))?;
        Ok(Self {
            serial: Serial::new(SerialLine(line), Printer { console, flush }),
            clock: WallClock::default(),
            pm1_enable: [0; 2],
            pm1_control: SCI_ENABLE,
            marks: [false; 256],
        })
    }

    /// Gives the registers.
    pub(super) fn save(&self) -> PortsState {
        let serial = self.serial.state();
        PortsState {
            serial: [
                serial.baud_divisor_low,
                serial.baud_divisor_high,
                serial.interrupt_enable,
                serial.interrupt_identification,
                serial.line_control,
                serial.line_status,
                serial.modem_control,
                serial.modem_status,
                serial.scratch,
            ],
            received: serial.in_buffer,
            clock: self.clock.clone(),
            pm1_enable: self.pm1_enable,
            pm1_control: self.pm1_control,
        }
    }

    /// Takes up saved registers.
    ///
    /// # Errors
    /// When they are none that the serial port can have.
    pub(super) fn restore(&mut self, state: &PortsState) -> Result<(), Refusal> {
        let refused = |what: String| Refusal::Failed(format!("saved serial port: {what}"));
        let [low, high, enable, identification, line, line_status, modem, modem_status, scratch] =
            state.serial;
        let serial = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: state.received.clone(),
        };
        let line = self.serial.interrupt_evt().0.try_clone();
        let line = line.map_err(|error| failed("serial line", error))?;
        let printer = self.serial.writer().clone();
        let made = Serial::from_state(&serial, SerialLine(line), NoEvents, printer);
        self.serial = made.map_err(|error| refused(format!("{error:?}")))?;
        self.clock = state.clock.clone();
        self.pm1_enable = state.pm1_enable;
        self.pm1_control = state.pm1_control | SCI_ENABLE;
        Ok(())
    }

    /// Does what a write asks for; `data` is one access, or several to the same port.
    pub(super) fn write(&mut self, port: u16, data: &[u8]) -> Effect {
        match port {
            SERIAL..SERIAL_END => {
                for &byte in data {
                    // It fails when the interrupt cannot be raised; the guest's driver has timers for that.
                    let _ = self.serial.write(offset(port, SERIAL), byte);
                }
            }
            CLOCK_INDEX => self.clock.select(data),
            PM1_CONTROL => return self.write_power(data),
            _ if port == PM1_EVENT + 2 => {
                for (kept, byte) in self.pm1_enable.iter_mut().zip(data) {
                    *kept = *byte;
                }
            }
            KEYBOARD_COMMAND if data.contains(&KEYBOARD_RESET) => return Effect::Reset,
            BOOT_MARK_PORT => {
                // Only the first one counts, so that a guest cannot flood its owner.
                if let Some(&mark) = data.first()
                    && !std::mem::replace(&mut self.marks[usize::from(mark)], true)
                {
                    return Effect::Mark(mark);
                }
            }
            _ => {}
        }
        Effect::None
    }

    /// Fills `data` with what a read gives.
    pub(super) fn read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            SERIAL..SERIAL_END => {
                for byte in data {
                    *byte = self.serial.read(offset(port, SERIAL));
                }
            }
            CLOCK_DATA => data.fill(self.clock.read()),
            KEYBOARD_COMMAND => data.fill(KEYBOARD_STATUS),
            KEYBOARD_DATA => data.fill(0),
            PM1_CONTROL => copy(data, &self.pm1_control.to_le_bytes()),
            PM1_EVENT => copy(data, &[0, 0, self.pm1_enable[0], self.pm1_enable[1]]),
            _ if port == PM1_EVENT + 2 => copy(data, &self.pm1_enable),
            _ => {}
        }
    }

    fn write_power(&mut self, data: &[u8]) -> Effect {
        let [low, high, ..] = *data else { return Effect::None };
        let value = u16::from_le_bytes([low, high]);
        self.pm1_control = value & !SLEEP_ENABLE | SCI_ENABLE;
        // The tables name one sleep state, which is power-off.
        if value & SLEEP_ENABLE == 0 { Effect::None } else { Effect::PowerOff }
    }
}

fn offset(port: u16, base: u16) -> u8 {
    u8::try_from(port - base).unwrap_or(u8::MAX)
}

fn copy(to: &mut [u8], from: &[u8]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}

/// The serial port's interrupt line.
#[derive(Debug)]
struct SerialLine(EventFd);

impl Trigger for SerialLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Hands what the guest prints to the console.
#[derive(Clone, Debug)]
struct Printer {
    console: Arc<Mutex<Console>>,
    flush: Arc<FlushTimer>,
}

impl Write for Printer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut console = lock(&self.console);
        let mut waits = false;
        for &byte in bytes {
            waits |= console.add(byte);
        }
        drop(console);
        if waits {
            self.flush.arm();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn ports() -> (Ports, EventFd, Arc<Mutex<Console>>) {
        let ring = tempfile::tempfile().unwrap();
        let console = Arc::new(Mutex::new(Console::new(ring, 64, None)));
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let flush = Arc::new(FlushTimer::new().unwrap());
        (Ports::new(&line, console.clone(), flush).unwrap(), line, console)
    }

    fn read(ports: &mut Ports, port: u16, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        ports.read(port, &mut data);
        data
    }

    #[test]
    fn power_off_and_reset_are_seen() {
        let (mut ports, ..) = ports();
        assert_eq!(read(&mut ports, PM1_CONTROL, 2), [1, 0]);
        assert_eq!(ports.write(PM1_CONTROL, &[0, 5 << 2]), Effect::None);
        assert_eq!(ports.write(PM1_CONTROL, &[0, 5 << 2 | 1 << 5]), Effect::PowerOff);
        assert_eq!(ports.write(KEYBOARD_COMMAND, &[0xd1]), Effect::None);
        assert_eq!(ports.write(KEYBOARD_COMMAND, &[KEYBOARD_RESET]), Effect::Reset);
    }

    #[test]
    fn marks_count_once() {
        let (mut ports, ..) = ports();
        assert_eq!(ports.write(BOOT_MARK_PORT, &[1]), Effect::Mark(1));
        assert_eq!(ports.write(BOOT_MARK_PORT, &[1]), Effect::None);
        assert_eq!(ports.write(BOOT_MARK_PORT, &[2]), Effect::Mark(2));
    }

    #[test]
    fn an_enabled_transmitter_interrupts() {
        let (mut ports, line, _) = ports();
        ports.write(SERIAL + 1, &[2]);
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(read(&mut ports, SERIAL + 2, 1)[0] & 0xf, 2);
        ports.write(SERIAL, b"x");
        assert_eq!(line.read().unwrap(), 1);
    }

    proptest! {
        #[test]
        fn no_access_does_harm(
            accesses in prop::collection::vec(
                (prop_oneof![any::<u16>(), 0x600_u16..0x608, 0x3f8_u16..0x400, 0x60_u16..0x80],
                 prop::collection::vec(any::<u8>(), 0..9), any::<bool>()), 0..200),
        ) {
            let (mut ports, ..) = ports();
            for (port, mut data, write) in accesses {
                if write {
                    ports.write(port, &data);
                } else {
                    ports.read(port, &mut data);
                }
            }
            prop_assert_eq!(read(&mut ports, KEYBOARD_COMMAND, 1), [KEYBOARD_STATUS]);
        }
    }
}
