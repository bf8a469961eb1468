//! Vsock sockets: byte streams between the guest's programs and its host.
//!
//! A socket is a pair of bounded queues in the guest's kernel. The machine moves bytes between them and the host. A
//! saved or copied guest finds every connection reset, and its listeners listening, as a real one does when its
//! transport was reset (virtio 1.2, section 5.10.6.7).

use super::{
    kernel::{Kernel, SimOs},
    pipe::Queue,
    process::Opened,
    syscalls::Syscalls,
    vfs::OpenFlags,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use vm_guest_agent::os::{Errno, SysResult};
use vm_guest_protocol::AGENT_PORT;

/// How many bytes of the host a socket holds.
const INBOX: usize = 256 << 10;
/// How many bytes for the host a socket holds.
const OUTBOX: usize = 64 << 10;
/// How many connections wait for a program to accept them.
const BACKLOG: usize = 128;
/// Ports below are root's.
const FIRST_UNPRIVILEGED: u32 = 1024;

const NOTSOCK: Errno = Errno(88);
const ADDRINUSE: Errno = Errno(98);
const CONNRESET: Errno = Errno(104);

/// The sockets of a guest.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Vsock {
    sockets: BTreeMap<u32, Socket>,
    listeners: BTreeMap<u32, VecDeque<u32>>,
    /// Connections that programs want to the host, which the machine has not heard of yet: socket and port.
    dials: Vec<(u32, u32)>,
    last: u32,
}

