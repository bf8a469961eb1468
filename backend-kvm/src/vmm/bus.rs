//! [`Bus`]: where a vCPU's accesses to ports and devices go.

use super::{
    channel::Channel,
    devices::Devices,
    ports::{Effect, Ports},
    vcpus::Stopped,
};
use crate::control::FromLauncher;
use crate::sync::lock;
use rustix::time::{ClockId, clock_gettime};
use std::sync::{Arc, Mutex};

/// Where a vCPU's accesses go.
#[derive(Debug)]
pub(super) struct Bus {
    ports: Mutex<Ports>,
    devices: Arc<Devices>,
    channel: Arc<Channel>,
}

impl Bus {
    /// Joins ports and devices; boot marks are told through `channel`.
    pub(super) fn new(ports: Ports, devices: Arc<Devices>, channel: Arc<Channel>) -> Self {
        Self { ports: Mutex::new(ports), devices, channel }
    }

    /// Does something with the ports.
    pub(super) fn ports<T>(&self, act: impl FnOnce(&mut Ports) -> T) -> T {
        act(&mut lock(&self.ports))
    }

    /// Does what a write to a port asks for; says so when it stops the machine.
    pub(super) fn port_written(&self, port: u16, data: &[u8]) -> Option<Stopped> {
        let effect = lock(&self.ports).write(port, data);
        match effect {
            Effect::None => None,
            Effect::Reset => Some(Stopped::Reset),
            Effect::PowerOff => Some(Stopped::PoweredOff),
            Effect::Mark(mark) => {
                let at_ns = monotonic_ns();
                // Marks are for measuring: one that an owner has no room for is left out.
                let _ = self.channel.try_send(&FromLauncher::Mark { mark, at_ns }, None);
                None
            }
        }
    }

    /// Fills `data` with what a port gives.
    pub(super) fn read_port(&self, port: u16, data: &mut [u8]) {
        lock(&self.ports).read(port, data);
    }

    /// Does what a write to an address that is no memory asks for.
    pub(super) fn write_memory(&self, address: u64, data: &[u8]) {
        self.devices.write(address, data);
    }

    /// Fills `data` with what an address that is no memory gives: all ones where there is nothing.
    pub(super) fn read_memory(&self, address: u64, data: &mut [u8]) {
        self.devices.read(address, data);
    }
}

/// Reads the clock that owners compare boot marks with.
fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
