//! [`VsockDevice`]: sockets between guest and host (virtio 1.2, section 5.10), streams only.
//!
//! The host's side is descriptors that its owner hands over, in the hybrid convention: a host that wants to reach the
//! guest has a Unix stream socket, says `CONNECT port\n` and gets `OK hostport\n` once the guest accepted, or a hang-up;
//! what the guest connects to a port that is listened on becomes a Unix stream socket for the owner.
//!
//! Each direction of each connection flows at the speed of its own reader: the guest may send as much as is stored for
//! the connection, and the host's bytes stay in its socket until the guest gave room for them. Ends are kept apart: a
//! host that shuts one direction down shuts that direction of the guest's socket down after all bytes before it, and
//! the other way round. A host whose socket fails, or a guest that does not keep to the protocol, has its connection
//! reset; only queues that make no sense break the device.
//!
//! Time counts only while the device is called: a pause of the machine lets no connection time out.

mod connection;
mod credit;
mod greeting;
mod hub;
mod packet;
mod poll;

use self::{
    hub::Hub,
    packet::{HEADER_LENGTH, HEADER_SIZE, Header},
};
use crate::{
    device::{DeviceBroken, Interrupt, Memory, VirtioDevice},
    queue::{Budget, Chain, DeviceQueue, QueueError},
};
use serde::{Deserialize, Serialize};
use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::{Queue, QueueT};

/// Takes the host's end of a stream that the guest connected to a listener's port; false refuses the guest. The end
/// blocks.
pub type Incoming = Box<dyn FnMut(Listener, OwnedFd) -> bool + Send>;

/// One listener on a port of the host. When a port is listened on anew, that is another listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// The port.
    pub port: u32,
    /// The number by which its owner knows it from others on the same port.
    pub number: u64,
}

/// How much one device holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VsockLimits {
    /// The most connections at a time, of both sides together; 1,024 by default. More are refused.
    pub connections: usize,
    /// How many bytes of the guest's are stored for one connection whose host does not read; 256 KiB by default.
    pub buffer: u32,
    /// How many bytes of the guest's are stored for all connections together; 32 MiB by default. Beyond it a new
    /// connection has a buffer of at most 16 KiB.
    pub all_buffers: u64,
    /// How long a host may take to say `CONNECT`, and a guest to answer it or to answer the end of a connection, rounded
    /// up to 100 ms; 10 s by default.
    pub timeout: Duration,
}

impl Default for VsockLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            buffer: 256 << 10,
            all_buffers: 32 << 20,
            timeout: Duration::from_secs(10),
        }
    }
}

/// What of a device lives on in a snapshot: never a connection, nor a listener, for both belong to the owner of the
/// machine that was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's address.
    pub guest_cid: u64,
    /// The port that the next connecting host gets.
    pub next_port: u32,
}

/// A virtio socket device.
#[derive(Debug)]
pub struct VsockDevice {
    hub: Hub,
    driver: Option<Driver>,
}

