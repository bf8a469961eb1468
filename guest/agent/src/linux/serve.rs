//! [`serve`]: the main loop, one thread around poll(2).

use super::{LinuxOs, Scope, ffi};
use crate::{
    core::{AgentConfig, AgentCore, ConnId},
    os::{GuestOs, Output},
};
use bytes::Buf;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::{Errno as Sys, retry_on_intr},
    net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType},
};
use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

/// How many connections are held at once. One more takes the place of the oldest that has not said anything yet.
const MAX_CONNECTIONS: usize = 16;

/// What processes are told before the end.
const SIGTERM: u8 = 15;

/// How much one turn reads from one connection.
const READ_SIZE: usize = 64 << 10;

/// The signals that end an agent that is an ordinary process.
const ENDING_SIGNALS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// The signals by which BusyBox's `halt`, `poweroff` and `reboot` ask the first process for the machine's end.
const MACHINE_SIGNALS: [i32; 3] = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM];

/// How long the guest's processes have to end when one of them asked for the machine's end.
const OWN_GRACE: Duration = Duration::from_secs(1);

/// Where hosts dial: any listening stream socket.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens on a Unix socket that it makes at `path`.
    ///
    /// # Errors
    /// The kernel's, as when something stands at `path` or it is too long for a socket's name.
    pub fn unix(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, 16)?;
        Ok(Self(socket))
    }

    /// Listens on a vsock port, on every address of this machine.
    ///
    /// # Errors
    /// The kernel's, as when the port is taken or the kernel has no vsock.
    pub fn vsock(port: u32) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
        ffi::vsock_bind(socket.as_fd(), port)?;
        rustix::net::listen(&socket, 16)?;
        Ok(Self(socket))
    }
}

/// What the main loop works with beside its listener.
#[derive(Debug)]
pub struct ServeConfig {
    /// The core's bounds.
    pub agent: AgentConfig,
    /// What the agent owns.
    pub scope: Scope,
    /// A pipe whose hang-up ends the loop.
    pub lifeline: Option<OwnedFd>,
}

/// Why the main loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The host asked for it, and every process had its time to end.
    PoweredOff,
    /// The lifeline hung up.
    OwnerGone,
    /// One of TERM, INT and HUP came to an agent that is not the first process.
    Signaled(i32),
}

/// Serves hosts until the end. Processes of the guest may still run then.
///
/// It must be called on the only thread of its process, which would otherwise take the signals it waits for.
///
/// # Errors
/// When waiting itself fails; a connection's errors end only the connection.
pub fn serve(listener: &Listener, config: ServeConfig) -> io::Result<Ended> {
    let mut signals = vec![libc::SIGCHLD];
    signals.extend(match config.scope {
        Scope::Machine => MACHINE_SIGNALS,
        Scope::Descendants | Scope::Children => ENDING_SIGNALS,
    });
    let signals = ffi::signals_as_descriptor(&signals)?;
    let mut agent = Agent {
        core: AgentCore::new(config.agent),
        os: LinuxOs::new(config.scope),
        connections: BTreeMap::new(),
        next_connection: 1,
        accept_paused: false,
        buffer: vec![0; READ_SIZE].into_boxed_slice(),
    };
    let mut ended = false;
    loop {
        let busy = agent.turn();
        if std::mem::take(&mut ended) || agent.os.has_released() {
            // Not before the core has let go of its own children, among which orphans would be hard to find.
            agent.os.reap();
        }
        if agent.os.powered_off() {
            agent.flush();
            return Ok(Ended::PoweredOff);
        }
        let ready = agent.wait(listener, &signals, config.lifeline.as_ref(), busy)?;
        if ready.lifeline && hung_up(config.lifeline.as_ref()) {
            return Ok(Ended::OwnerGone);
        }
        if ready.signals {
            // Where there is another one, the descriptor stays readable.
            match (ffi::next_signal(signals.as_fd()), config.scope) {
                (Some(libc::SIGCHLD) | None, _) => ended = true,
                (Some(signal), Scope::Machine) => agent.end_machine(signal),
                (Some(signal), _) => return Ok(Ended::Signaled(signal)),
            }
        }
        for (connection, readable) in ready.connections {
            agent.receive(connection, readable);
        }
        if ready.listener {
            agent.accept(listener);
        }
    }
}

