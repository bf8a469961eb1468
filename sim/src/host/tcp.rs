//! The host's loopback TCP ports: programs of the host listen there and connect, and machines have those they map.

use super::SimHost;
use crate::{machine::Shared, rng::Purpose, trace::Tag, world::World};
use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    future::poll_fn,
    io,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vm_core::machine::{Link, MachineError};
use vm_planted_bugs::{Bug, planted};
use vm_trait::{PortForward, VmId};

/// How many connections wait until the listener takes them.
const BACKLOG: usize = 128;
/// How many bytes are under way each way between two programs of the host.
const CAPACITY: usize = 64 << 10;
/// The first port that a listener is given that asks for none.
const FIRST_FREE: u16 = 32_768;
/// How long it takes to be connected within the host.
const CONNECT: (Duration, Duration) = (Duration::from_micros(10), Duration::from_micros(100));

/// One life of a VM.
pub(crate) type Life = (VmId, u64);

/// A connection over the host's loopback, as a program of the host has it.
pub struct SimTcpStream(Box<dyn Link>);

/// Listens on a loopback port of the simulated host; dropped, it frees the port and ends what nobody took.
pub struct SimTcpListener {
    world: Arc<World>,
    port: u16,
    number: u64,
}

impl SimHost {
    /// Connects a program of the host to a loopback TCP port. What a machine maps leads into its guest; while that is
    /// paused, this takes until it goes on. When the future is dropped, nothing is left of it.
    ///
    /// # Errors
    /// `ConnectionRefused` where nobody listens; `ConnectionReset` where the machine ends meanwhile.
    ///
    /// ```
    /// use tokio::io::{AsyncReadExt, AsyncWriteExt};
    /// # use vm_sim::SimBackend;
    /// # use vm_trait::*;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let backend = SimBackend::builder().seed(1).build()?;
    /// let network = NetworkConfig::tsi().with_port(8080, 5000);
    /// let vm = backend.create(VmConfig::builder().with_network(network).build()?).await?;
    /// vm.start().await?;
    /// let server = vm.spawn(ExecRequest::new("tcp").args(["listen", "--echo", "5000"])).await?;
    /// // It says that it listens.
    /// server.read_stderr().await?;
    /// let mut stream = backend.host().connect(8080).await?;
    /// stream.write_all(b"hello").await?;
    /// let mut back = [0; 5];
    /// stream.read_exact(&mut back).await?;
    /// assert_eq!(&back, b"hello");
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect(&self, port: u16) -> io::Result<SimTcpStream> {
        let world = &self.0;
        world.enter().await;
        world.delay(Purpose::Network, CONNECT.0, CONNECT.1).await;
        let target = world.host().tcp.target(port);
        world.note(None, Tag::Machine, &[12, port.into()], || {
            format!("the host connects to its port {port}")
        });
        match target {
            Target::Nobody => Err(io::ErrorKind::ConnectionRefused.into()),
            Target::Machine(machine, guest) => match machine.upgrade() {
                Some(machine) => machine.lead(guest).await,
                None => Err(io::ErrorKind::ConnectionRefused.into()),
            },
            Target::Listener => {
                let (near, far) = tokio::io::duplex(CAPACITY);
                let refused = world.host().tcp.queue(port, SimTcpStream::new(far));
                match refused {
                    None => Ok(SimTcpStream::new(near)),
                    Some(_) => Err(io::ErrorKind::ConnectionRefused.into()),
                }
            }
        }
    }

    /// Listens on a loopback TCP port as a program of the host; port 0 stands for any free one.
    ///
    /// # Errors
    /// `AddrInUse` where a machine or another program has the port.
    pub async fn listen(&self, port: u16) -> io::Result<SimTcpListener> {
        self.0.enter().await;
        let (port, number) = self.0.host().tcp.listen(port)?;
        Ok(SimTcpListener { world: Arc::clone(&self.0), port, number })
    }
}

impl SimTcpListener {
    /// Gives the port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Waits for the next connection, of a guest or of the host. When the future is dropped, none is lost.
    ///
    /// # Errors
    /// `ConnectionAborted` once the host was lost.
    pub async fn accept(&mut self) -> io::Result<SimTcpStream> {
        self.world.enter().await;
        poll_fn(|cx| {
            let mut host = self.world.host();
            match host.tcp.queue_of(self.port, self.number) {
                None => Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into())),
                Some(queue) => match queue.waiting.pop_front() {
                    Some(stream) => Poll::Ready(Ok(stream)),
                    None => {
                        queue.acceptor = Some(cx.waker().clone());
                        Poll::Pending
                    }
                },
            }
        })
        .await
    }
}

impl Drop for SimTcpListener {
    fn drop(&mut self) {
        // Streams are dropped when the host is not locked any more.
        let ended = self.world.host().tcp.end_listener(self.port, self.number);
        drop(ended);
    }
}

impl SimTcpStream {
    pub(crate) fn new(link: impl Link + 'static) -> Self {
        Self(Box::new(link))
    }