impl VsockDevice {
    /// Makes a device for the guest with the address `guest_cid`, which listens on no port. `incoming` gets what the
    /// guest connects.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(guest_cid: u64, incoming: Incoming, limits: VsockLimits) -> io::Result<Self> {
        Ok(Self { hub: Hub::new(guest_cid, incoming, limits)?, driver: None })
    }

    /// Makes a device that goes on where [`save`](Self::save) was called, without connections, which listens on no port.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn restore(
        state: &VsockState,
        incoming: Incoming,
        limits: VsockLimits,
    ) -> io::Result<Self> {
        let mut device = Self::new(state.guest_cid, incoming, limits)?;
        device.hub.set_next_port(state.next_port);
        Ok(device)
    }

    /// Gives what lives on in a snapshot; nothing changes here, and connections go on.
    #[must_use]
    pub fn save(&self) -> VsockState {
        VsockState { guest_cid: self.hub.guest_cid(), next_port: self.hub.next_port() }
    }

    /// Gives connecting hosts ports from `next_port` on, as the device did whose [`next_port`](VsockState::next_port) that
    /// was: so that a guest does not take a new connection for one that it still remembers.
    pub fn continue_ports(&mut self, next_port: u32) {
        self.hub.set_next_port(next_port);
    }

    /// Takes a host's stream: a Unix stream socket whose other end says `CONNECT port\n` and then waits for
    /// `OK hostport\n`. It becomes non-blocking.
    ///
    /// It is closed, without a word, where the guest refuses or does not answer in time, where the host says anything
    /// else, while no driver is there, and where there are too many connections.
    pub fn accept_host(&mut self, stream: OwnedFd) {
        if self.driver.is_some() {
            self.hub.greet(stream);
        }
    }

    /// Hands what the guest connects to the listener's port of the host to the owner from now on, and refuses it while
    /// `backlog` streams wait there. A stream waits from when it is handed over until the owner [takes](Self::taken) it,
    /// whatever becomes of its connection. What listened on the port before does so no more.
    pub fn listen(&mut self, listener: Listener, backlog: u32) {
        self.hub.listen(listener, backlog);
    }

    /// Notes that the owner took so many of the streams that waited at a listener. Nothing happens where that listens no
    /// more.
    pub fn taken(&mut self, listener: Listener, streams: u32) {
        self.hub.taken(listener, streams);
    }

    /// Refuses what the guest connects to `port` from now on; what is connected stays.
    pub fn unlisten(&mut self, port: u32) {
        self.hub.unlisten(port);
    }

    /// Gives the number of streams: connections, and hosts that have not said yet where they want to go.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.hub.streams()
    }

    /// Ends all connections, and tells the guest that all of its connections are gone and that it should read its
    /// address again (section 5.10.6.7); for a machine that was restored. Hosts see a hang-up.
    ///
    /// # Errors
    /// When the guest's queues make no sense.
    pub fn reset_connections(&mut self) -> Result<(), DeviceBroken> {
        self.hub.clear();
        self.with_driver(|_, driver| {
            driver.event_owed = true;
            driver.send_event()
        })
    }

    /// Calls `work` with the driver's side, if there is one, and then interrupts the guest once where it must be. A
    /// device that breaks forgets everything.
    fn with_driver(
        &mut self,
        work: impl FnOnce(&mut Hub, &mut Driver) -> Result<(), QueueError>,
    ) -> Result<(), DeviceBroken> {
        let Some(driver) = &mut self.driver else {
            return Ok(());
        };
        let done = work(&mut self.hub, driver).and_then(|()| driver.interrupt());
        done.map_err(|error| {
            self.reset();
            error.of(NAME)
        })
    }
}

impl VirtioDevice for VsockDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.hub.guest_cid().to_le_bytes();
        let from = usize::try_from(offset).map_or(config.len(), |from| from.min(config.len()));
        let count = data.len().min(config.len() - from);
        data.fill(0);
        data[..count].copy_from_slice(&config[from..from + count]);
    }

    fn activate(
        &mut self,
        memory: Memory,
        _features: u64,
        queues: Vec<Queue>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<(), DeviceBroken> {
        self.reset();
        self.driver = Some(Driver::new(memory, queues, interrupt)?);
        // A driver that was restored may have packets in its queue that it does not announce again.
        self.hub.poll().call_again();
        Ok(())
    }

    fn queues(&self) -> Vec<&Queue> {
        self.driver.as_ref().map_or_else(Vec::new, |driver| {
            let event = driver.event.as_ref().map_or_else(|queue| queue, DeviceQueue::queue);
            vec![driver.rx.queue(), driver.tx.queue(), event]
        })
    }

    fn queue_notified(&mut self, queue: u16) -> Result<(), DeviceBroken> {
        self.with_driver(|hub, driver| match queue {
            RX => driver.serve_both(hub, false),
            TX => driver.serve_both(hub, true),
            EVENT => driver.send_event(),
            _ => Ok(()),
        })
    }

    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.hub.poll().as_fd())
    }

    fn host_ready(&mut self) -> Result<(), DeviceBroken> {
        self.hub.host_ready();
        self.with_driver(|hub, driver| {
            let takes = driver.takes_later;
            driver.serve_both(hub, takes)
        })
    }

    fn reset(&mut self) {
        self.driver = None;
        self.hub.clear();
    }
}

/// What the guest's driver set up.
struct Driver {
    memory: Memory,
    rx: DeviceQueue,
    tx: DeviceQueue,
    /// A driver may leave this one out.
    event: Result<DeviceQueue, Queue>,
    interrupt: Arc<dyn Interrupt>,
    /// Whether the guest should hear of used buffers.
    used: bool,
    /// Whether packets of the guest's may wait that it will not announce again.
    takes_later: bool,
    /// Whether the guest must be told that its connections are gone.
    event_owed: bool,
}

