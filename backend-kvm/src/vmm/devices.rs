//! [`Devices`]: a machine's virtio devices, their registers, and the descriptors that drive them.

use super::{
    boot::Announced,
    channel::Channel,
    fds::of_event,
    layout::{DEVICE_LINES, DEVICE_STEP, DEVICES, MAX_DEVICES},
    refuse::{config, failed, kvm_failed},
};
use crate::control::{DiskSetUp, FromLauncher, Refusal};
use crate::sync::lock;
use kvm_ioctls::{IoEventAddress, VmFd};
use rustix::event::epoll;
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex},
};
use vm_kvm_devices::{
    BlockDevice, BlockOptions, DiskChanges, EntropyDevice, IrqLine, Memory, MmioTransport,
    TransportState, VirtioDevice,
    mmio::QUEUE_NOTIFY_OFFSET,
    vsock::{Incoming, Listener, VsockDevice, VsockLimits},
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Which devices there are.
#[derive(Debug)]
pub(super) struct DeviceSetUp {
    /// The guest's vsock address.
    pub(super) vsock_cid: u32,
    /// The disks with their files.
    pub(super) disks: Vec<(DiskSetUp, File)>,
}

/// A machine's virtio devices. Vsock is the first.
#[derive(Debug)]
pub(super) struct Devices {
    slots: Vec<Slot>,
    /// What the guest changes on each writable disk.
    disk_changes: Vec<DiskChanges>,
}

/// The state of all devices as plain data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct DevicesState {
    transports: Vec<TransportState>,
    /// The next port of the host that a connection to the guest comes from.
    next_port: u32,
}

#[derive(Debug)]
struct Slot {
    transport: Mutex<MmioTransport>,
    notifiers: Vec<EventFd>,
    announced: Announced,
}

/// Where the vsock device is.
const VSOCK: usize = 0;

/// The part of an epoll token that is a queue's number, plus one; zero is for the host's events.
const QUEUE_BITS: u32 = 16;

impl Devices {
    /// Makes the devices and joins them to KVM: a line for each to interrupt by, and an event for each queue.
    ///
    /// # Errors
    /// [`Refusal::Config`] for disks that cannot be, and what KVM and the host refuse.
    pub(super) fn new(
        vm: &VmFd,
        memory: &Memory,
        set_up: DeviceSetUp,
        channel: &Arc<Channel>,
    ) -> Result<Self, Refusal> {
        let mut made = vec![vsock(set_up.vsock_cid, channel.clone())?];
        let entropy = EntropyDevice::new().map_err(|error| failed("entropy device", error))?;
        made.push(Box::new(entropy));
        let mut disk_changes = Vec::new();
        for (disk, file) in set_up.disks {
            let device = block(&disk, file)?;
            disk_changes.extend((!disk.read_only).then(|| device.changes()));
            made.push(Box::new(device));
        }
        if made.len() > MAX_DEVICES {
            let reason = format!("{}; at most {} fit", made.len() - 2, MAX_DEVICES - 2);
            return Err(config("disks", reason));
        }
        let lines = lines(vm, made.len())?;
        let mut slots = Vec::with_capacity(made.len());
        let mut address = DEVICES;
        for (device, (number, line)) in made.into_iter().zip(lines.into_iter().cycle()) {
            let queues = device.queue_sizes().len();
            let notifiers = notifiers(vm, address + QUEUE_NOTIFY_OFFSET, queues)?;
            slots.push(Slot {
                transport: Mutex::new(MmioTransport::new(device, memory.clone(), line)),
                notifiers,
                announced: Announced { address, line: number },
            });
            address += DEVICE_STEP;
        }
        Ok(Self { slots, disk_changes })
    }

    /// Gives the note of what the guest changes on each writable disk.
    pub(super) fn disk_changes(&self) -> &[DiskChanges] {
        &self.disk_changes
    }

    /// Says where each device is.
    pub(super) fn announced(&self) -> Vec<Announced> {
        self.slots.iter().map(|slot| slot.announced).collect()
    }

    /// Lets `epoll` watch for what devices have to do; its tokens are for [`ready`](Self::ready).
    ///
    /// # Errors
    /// When the host refuses.
    pub(super) fn watch(&self, epoll: &OwnedFd) -> rustix::io::Result<()> {
        for (number, slot) in (0_u64..).zip(&self.slots) {
            let token = |low: u64| epoll::EventData::new_u64(number << QUEUE_BITS | low);
            if let Some(events) = lock(&slot.transport).host_events() {
                epoll::add(epoll, events, token(0), epoll::EventFlags::IN)?;
            }
            for (queue, notifier) in (1..).zip(&slot.notifiers) {
                epoll::add(epoll, of_event(notifier), token(queue), epoll::EventFlags::IN)?;
            }
        }
        Ok(())
    }

    /// Does what the token's descriptor announced.
    pub(super) fn ready(&self, token: u64) {
        let slot = usize::try_from(token >> QUEUE_BITS).ok().and_then(|slot| self.slots.get(slot));
        let Some(slot) = slot else { return };
        match token & ((1 << QUEUE_BITS) - 1) {
            0 => lock(&slot.transport).host_ready(),
            queue => {
                let Ok(queue) = u16::try_from(queue - 1) else { return };
                // Read before the queue is looked at, so that what comes later is announced again.
                let _ = slot.notifiers[usize::from(queue)].read();
                lock(&slot.transport).queue_notified(queue);
            }
        }
    }