    /// Makes one whose other end is gone already.
    pub(crate) fn ended() -> Self {
        Self::new(tokio::io::duplex(1).0)
    }
}

impl AsyncRead for SimTcpStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for SimTcpStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl fmt::Debug for SimTcpStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimTcpStream")
    }
}

impl fmt::Debug for SimTcpListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimTcpListener").field("port", &self.port).finish_non_exhaustive()
    }
}

/// The ports that somebody has.
#[derive(Debug, Default)]
pub(crate) struct TcpPorts {
    taken: BTreeMap<u16, Taken>,
    listeners: u64,
}

#[derive(Debug)]
enum Taken {
    Machine {
        life: Life,
        machine: Weak<Shared>,
        /// The guest's port.
        guest: u16,
    },
    Listener(Queue),
}

#[derive(Debug, Default)]
pub(crate) struct Queue {
    number: u64,
    waiting: VecDeque<SimTcpStream>,
    acceptor: Option<Waker>,
}

/// Who answers on a port.
#[derive(Debug)]
pub(crate) enum Target {
    Nobody,
    Machine(Weak<Shared>, u16),
    Listener,
}

impl TcpPorts {
    /// Gives a machine the ports that it maps, all of them or none.
    pub(crate) fn take(&mut self, ports: &[PortForward], life: Life) -> Result<(), MachineError> {
        if let Some(port) = ports.iter().find(|port| self.taken.contains_key(&port.host)) {
            return Err(MachineError::PortInUse(port.host.into()));
        }
        for port in ports {
            let lost = planted(Bug::PortLeadsAstray);
            let guest = if lost { ports[0].guest } else { port.guest };
            self.taken.insert(port.host, Taken::Machine { life, machine: Weak::new(), guest });
        }
        Ok(())
    }

    /// Gives a machine ports that another has, which a planted bug does.
    pub(crate) fn take_over(
        &mut self,
        ports: &[PortForward],
        life: Life,
    ) -> Result<(), MachineError> {
        ports.iter().for_each(|port| drop(self.taken.remove(&port.host)));
        self.take(ports, life)
    }

    /// Lets a machine answer on its ports.
    pub(crate) fn open(&mut self, of: Life, answering: &Arc<Shared>) {
        for taken in self.taken.values_mut() {
            if let Taken::Machine { life, machine, .. } = taken
                && *life == of
            {
                *machine = Arc::downgrade(answering);
            }
        }
    }

    /// Frees the ports of a machine.
    pub(crate) fn free(&mut self, of: Life) {
        if !planted(Bug::PortOutlivesMachine) {
            self.taken.retain(|_, it| !matches!(it, Taken::Machine { life, .. } if *life == of));
        }
    }

    pub(crate) fn target(&self, port: u16) -> Target {
        match self.taken.get(&port) {
            None => Target::Nobody,
            Some(Taken::Machine { machine, guest, .. }) => Target::Machine(machine.clone(), *guest),
            Some(Taken::Listener(_)) => Target::Listener,
        }
    }

    /// Brings a connection to a listener; gives it back where there is none or too many wait.
    pub(crate) fn queue(&mut self, port: u16, stream: SimTcpStream) -> Option<SimTcpStream> {
        match self.taken.get_mut(&port) {
            Some(Taken::Listener(queue)) if queue.waiting.len() < BACKLOG => {
                queue.waiting.push_back(stream);
                if let Some(waker) = queue.acceptor.take() {
                    waker.wake();
                }
                None
            }
            _ => Some(stream),
        }
    }

    /// Ends all listeners, and gives what waited there, to be dropped when the host is not locked.
    pub(super) fn crash(&mut self) -> Vec<SimTcpStream> {
        let mut ended = Vec::new();
        for taken in self.taken.values_mut() {
            if let Taken::Listener(queue) = taken {
                ended.extend(queue.waiting.drain(..));
                if let Some(waker) = queue.acceptor.take() {
                    waker.wake();
                }
            }
        }
        self.taken.retain(|_, taken| !matches!(taken, Taken::Listener(_)));
        ended
    }

    pub(crate) fn count(&self) -> u64 {
        self.taken.len() as u64
    }

    fn listen(&mut self, port: u16) -> io::Result<(u16, u64)> {
        let free = || (FIRST_FREE..=u16::MAX).find(|port| !self.taken.contains_key(port));
        let port = if port == 0 { free() } else { Some(port) };
        let port = port.filter(|port| !self.taken.contains_key(port));
        let port = port.ok_or(io::ErrorKind::AddrInUse)?;
        self.listeners += 1;
        let number = self.listeners;
        self.taken.insert(port, Taken::Listener(Queue { number, ..Queue::default() }));
        Ok((port, number))
    }

    fn queue_of(&mut self, port: u16, of: u64) -> Option<&mut Queue> {
        match self.taken.get_mut(&port) {
            Some(Taken::Listener(queue)) if queue.number == of => Some(queue),
            _ => None,
        }
    }

    fn end_listener(&mut self, port: u16, number: u64) -> Option<Taken> {
        self.queue_of(port, number)?;
        self.taken.remove(&port)
    }
}