impl Driver {
    fn new(
        memory: Memory,
        queues: Vec<Queue>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Self, DeviceBroken> {
        let [rx, tx, event] = <[Queue; 3]>::try_from(queues)
            .map_err(|_| DeviceBroken::new(NAME, "there are three queues"))?;
        let mut rx = DeviceQueue::new(NAME, rx, memory.clone())?;
        let tx = DeviceQueue::new(NAME, tx, memory.clone())?;
        let event = match event.ready() {
            true => Ok(DeviceQueue::new(NAME, event, memory.clone())?),
            false => Err(event),
        };
        rx.announce(false).map_err(|error| error.of(NAME))?;
        Ok(Self {
            memory,
            rx,
            tx,
            event,
            interrupt,
            used: false,
            takes_later: true,
            event_owed: false,
        })
    }

    /// Takes the guest's packets where `takes`, and gives it its own. Either can be what the other waits for.
    fn serve_both(&mut self, hub: &mut Hub, takes: bool) -> Result<(), QueueError> {
        if takes {
            self.take_packets(hub)?;
        }
        let clogged = hub.is_clogged();
        self.give_packets(hub)?;
        if clogged && !hub.is_clogged() {
            hub.poll().call_again();
        }
        Ok(())
    }

    /// Takes the guest's packets, at most as many as the budget allows and as there is room for answers.
    fn take_packets(&mut self, hub: &mut Hub) -> Result<(), QueueError> {
        let mut budget = BUDGET;
        self.takes_later = true;
        self.tx.announce(false)?;
        while !hub.is_clogged() {
            if budget.chains == 0 || budget.bytes == 0 {
                hub.poll().call_again();
                return Ok(());
            }
            budget.chains -= 1;
            if let Some(chain) = self.tx.pop()? {
                let head = chain.head;
                budget.bytes = budget.bytes.saturating_sub(chain.readable.len().into());
                self.take_packet(hub, chain)?;
                self.tx.push(head, 0)?;
                self.used = true;
            } else if !self.tx.announce(true)? {
                self.takes_later = false;
                return Ok(());
            }
        }
        Ok(())
    }

    fn take_packet(&self, hub: &mut Hub, chain: Chain) -> Result<(), QueueError> {
        let mut bytes = [0; HEADER_SIZE];
        let mut packet = chain.readable;
        packet.read(&self.memory, &mut bytes)?;
        let data = packet.split_off(HEADER_LENGTH);
        hub.take(&Header::decode(&bytes), &self.memory, data)
    }

    /// Gives the guest what there is for it, as far as it has buffers and the budget allows.
    fn give_packets(&mut self, hub: &mut Hub) -> Result<(), QueueError> {
        let mut budget = BUDGET;
        while hub.has_work() {
            if budget.chains == 0 || budget.bytes == 0 {
                hub.poll().call_again();
                return Ok(());
            }
            budget.chains -= 1;
            let Some(chain) = self.rx.pop()? else {
                // The guest says when it has more buffers, only while something waits for them.
                if self.rx.announce(true)? {
                    continue;
                }
                return Ok(());
            };
            let mut header = chain.writable;
            let room = header.split_off(HEADER_LENGTH);
            if room.is_empty() {
                return Err(QueueError::TooShort);
            }
            let Some(packet) = hub.next(&self.memory, &room)? else {
                self.rx.unpop();
                break;
            };
            header.write(&self.memory, &packet.encode())?;
            self.rx.push(chain.head, HEADER_LENGTH + packet.len)?;
            self.used = true;
            budget.bytes = budget.bytes.saturating_sub(packet.len.into());
        }
        self.rx.announce(false)?;
        Ok(())
    }

    /// Tells the guest that its connections are gone, once it has a buffer for that.
    fn send_event(&mut self) -> Result<(), QueueError> {
        let Ok(queue) = &mut self.event else {
            return Ok(());
        };
        if !self.event_owed {
            return Ok(());
        }
        if let Some(chain) = queue.pop()? {
            chain.writable.write(&self.memory, &EVENT_TRANSPORT_RESET.to_le_bytes())?;
            queue.push(chain.head, 4)?;
            self.event_owed = false;
            // Rare and important: said whatever the driver asked for.
            self.interrupt.used();
        }
        Ok(())
    }

    /// Interrupts the guest once for all buffers used since the last time, where it wants that.
    fn interrupt(&mut self) -> Result<(), QueueError> {
        if std::mem::take(&mut self.used)
            && (self.rx.needs_interrupt()? | self.tx.needs_interrupt()?)
        {
            self.interrupt.used();
        }
        Ok(())
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver")
            .field("takes_later", &self.takes_later)
            .field("event_owed", &self.event_owed)
            .finish_non_exhaustive()
    }
}

/// The device's name in errors.
const NAME: &str = "vsock";

const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;

const QUEUE_SIZES: [u16; 3] = [256; 3];

/// `VIRTIO_VSOCK_F_STREAM`: stream sockets (section 5.10.3).
const FEATURE_STREAM: u64 = 1;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (section 5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// How much one call does in either direction.
const BUDGET: Budget = Budget { chains: 512, bytes: 4 << 20 };

#[cfg(test)]
mod tests;
