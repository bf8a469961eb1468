//! Sockets: byte streams between the guest's programs and its host, over vsock and TCP, and among the programs over TCP.
//!
//! A socket is a pair of bounded queues in the guest's kernel. The machine moves bytes between them and the host; two
//! sockets of the guest's own loopback put them into each other's. A saved or copied guest finds every connection to the
//! host reset, and its listeners listening, as a real one does when its transport was reset (virtio 1.2, section
//! 5.10.6.7). The connections of its own loopback are in its memory and go on.

use super::{
    kernel::{Kernel, SimOs},
    pipe::Queue,
    process::Opened,
    syscalls::Syscalls,
    vfs::OpenFlags,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, VecDeque},
    net::Ipv4Addr,
};
use vm_guest_agent::os::{Errno, SysResult};
use vm_guest_protocol::AGENT_PORT;
use vm_planted_bugs::{Bug, planted};

/// How many bytes of the other side a socket holds.
const INBOX: usize = 256 << 10;
/// How many bytes for the host a socket holds.
const OUTBOX: usize = 64 << 10;
/// How many connections wait for a program to accept them.
const BACKLOG: usize = 128;
/// Ports below are root's.
const FIRST_UNPRIVILEGED: u32 = 1024;

const NOTSOCK: Errno = Errno(88);
const ADDRINUSE: Errno = Errno(98);
const NETUNREACH: Errno = Errno(101);
const CONNRESET: Errno = Errno(104);
const CONNREFUSED: Errno = Errno(111);

/// Where a program listens, or what it connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Address {
    Vsock(u32),
    Tcp(u16),
}

/// The sockets of a guest.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Sockets {
    sockets: BTreeMap<u32, Socket>,
    listeners: BTreeMap<Address, VecDeque<u32>>,
    /// Connections that programs want to the host, which the machine has not heard of yet.
    dials: Vec<(u32, Address)>,
    last: u32,
    /// What nothing in the guest listens for on its loopback is the host's to answer.
    host_loopback: bool,
}

/// The guest's end of a connection.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Socket {
    /// The host has not answered yet.
    connecting: bool,
    inbox: Queue,
    outbox: Queue,
    /// The other side writes no more.
    peer_done: bool,
    /// The other side reads no more.
    peer_gone: bool,
    /// The guest writes no more.
    done: bool,
    /// The connection was refused, or lost.
    reset: bool,
    /// How it fails when it is `reset` before it was there.
    refusal: Option<i32>,
    /// No descriptor names it any more.
    closed: bool,
    /// It was connected within the guest.
    local: bool,
    /// The socket at the other end, where that is the guest's too and not gone.
    peer: Option<u32>,
}

/// What the guest's side of a connection has come to, once what it wrote was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketEnd {
    /// Nothing: it may write on.
    Open,
    /// It writes no more.
    Done,
    /// It is gone.
    Gone,
}