struct Agent {
    core: AgentCore,
    os: LinuxOs,
    connections: BTreeMap<ConnId, Connection>,
    next_connection: u64,
    /// Whether the last accept ran out of something, so that the listener must be left alone for a moment.
    accept_paused: bool,
    /// What connections are read into.
    buffer: Box<[u8]>,
}

struct Connection {
    socket: OwnedFd,
    /// Whether the host has said anything.
    heard: bool,
}

/// What poll(2) found.
#[derive(Default)]
struct Ready {
    signals: bool,
    lifeline: bool,
    listener: bool,
    /// Connections with something to do, and whether that is reading.
    connections: Vec<(ConnId, bool)>,
}

/// Whom a polled descriptor belongs to.
#[derive(Clone, Copy)]
enum Source {
    Signals,
    Lifeline,
    Listener,
    Connection(ConnId, bool),
    Child,
}

impl Agent {
    /// Sends what the core has to say and lets it work; says whether there may be more to do at once.
    fn turn(&mut self) -> bool {
        self.flush();
        let changed = self.core.advance(&mut self.os);
        self.flush();
        for connection in self.core.to_close() {
            let waiting = self.core.outgoing(connection).is_some_and(|bytes| !bytes.is_empty());
            if !waiting {
                self.drop_connection(connection);
            }
        }
        changed
    }

    /// Sends what can be sent without waiting.
    fn flush(&mut self) {
        let mut lost = Vec::new();
        for (id, Connection { socket, .. }) in &self.connections {
            let Some(bytes) = self.core.outgoing(*id) else {
                continue;
            };
            while !bytes.is_empty() {
                // A host that has hung up is an error here, not a signal.
                match retry_on_intr(|| rustix::net::send(socket, bytes, SendFlags::NOSIGNAL)) {
                    Ok(count) => bytes.advance(count),
                    Err(Sys::AGAIN) => break,
                    Err(_) => {
                        lost.push(*id);
                        break;
                    }
                }
            }
        }
        for id in lost {
            self.drop_connection(id);
        }
    }

