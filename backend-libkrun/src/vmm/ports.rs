//! [`HostPorts`]: the host's ports that lead to a machine's.

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt},
};
use std::{
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::OwnedFd,
};
use vm_launcher::{
    control::Refusal,
    inside::refuse::{config, failed},
};
use vm_trait::PortForward;

/// Ports of the host that are kept from everybody else for as long as this is there.
///
/// With TSI libkrun listens on a port of the host once the guest listens on its own, and shares the port with whoever of the same
/// user also shares it. So each port is bound here, shared, without listening, which keeps others from it; and to keep
/// another machine from sharing it, each has a name beside it, of the kind that ends with its socket and belongs to the same
/// network namespace.
#[derive(Debug)]
pub(super) struct HostPorts {
    _names: Vec<OwnedFd>,
    bound: Vec<OwnedFd>,
}

impl HostPorts {
    /// Takes the ports.
    ///
    /// # Errors
    /// [`Refusal::PortInUse`], or [`Refusal::Config`] for a port that is not for this user.
    pub(super) fn reserve(ports: &[PortForward]) -> Result<Self, Refusal> {
        let (mut names, mut all_bound) = (Vec::new(), Vec::new());
        for (index, port) in ports.iter().enumerate() {
            let why_not = |error| match error {
                Errno::ADDRINUSE => Refusal::PortInUse(u32::from(port.host)),
                Errno::ACCESS => {
                    let reason = format!("this user may not listen on port {}", port.host);
                    config(&format!("network.ports[{index}].host"), reason)
                }
                other => failed("a port of the host", other),
            };
            names.push(named(port.host).map_err(why_not)?);
            all_bound.push(bound(port.host).map_err(why_not)?);
        }
        Ok(Self { _names: names, bound: all_bound })
    }

    /// Lets go of the ports, for a process of this machine's that listens on them and shares them with nobody. Other machines
    /// are still kept from them.
    pub(super) fn leave(&mut self) {
        self.bound.clear();
    }

    /// Finds a port that cannot be had although this machine has it among its own.
    pub(super) fn taken(ports: &[PortForward]) -> Option<Refusal> {
        let taken = ports.iter().find(|port| matches!(bound(port.host), Err(Errno::ADDRINUSE)))?;
        Some(Refusal::PortInUse(u32::from(taken.host)))
    }
}

fn named(port: u16) -> rustix::io::Result<OwnedFd> {
    let name = format!("twinvm host port {port}");
    let address = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
    let socket = socket(AddressFamily::UNIX)?;
    rustix::net::bind(&socket, &address)?;
    Ok(socket)
}

fn bound(port: u16) -> rustix::io::Result<OwnedFd> {
    let socket = socket(AddressFamily::INET)?;
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    sockopt::set_socket_reuseport(&socket, true)?;
    match rustix::net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            // It may be what is left of connections, which share only with whoever says this too.
            sockopt::set_socket_reuseaddr(&socket, true)?;
            rustix::net::bind(&socket, &address)?;
            sockopt::set_socket_reuseaddr(&socket, false)?;
        }
        other => other?,
    }
    Ok(socket)
}

fn socket(family: AddressFamily) -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    fn reserve(port: u16) -> Result<HostPorts, Refusal> {
        HostPorts::reserve(&[PortForward { host: port, guest: 80 }])
    }

    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    /// Listens as libkrun does once it was seen to.
    fn listening(port: u16) -> TcpListener {
        let machine = socket(AddressFamily::INET).unwrap();
        sockopt::set_socket_reuseport(&machine, true).unwrap();
        sockopt::set_socket_reuseaddr(&machine, true).unwrap();
        rustix::net::bind(&machine, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)).unwrap();
        rustix::net::listen(&machine, 4).unwrap();
        TcpListener::from(machine)
    }

    #[test]
    fn a_port_is_for_one_machine_and_for_nobody_else() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let is_refused = |outcome: Result<HostPorts, Refusal>| matches!(outcome, Err(Refusal::PortInUse(taken)) if taken == u32::from(port));
        assert!(is_refused(reserve(port)));
        drop(taken);
        let held = reserve(port).unwrap();
        assert!(is_refused(reserve(port)));
        assert!(TcpListener::bind(("127.0.0.1", port)).is_err());
        assert!(TcpListener::bind(("0.0.0.0", port)).is_err());
        drop(held);
        assert!(reserve(port).is_ok());
    }

    #[test]
    fn what_is_left_of_connections_keeps_nobody_from_a_port() {
        let port = free_port();
        for round in 0..3 {
            let held = reserve(port).unwrap();
            let machine = listening(port);
            let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
            let (ends, stays) = (connect(), connect());
            // The machine ends both first, and one client never does.
            drop((machine.accept().unwrap(), machine.accept().unwrap()));
            drop((machine, held, ends));
            std::mem::forget(stays);
            assert!(TcpListener::bind(("127.0.0.1", port)).is_ok(), "round {round}");
        }
    }

    #[test]
    fn a_port_in_reserve_can_be_listened_on_by_the_machine() {
        let port = free_port();
        let _held = reserve(port).unwrap();
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
        let _machine = listening(port);
        assert!(TcpStream::connect(("127.0.0.1", port)).is_ok());
    }
}