impl Syscalls<'_> {
    /// Listens on a vsock port for connections of the host, and gives a descriptor for [`accept`](Self::accept). It is
    /// readable while a connection waits.
    ///
    /// # Errors
    /// `INVAL` for the ports 0 and `u32::MAX`; `ACCES` for a port below 1024, unless the user is root; 98, `ADDRINUSE`;
    /// `MFILE`.
    pub fn vsock_listen(&mut self, port: u32) -> SysResult<u32> {
        if port == u32::MAX {
            return Err(Errno::INVAL);
        }
        self.listen(Address::Vsock(port), port)
    }

    /// Listens on a TCP port, at every address of the guest, as [`vsock_listen`](Self::vsock_listen) does.
    ///
    /// # Errors
    /// `INVAL` for port 0; `ACCES` for a port below 1024, unless the user is root; 98, `ADDRINUSE`; `MFILE`.
    pub fn tcp_listen(&mut self, port: u16) -> SysResult<u32> {
        self.listen(Address::Tcp(port), port.into())
    }

    fn listen(&mut self, address: Address, port: u32) -> SysResult<u32> {
        if port == 0 {
            return Err(Errno::INVAL);
        }
        if port < FIRST_UNPRIVILEGED && self.uid() != 0 {
            return Err(Errno::ACCES);
        }
        let kernel = &mut self.os.kernel;
        if address == Address::Vsock(AGENT_PORT) || kernel.sockets.listeners.contains_key(&address)
        {
            return Err(ADDRINUSE);
        }
        kernel.sockets.listeners.insert(address, VecDeque::new());
        let file = kernel.add_file(Opened::Listener(address), OpenFlags::default());
        kernel.install(self.pid, file, 0)
    }

    /// Takes the oldest connection that waits at a listener, and gives a descriptor that reads and writes.
    ///
    /// # Errors
    /// `AGAIN` when none waits; `INVAL` for what is no listener; `MFILE`; `BADF`.
    pub fn accept(&mut self, fd: u32) -> SysResult<u32> {
        let kernel = &mut self.os.kernel;
        let file = kernel.file_of(self.pid, fd)?;
        let Some(Opened::Listener(address)) = kernel.files.get(&file).map(|open| &open.what) else {
            return Err(Errno::INVAL);
        };
        let waiting = kernel.sockets.listeners.get_mut(address).ok_or(Errno::INVAL)?;
        let socket = waiting.pop_front().ok_or(Errno::AGAIN)?;
        kernel.install_socket(self.pid, socket)
    }

    /// Begins to connect to a vsock port of the host, and gives a descriptor. It becomes writable when the host has
    /// answered, and [`connected`](Self::connected) says how.
    ///
    /// # Errors
    /// `MFILE`.
    pub fn vsock_connect(&mut self, port: u32) -> SysResult<u32> {
        let dialling = Socket { refusal: Some(CONNRESET.0), ..Socket::default() };
        self.dial_host(dialling, Address::Vsock(port))
    }

    /// Begins to connect to a TCP port, and gives a descriptor as [`vsock_connect`](Self::vsock_connect) does. A
    /// loopback address is the guest's own; where nothing listens there and the guest's network is the host's sockets,
    /// it is the host's. No other address leads anywhere.
    ///
    /// # Errors
    /// 111, `CONNREFUSED`, where nothing listens and nobody else can be asked; 101, `NETUNREACH`; `INVAL` for port 0;
    /// `MFILE`.
    pub fn tcp_connect(&mut self, address: Ipv4Addr, port: u16) -> SysResult<u32> {
        if port == 0 {
            return Err(Errno::INVAL);
        }
        if !address.is_loopback() {
            return Err(NETUNREACH);
        }
        let sockets = &mut self.os.kernel.sockets;
        let address = Address::Tcp(port);
        match sockets.listeners.get(&address) {
            Some(waiting) if waiting.len() >= BACKLOG => Err(CONNREFUSED),
            Some(_) => {
                let own = sockets.add_pair(address);
                self.os.kernel.install_socket(self.pid, own)
            }
            None if sockets.host_loopback || planted(Bug::LonelyGuestReachesHost) => {
                let dialling = Socket { refusal: Some(CONNREFUSED.0), ..Socket::default() };
                self.dial_host(dialling, address)
            }
            None => Err(CONNREFUSED),
        }
    }

    fn dial_host(&mut self, socket: Socket, address: Address) -> SysResult<u32> {
        let kernel = &mut self.os.kernel;
        let socket = kernel.sockets.add(Socket { connecting: true, ..socket });
        let fd = kernel.install_socket(self.pid, socket)?;
        kernel.sockets.dials.push((socket, address));
        Ok(fd)
    }

    /// Says how connecting went.
    ///
    /// # Errors
    /// `AGAIN` while the host has not answered; where it refused, 104, `CONNRESET`, of vsock and 111, `CONNREFUSED`, of
    /// TCP; `CONNRESET` where the connection was lost; 88, `NOTSOCK`; `BADF`.
    pub fn connected(&self, fd: u32) -> SysResult<()> {
        let socket = self.os.kernel.sockets.sockets.get(&self.socket_of(fd)?).ok_or(CONNRESET)?;
        match socket {
            Socket { reset: true, refusal, .. } => Err(refusal.map_or(CONNRESET, Errno)),
            Socket { connecting: true, .. } => Err(Errno::AGAIN),
            _ => Ok(()),
        }
    }

    /// Ends the writing side of a connection: the other side reads end-of-file behind what was written.
    ///
    /// # Errors
    /// 88, `NOTSOCK`; `BADF`.
    pub fn shutdown(&mut self, fd: u32) -> SysResult<()> {
        let id = self.socket_of(fd)?;
        self.os.kernel.sockets.finish(id);
        Ok(())
    }

    fn socket_of(&self, fd: u32) -> SysResult<u32> {
        let file = self.os.kernel.file_of(self.pid, fd)?;
        match self.os.kernel.files.get(&file).map(|open| &open.what) {
            Some(Opened::Socket(socket)) => Ok(*socket),
            _ => Err(NOTSOCK),
        }
    }
}

