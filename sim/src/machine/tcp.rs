//! TCP between the guest and its host: connections through mapped ports, and those of programs to the host's loopback.

use super::{
    Shared,
    link::{Pipe, SimLink},
};
use crate::{
    guest::Address,
    host::{SimTcpStream, Target},
    rng::Purpose,
    trace::Tag,
};
use std::{
    io,
    sync::{Arc, Weak},
    time::Duration,
};
use vm_core::{env::Env, fault::FaultKind, machine::MachineError};
use vm_trait::NetworkConfig;

/// How long the host takes to answer a program of the guest.
const ANSWER: (Duration, Duration) = (Duration::from_micros(50), Duration::from_micros(500));

impl Shared {
    /// Leads a connection of the host to a port of the guest. While the machine stands still, that takes until it goes
    /// on.
    ///
    /// Where nothing in the guest listens it is refused, or accepted and ended, as the network's real means do it.
    pub(crate) async fn lead(self: &Arc<Self>, port: u16) -> io::Result<SimTcpStream> {
        let passt = matches!(self.spec().config.network, NetworkConfig::Passt(_));
        match self.dial(Address::Tcp(port)).await {
            Ok(link) => Ok(SimTcpStream::new(link)),
            Err(MachineError::NotListening) if passt => Ok(SimTcpStream::ended()),
            Err(MachineError::Ended) => Err(io::ErrorKind::ConnectionReset.into()),
            Err(_) => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }

    /// Connects a program of the guest to a loopback port of the host, or refuses it. No lock may be held.
    pub(super) fn reach_host(self: &Arc<Self>, socket: u32, port: u16) {
        let world = self.world();
        let now = world.now();
        let answer_at = now + world.streams.duration(Purpose::Network, ANSWER.0, ANSWER.1);
        let target = world.host().tcp.target(port);
        let answers = !matches!(target, Target::Nobody);
        let accepted = answers && self.strike(FaultKind::NetRefused).is_none();
        let mut state = self.lock();
        if state.exit.is_some() {
            return;
        }
        let pipe = Pipe::to_socket(socket, answer_at, accepted).over_tcp();
        let conn = state.lines.add(pipe);
        drop(state);
        let numbers = [13, port.into(), conn.0, u64::from(accepted)];
        world.note(Some(self.vm()), Tag::Machine, &numbers, || {
            format!("connects to the host's port {port}, connection {}", conn.0)
        });
        if !accepted {
            return;
        }
        let stream = SimTcpStream::new(SimLink::new(Arc::clone(self), conn));
        match target {
            Target::Nobody => {}
            Target::Listener => {
                // One too many is closed, when the host is not locked any more.
                let refused = world.host().tcp.queue(port, stream);
                drop(refused);
            }
            Target::Machine(other, guest) => self.join(stream, other, guest),
        }
    }

    /// Carries bytes between a connection of this guest and a port of another machine's.
    fn join(&self, mut here: SimTcpStream, other: Weak<Self>, port: u16) {
        let carry = async move {
            let Some(other) = other.upgrade() else { return };
            if let Ok(mut there) = other.lead(port).await {
                drop(other);
                // However it ends, both ends are closed.
                let _ = tokio::io::copy_bidirectional(&mut here, &mut there).await;
            }
        };
        self.world().env.spawn("network", Box::pin(carry));
    }
}