    /// Does what a guest's write asks for, if a device is there.
    pub(super) fn write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.at(address) {
            lock(&slot.transport).write(offset, data);
        }
    }

    /// Fills `data` with what a guest's read gives: all ones where no device is.
    pub(super) fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((slot, offset)) = self.at(address) {
            lock(&slot.transport).read(offset, data);
        }
    }

    /// Does something with the vsock device.
    pub(super) fn vsock(&self, act: impl FnOnce(&mut VsockDevice)) {
        if let Some(slot) = self.slots.get(VSOCK)
            && let Some(device) = lock(&slot.transport).device_as()
        {
            act(device);
        }
    }

    /// Gives the devices' state. The machine must stand still.
    ///
    /// # Errors
    /// When a device does not give its queues.
    pub(super) fn save(&self) -> Result<DevicesState, Refusal> {
        let saved: Result<_, _> =
            self.slots.iter().map(|slot| lock(&slot.transport).save()).collect();
        let transports = saved.map_err(|error| Refusal::Failed(error.to_string()))?;
        let mut next_port = 0;
        self.vsock(|vsock| next_port = vsock.save().next_port);
        Ok(DevicesState { transports, next_port })
    }

    /// Takes up a saved state in devices that no driver has touched yet. The connections that the guest had are gone,
    /// which it is told.
    ///
    /// # Errors
    /// When the state does not fit these devices.
    pub(super) fn restore(&self, state: &DevicesState) -> Result<(), Refusal> {
        if state.transports.len() != self.slots.len() {
            return Err(Refusal::Failed(format!(
                "{} devices were saved, {} are here",
                state.transports.len(),
                self.slots.len()
            )));
        }
        for (slot, saved) in self.slots.iter().zip(&state.transports) {
            let restored = lock(&slot.transport).restore(saved);
            restored.map_err(|error| Refusal::Failed(format!("saved device: {error}")))?;
        }
        let mut reset = Ok(());
        self.vsock(|vsock| {
            vsock.continue_ports(state.next_port);
            reset = vsock.reset_connections();
        });
        reset.map_err(|broken| Refusal::Failed(broken.to_string()))
    }

    fn at(&self, address: u64) -> Option<(&Slot, u64)> {
        let offset = address.checked_sub(DEVICES)?;
        let slot = self.slots.get(usize::try_from(offset / DEVICE_STEP).ok()?)?;
        Some((slot, offset % DEVICE_STEP))
    }
}

/// An interrupt line, raised as an edge.
#[derive(Debug)]
struct Line(EventFd);

impl IrqLine for Line {
    fn trigger(&self) {
        let _ = self.0.write(1);
    }
}

/// A line by its number.
type NumberedLine = (u32, Arc<dyn IrqLine>);

/// Makes as many lines as there are devices, or as there are.
fn lines(vm: &VmFd, devices: usize) -> Result<Vec<NumberedLine>, Refusal> {
    let mut lines: Vec<NumberedLine> = Vec::new();
    for &number in DEVICE_LINES.iter().take(devices) {
        let event = event()?;
        vm.register_irqfd(&event, number).map_err(kvm_failed("KVM_IRQFD"))?;
        lines.push((number, Arc::new(Line(event))));
    }
    Ok(lines)
}

fn notifiers(vm: &VmFd, address: u64, queues: usize) -> Result<Vec<EventFd>, Refusal> {
    let address = IoEventAddress::Mmio(address);
    let mut notifiers = Vec::with_capacity(queues);
    for queue in (0_u32..).take(queues) {
        let event = event()?;
        vm.register_ioevent(&event, &address, queue).map_err(kvm_failed("KVM_IOEVENTFD"))?;
        notifiers.push(event);
    }
    Ok(notifiers)
}

/// Makes an event that never blocks.
///
/// # Errors
/// [`Refusal::Exhausted`] where the host has no more descriptors.
pub(super) fn event() -> Result<EventFd, Refusal> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|error| failed("event", error))
}

fn vsock(cid: u32, channel: Arc<Channel>) -> Result<Box<dyn VirtioDevice>, Refusal> {
    // 0 to 2 and the highest are addresses of hosts, of the guest itself and of anybody (virtio 1.2, section 5.10.4).
    if !(3..u32::MAX).contains(&cid) {
        return Err(config("vsock_cid", format!("{cid} is reserved")));
    }
    let incoming: Incoming = Box::new(move |Listener { port, number }, stream| {
        let message = FromLauncher::Incoming { port, listener: number };
        channel.try_send(&message, Some(stream.as_fd())).unwrap_or(false)
    });
    let device = VsockDevice::new(u64::from(cid), incoming, VsockLimits::default())
        .map_err(|error| failed("vsock device", error))?;
    Ok(Box::new(device))
}

fn block(disk: &DiskSetUp, file: File) -> Result<BlockDevice, Refusal> {
    let options = BlockOptions::default().read_only(disk.read_only).serial(disk.serial.as_str());
    BlockDevice::new(file, &options)
        .map_err(|error| config("disks", format!("{}: {error}", disk.serial)))
}