    /// Waits until something is to do, or not at all when `busy`.
    fn wait(
        &mut self,
        listener: &Listener,
        signals: &OwnedFd,
        lifeline: Option<&OwnedFd>,
        busy: bool,
    ) -> io::Result<Ready> {
        let mut sources = vec![(Source::Signals, signals.as_fd(), PollFlags::IN)];
        if let Some(lifeline) = lifeline {
            sources.push((Source::Lifeline, lifeline.as_fd(), PollFlags::IN));
        }
        if !self.accept_paused {
            sources.push((Source::Listener, listener.0.as_fd(), PollFlags::IN));
        }
        for (id, Connection { socket, .. }) in &self.connections {
            let reading = self.core.wants_input(*id);
            let writing = self.core.outgoing(*id).is_some_and(|bytes| !bytes.is_empty());
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, reading);
            flags.set(PollFlags::OUT, writing);
            sources.push((Source::Connection(*id, reading), socket.as_fd(), flags));
        }
        for interest in self.core.interest() {
            let child = interest.child;
            for (output, wanted) in
                [(Output::Stdout, interest.stdout), (Output::Stderr, interest.stderr)]
            {
                if let (true, Some(fd)) = (wanted, self.os.output_fd(child, output)) {
                    sources.push((Source::Child, fd, PollFlags::IN));
                }
            }
            if let (true, Some(fd)) = (interest.stdin, self.os.stdin_fd(child)) {
                sources.push((Source::Child, fd, PollFlags::OUT));
            }
        }
        let timeout = self.timeout(busy);
        let mut polled: Vec<PollFd<'_>> =
            sources.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Sys::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = Ready::default();
        for ((source, _, _), fd) in sources.iter().zip(&polled) {
            let events = fd.revents();
            if events.is_empty() {
                continue;
            }
            match source {
                Source::Signals => ready.signals = true,
                Source::Lifeline => ready.lifeline = true,
                Source::Listener => ready.listener = true,
                Source::Connection(id, reading) => {
                    let ended = events.intersects(PollFlags::HUP | PollFlags::ERR);
                    if (*reading && events.contains(PollFlags::IN)) || ended {
                        ready.connections.push((*id, *reading));
                    }
                }
                // The core looks after all its children at every turn.
                Source::Child => {}
            }
        }
        self.accept_paused = false;
        Ok(ready)
    }

    /// Begins what a program of the guest asked for by a signal.
    fn end_machine(&mut self, signal: i32) {
        if signal == libc::SIGTERM {
            self.os.restart_at_the_end();
        }
        self.core.shut_down(SIGTERM, OWN_GRACE, &mut self.os);
    }

    fn timeout(&self, busy: bool) -> Option<Timespec> {
        let mut wait = self.core.next_deadline().map(|at| at.saturating_sub(self.os.monotonic()));
        if self.accept_paused {
            wait = Some(wait.unwrap_or(Duration::MAX).min(Duration::from_millis(100)));
        }
        if busy {
            wait = Some(Duration::ZERO);
        }
        // What the kernel cannot count to is for ever.
        wait.and_then(|wait| Timespec::try_from(wait).ok())
    }

    fn receive(&mut self, id: ConnId, reading: bool) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        // The host has hung up while the core does not want to hear more: nothing more can be said to it either.
        if !reading {
            self.drop_connection(id);
            return;
        }
        match retry_on_intr(|| rustix::io::read(&connection.socket, &mut *self.buffer)) {
            Err(Sys::AGAIN) => {}
            Ok(0) | Err(_) => self.drop_connection(id),
            Ok(read) => {
                connection.heard = true;
                if self.core.received(id, &self.buffer[..read], &mut self.os).is_err() {
                    // What it still has to say, such as why, goes out first if it can.
                    self.flush();
                    self.drop_connection(id);
                }
            }
        }
    }

    fn accept(&mut self, listener: &Listener) {
        for _ in 0..MAX_CONNECTIONS {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::accept_with(&listener.0, flags) {
                Ok(socket) => {
                    if !self.make_room() {
                        // Closing it is all the answer there is.
                        continue;
                    }
                    let id = ConnId(self.next_connection);
                    self.next_connection += 1;
                    self.connections.insert(id, Connection { socket, heard: false });
                    self.core.connected(id);
                }
                Err(Sys::INTR | Sys::CONNABORTED) => {}
                Err(Sys::AGAIN) => return,
                // Out of descriptors or memory: the listener stays readable, so asking at once would spin.
                Err(_) => {
                    self.accept_paused = true;
                    return;
                }
            }
        }
    }

    /// Makes room for one more connection; says whether there is any.
    fn make_room(&mut self) -> bool {
        if self.connections.len() < MAX_CONNECTIONS {
            return true;
        }
        let silent = self.connections.iter().find(|(_, connection)| !connection.heard);
        let Some(id) = silent.map(|(id, _)| *id) else {
            return false;
        };
        self.drop_connection(id);
        true
    }

    fn drop_connection(&mut self, id: ConnId) {
        if self.connections.remove(&id).is_some() {
            self.core.disconnected(id);
        }
    }
}

/// Says whether nobody holds the other end any more; bytes that came are thrown away.
fn hung_up(lifeline: Option<&OwnedFd>) -> bool {
    let Some(lifeline) = lifeline else {
        return false;
    };
    let mut buffer = [0; 64];
    match retry_on_intr(|| rustix::io::read(lifeline, &mut buffer)) {
        Ok(read) => read == 0,
        Err(Sys::AGAIN) => false,
        Err(_) => true,
    }
}