impl Kernel {
    fn install_socket(&mut self, pid: u32, socket: u32) -> SysResult<u32> {
        let both = OpenFlags { read: true, write: true, ..OpenFlags::default() };
        let file = self.add_file(Opened::Socket(socket), both);
        self.install(pid, file, 0)
    }
}

impl Sockets {
    fn add(&mut self, socket: Socket) -> u32 {
        loop {
            self.last = self.last.wrapping_add(1);
            if !self.sockets.contains_key(&self.last) {
                self.sockets.insert(self.last, socket);
                return self.last;
            }
        }
    }

    /// Decides that the host answers on the guest's loopback where nothing in the guest does.
    pub(super) fn reach_host(&mut self) {
        self.host_loopback = true;
    }

    /// Connects two sockets of the guest; one waits at the listener.
    fn add_pair(&mut self, address: Address) -> u32 {
        let own = self.add(Socket { local: true, ..Socket::default() });
        let other = self.add(Socket { local: true, peer: Some(own), ..Socket::default() });
        self.change(own, |socket| socket.peer = Some(other));
        self.listeners.entry(address).or_default().push_back(other);
        own
    }

    /// The guest writes no more.
    fn finish(&mut self, id: u32) {
        let Some(socket) = self.sockets.get_mut(&id) else { return };
        socket.done = true;
        if let Some(peer) = socket.peer {
            self.change(peer, |peer| peer.peer_done = true);
        }
    }

    pub(super) fn read(&mut self, id: u32, max: usize) -> SysResult<Bytes> {
        let socket = self.sockets.get_mut(&id).ok_or(Errno::BADF)?;
        if socket.inbox.len() > 0 {
            return Ok(socket.inbox.pop(max));
        }
        match socket {
            Socket { reset: true, .. } => Err(CONNRESET),
            Socket { peer_done: true, .. } => Ok(Bytes::new()),
            _ => Err(Errno::AGAIN),
        }
    }

    pub(super) fn write(&mut self, id: u32, mut bytes: Bytes) -> SysResult<usize> {
        let socket = self.sockets.get_mut(&id).ok_or(Errno::BADF)?;
        match socket {
            Socket { reset: true, .. } => return Err(CONNRESET),
            Socket { connecting: true, .. } => return Err(Errno::AGAIN),
            Socket { done: true, .. } | Socket { peer_gone: true, .. } => return Err(Errno::PIPE),
            _ => {}
        }
        if bytes.is_empty() {
            return Ok(0);
        }
        if let Some(peer) = socket.peer {
            let peer = self.sockets.get_mut(&peer).ok_or(Errno::PIPE)?;
            bytes.truncate(INBOX.saturating_sub(peer.inbox.len()));
            if bytes.is_empty() {
                return Err(Errno::AGAIN);
            }
            let taken = bytes.len();
            peer.inbox.push(bytes);
            return Ok(taken);
        }
        bytes.truncate(OUTBOX.saturating_sub(socket.outbox.len()));
        if bytes.is_empty() {
            return Err(Errno::AGAIN);
        }
        let taken = bytes.len();
        socket.outbox.push(bytes);
        Ok(taken)
    }

    pub(super) fn is_ready(&self, id: u32, to_write: bool) -> bool {
        let Some(socket) = self.sockets.get(&id) else { return true };
        match socket {
            Socket { reset: true, .. } => true,
            Socket { connecting: true, .. } => false,
            it if to_write => it.done || it.peer_gone || self.has_room(it),
            it => it.peer_done || it.inbox.len() > 0,
        }
    }

    fn has_room(&self, socket: &Socket) -> bool {
        match socket.peer {
            Some(peer) => self.sockets.get(&peer).is_none_or(|it| it.inbox.len() < INBOX),
            None => socket.outbox.len() < OUTBOX,
        }
    }

    pub(super) fn has_waiting(&self, address: Address) -> bool {
        self.listeners.get(&address).is_none_or(|waiting| !waiting.is_empty())
    }

    /// The last descriptor of a listener is gone.
    pub(super) fn close_listener(&mut self, address: Address) {
        for socket in self.listeners.remove(&address).unwrap_or_default() {
            self.close(socket);
        }
    }

    /// The last descriptor of a socket is gone; what was written still goes to the other side.
    pub(super) fn close(&mut self, id: u32) {
        let Some(socket) = self.sockets.get_mut(&id) else { return };
        (socket.done, socket.closed) = (true, true);
        socket.inbox = Queue::default();
        let (local, peer) = (socket.local, socket.peer);
        if local || socket.peer_gone || socket.reset {
            self.sockets.remove(&id);
        }
        if let Some(peer) = peer {
            self.change(peer, |peer| {
                (peer.peer_done, peer.peer_gone) = (true, true);
                peer.peer = None;
            });
        }
    }