/// The guest's end of a connection.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Socket {
    /// The host has not answered yet.
    connecting: bool,
    inbox: Queue,
    outbox: Queue,
    /// The host writes no more.
    peer_done: bool,
    /// The host reads no more.
    peer_gone: bool,
    /// The guest writes no more.
    done: bool,
    /// The connection was refused, or lost.
    reset: bool,
    /// No descriptor names it any more.
    closed: bool,
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
    /// Listens on a vsock port for connections of the host, and gives a descriptor for
    /// [`vsock_accept`](Self::vsock_accept). It is readable while a connection waits.
    ///
    /// # Errors
    /// `INVAL` for the ports 0 and `u32::MAX`; `ACCES` for a port below 1024, unless the user is root; 98, `ADDRINUSE`;
    /// `MFILE`.
    pub fn vsock_listen(&mut self, port: u32) -> SysResult<u32> {
        if port == 0 || port == u32::MAX {
            return Err(Errno::INVAL);
        }
        if port < FIRST_UNPRIVILEGED && self.uid() != 0 {
            return Err(Errno::ACCES);
        }
        let kernel = &mut self.os.kernel;
        if port == AGENT_PORT || kernel.vsock.listeners.contains_key(&port) {
            return Err(ADDRINUSE);
        }
        kernel.vsock.listeners.insert(port, VecDeque::new());
        let file = kernel.add_file(Opened::Listener(port), OpenFlags::default());
        kernel.install(self.pid, file, 0)
    }

    /// Takes the oldest connection that waits at a listener, and gives a descriptor that reads and writes.
    ///
    /// # Errors
    /// `AGAIN` when none waits; `INVAL` for what is no listener; `MFILE`; `BADF`.
    pub fn vsock_accept(&mut self, fd: u32) -> SysResult<u32> {
        let kernel = &mut self.os.kernel;
        let file = kernel.file_of(self.pid, fd)?;
        let Some(Opened::Listener(port)) = kernel.files.get(&file).map(|open| &open.what) else {
            return Err(Errno::INVAL);
        };
        let waiting = kernel.vsock.listeners.get_mut(port).ok_or(Errno::INVAL)?;
        let socket = waiting.pop_front().ok_or(Errno::AGAIN)?;
        kernel.install_socket(self.pid, socket)
    }

    /// Begins to connect to a vsock port of the host, and gives a descriptor. It becomes writable when the host has
    /// answered, and [`vsock_connected`](Self::vsock_connected) says how.
    ///
    /// # Errors
    /// `MFILE`.
    pub fn vsock_connect(&mut self, port: u32) -> SysResult<u32> {
        let kernel = &mut self.os.kernel;
        let socket = kernel.vsock.add(Socket { connecting: true, ..Socket::default() });
        let fd = kernel.install_socket(self.pid, socket)?;
        kernel.vsock.dials.push((socket, port));
        Ok(fd)
    }

    /// Says how connecting went.
    ///
    /// # Errors
    /// `AGAIN` while the host has not answered; 104, `CONNRESET`, where it refused or the connection was lost; 88,
    /// `NOTSOCK`; `BADF`.
    pub fn vsock_connected(&self, fd: u32) -> SysResult<()> {
        let socket = self.os.kernel.vsock.sockets.get(&self.socket_of(fd)?).ok_or(CONNRESET)?;
        match socket {
            Socket { reset: true, .. } => Err(CONNRESET),
            Socket { connecting: true, .. } => Err(Errno::AGAIN),
            _ => Ok(()),
        }
    }

    /// Ends the writing side of a connection: the host reads end-of-file behind what was written.
    ///
    /// # Errors
    /// 88, `NOTSOCK`; `BADF`.
    pub fn vsock_shutdown(&mut self, fd: u32) -> SysResult<()> {
        let id = self.socket_of(fd)?;
        if let Some(socket) = self.os.kernel.vsock.sockets.get_mut(&id) {
            socket.done = true;
        }
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

impl Vsock {
    fn add(&mut self, socket: Socket) -> u32 {
        loop {
            self.last = self.last.wrapping_add(1);
            if !self.sockets.contains_key(&self.last) {
                self.sockets.insert(self.last, socket);
                return self.last;
            }
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
            it if to_write => it.done || it.peer_gone || it.outbox.len() < OUTBOX,
            it => it.peer_done || it.inbox.len() > 0,
        }
    }

    pub(super) fn has_waiting(&self, port: u32) -> bool {
        self.listeners.get(&port).is_none_or(|waiting| !waiting.is_empty())
    }

    /// The last descriptor of a listener is gone.
    pub(super) fn close_listener(&mut self, port: u32) {
        for socket in self.listeners.remove(&port).unwrap_or_default() {
            self.close(socket);
        }
    }

    /// The last descriptor of a socket is gone; what was written still goes to the host.
    pub(super) fn close(&mut self, id: u32) {
        let Some(socket) = self.sockets.get_mut(&id) else { return };
        (socket.done, socket.closed) = (true, true);
        socket.inbox = Queue::default();
        if socket.peer_gone || socket.reset {
            self.sockets.remove(&id);
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
    /// Connects the host to a port, where a program listens and takes more.
    pub(crate) fn vsock_dial(&mut self, port: u32) -> Option<u32> {
        let vsock = &mut self.kernel.vsock;
        vsock.listeners.get(&port).filter(|waiting| waiting.len() < BACKLOG)?;
        let socket = vsock.add(Socket::default());
        vsock.listeners.entry(port).or_default().push_back(socket);
        Some(socket)
    }

    /// Takes the connections that programs want: socket and port.
    pub(crate) fn vsock_take_dials(&mut self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.kernel.vsock.dials)
    }

    /// Says whether programs want connections.
    pub(crate) fn vsock_has_dials(&self) -> bool {
        !self.kernel.vsock.dials.is_empty()
    }

    /// Answers a program that connects.
    pub(crate) fn vsock_answer(&mut self, id: u32, accepted: bool) {
        self.kernel.vsock.change(id, |socket| {
            socket.connecting = false;
            socket.reset |= !accepted;
        });
    }

    /// Gives how many bytes of the host a socket takes. One that is closed takes all, and drops them.
    pub(crate) fn vsock_room(&self, id: u32) -> usize {
        match self.kernel.vsock.sockets.get(&id) {
            Some(socket) if !socket.closed => INBOX.saturating_sub(socket.inbox.len()),
            _ => usize::MAX,
        }
    }

    /// Brings bytes of the host.
    pub(crate) fn vsock_deliver(&mut self, id: u32, bytes: Bytes) {
        self.kernel.vsock.change(id, |socket| {
            if !socket.closed {
                socket.inbox.push(bytes);
            }
        });
    }

    /// The host writes no more, and, where it is `gone`, reads no more.
    pub(crate) fn vsock_peer_closed(&mut self, id: u32, gone: bool) {
        self.kernel.vsock.change(id, |socket| {
            socket.peer_done = true;
            if gone {
                socket.peer_gone = true;
                socket.outbox = Queue::default();
            }
        });
    }

    /// Takes at most `max` bytes for the host, and says what follows them.
    pub(crate) fn vsock_take(&mut self, id: u32, max: usize) -> (Bytes, SocketEnd) {
        let Some(socket) = self.kernel.vsock.sockets.get_mut(&id) else {
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
            self.kernel.vsock.change(id, |socket| socket.peer_gone = true);
        }
        (bytes, end)
    }

    /// Cuts all connections, as a reset of the transport does; listeners stay.
    pub(crate) fn vsock_reset(&mut self) {
        let vsock = &mut self.kernel.vsock;
        vsock.dials.clear();
        for waiting in vsock.listeners.values_mut() {
            for socket in waiting.drain(..) {
                vsock.sockets.remove(&socket);
            }
        }
        for socket in vsock.sockets.values_mut() {
            socket.reset = true;
            socket.outbox = Queue::default();
        }
        vsock.sockets.retain(|_, socket| !socket.closed);
    }
}