    fn change(&mut self, id: u32, change: impl FnOnce(&mut Socket)) {
        if let Some(socket) = self.sockets.get_mut(&id) {
            change(socket);
            if socket.closed && (socket.peer_gone || socket.reset) {
                self.sockets.remove(&id);
            }
        }
    }
}

/// The machine's side.
impl SimOs {
    /// Says whether a program listens there and takes more.
    pub(crate) fn socket_listens(&self, address: Address) -> bool {
        let waiting = self.kernel.sockets.listeners.get(&address);
        waiting.is_some_and(|waiting| waiting.len() < BACKLOG)
    }

    /// Connects the host to where a program listens and takes more.
    pub(crate) fn socket_dial(&mut self, address: Address) -> Option<u32> {
        if !self.socket_listens(address) {
            return None;
        }
        let sockets = &mut self.kernel.sockets;
        let socket = sockets.add(Socket::default());
        sockets.listeners.entry(address).or_default().push_back(socket);
        Some(socket)
    }

    /// Takes the connections that programs want to the host.
    pub(crate) fn socket_take_dials(&mut self) -> Vec<(u32, Address)> {
        std::mem::take(&mut self.kernel.sockets.dials)
    }

    /// Says whether programs want connections.
    pub(crate) fn socket_has_dials(&self) -> bool {
        !self.kernel.sockets.dials.is_empty()
    }

    /// Answers a program that connects.
    pub(crate) fn socket_answer(&mut self, id: u32, accepted: bool) {
        self.kernel.sockets.change(id, |socket| {
            socket.connecting = false;
            socket.reset |= !accepted;
            socket.refusal = socket.refusal.filter(|_| !accepted);
        });
    }

    /// The connection is lost; what has arrived can still be read.
    pub(crate) fn socket_lost(&mut self, id: u32) {
        self.kernel.sockets.change(id, |socket| {
            socket.reset = true;
            socket.outbox = Queue::default();
        });
    }

    /// Gives how many bytes of the host a socket takes. One that is closed takes all, and drops them.
    pub(crate) fn socket_room(&self, id: u32) -> usize {
        match self.kernel.sockets.sockets.get(&id) {
            Some(socket) if !socket.closed => INBOX.saturating_sub(socket.inbox.len()),
            _ => usize::MAX,
        }
    }

    /// Brings bytes of the host.
    pub(crate) fn socket_deliver(&mut self, id: u32, bytes: Bytes) {
        self.kernel.sockets.change(id, |socket| {
            if !socket.closed {
                socket.inbox.push(bytes);
            }
        });
    }

    /// The host writes no more, and, where it is `gone`, reads no more.
    pub(crate) fn socket_peer_closed(&mut self, id: u32, gone: bool) {
        self.kernel.sockets.change(id, |socket| {
            socket.peer_done = true;
            if gone {
                socket.peer_gone = true;
                socket.outbox = Queue::default();
            }
        });
    }

    /// Takes at most `max` bytes for the host, and says what follows them.
    pub(crate) fn socket_take(&mut self, id: u32, max: usize) -> (Bytes, SocketEnd) {
        let Some(socket) = self.kernel.sockets.sockets.get_mut(&id) else {
            return (Bytes::new(), SocketEnd::Gone);
        };
        let bytes = socket.outbox.pop(max);
        let end = match socket {
            it if it.outbox.len() > 0 => SocketEnd::Open,
            Socket { closed: true, .. } | Socket { reset: true, .. } => SocketEnd::Gone,
            Socket { done: true, .. } => SocketEnd::Done,
            _ => SocketEnd::Open,
        };
        if end == SocketEnd::Gone {
            self.kernel.sockets.change(id, |socket| socket.peer_gone = true);
        }
        (bytes, end)
    }

    /// Cuts all connections to the host, as a reset of the transport does; listeners stay.
    pub(crate) fn socket_reset(&mut self) {
        let sockets = &mut self.kernel.sockets;
        sockets.dials.clear();
        for waiting in sockets.listeners.values_mut() {
            waiting.retain(|id| {
                let local = sockets.sockets.get(id).is_some_and(|socket| socket.local);
                if !local {
                    sockets.sockets.remove(id);
                }
                local
            });
        }
        for socket in sockets.sockets.values_mut().filter(|socket| !socket.local) {
            (socket.reset, socket.refusal) = (true, None);
            socket.outbox = Queue::default();
        }
        sockets.sockets.retain(|_, socket| !socket.closed);
    }
}
