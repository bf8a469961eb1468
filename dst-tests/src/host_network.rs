//! The host's loopback TCP ports, as checks use them: those of a real host, and those of a simulated one.

use async_trait::async_trait;
use std::{
    collections::BTreeSet,
    fmt, io,
    net::Ipv4Addr,
    sync::{Mutex, PoisonError},
};
use tokio::net::{TcpListener, TcpStream};
use vm_core::machine::Link;
use vm_sim::{SimHost, SimTcpListener};

/// The loopback TCP ports of the host that a backend's machines are on.
#[async_trait]
pub trait HostNetwork: Send + Sync + fmt::Debug {
    /// Connects to a port. When the future is dropped, nothing is left of it.
    ///
    /// # Errors
    /// The host's.
    async fn connect(&self, port: u16) -> io::Result<Box<dyn Link>>;

    /// Listens on a port, until what it gives is dropped.
    ///
    /// # Errors
    /// The host's; `AddrInUse` where somebody has the port.
    async fn listen(&self, port: u16) -> io::Result<Box<dyn HostListener>>;

    /// Says whether no other check of this program has the port, and keeps it from others until this is dropped.
    fn reserve(&self, _port: u16) -> bool {
        true
    }
}

/// Takes connections to a port of the host.
#[async_trait]
pub trait HostListener: Send + fmt::Debug {
    /// Waits for the next connection. When the future is dropped, none is lost.
    ///
    /// # Errors
    /// The host's.
    async fn accept(&mut self) -> io::Result<Box<dyn Link>>;
}

/// The real host's ports.
#[derive(Debug, Default)]
pub struct RealHostNetwork {
    reserved: Mutex<Vec<u16>>,
}

/// The ports that checks of this program have.
static RESERVED: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

#[async_trait]
impl HostNetwork for RealHostNetwork {
    async fn connect(&self, port: u16) -> io::Result<Box<dyn Link>> {
        Ok(Box::new(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?))
    }

    async fn listen(&self, port: u16) -> io::Result<Box<dyn HostListener>> {
        Ok(Box::new(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?))
    }

    fn reserve(&self, port: u16) -> bool {
        let fresh = RESERVED.lock().unwrap_or_else(PoisonError::into_inner).insert(port);
        if fresh {
            self.reserved.lock().unwrap_or_else(PoisonError::into_inner).push(port);
        }
        fresh
    }
}

impl Drop for RealHostNetwork {
    fn drop(&mut self) {
        let mut all = RESERVED.lock().unwrap_or_else(PoisonError::into_inner);
        for port in self.reserved.get_mut().unwrap_or_else(PoisonError::into_inner) {
            all.remove(port);
        }
    }
}

#[async_trait]
impl HostListener for TcpListener {
    async fn accept(&mut self) -> io::Result<Box<dyn Link>> {
        let (stream, _) = Self::accept(self).await?;
        Ok(Box::new(stream))
    }
}

/// A simulated host's ports.
#[async_trait]
impl HostNetwork for SimHost {
    async fn connect(&self, port: u16) -> io::Result<Box<dyn Link>> {
        Ok(Box::new(Self::connect(self, port).await?))
    }

    async fn listen(&self, port: u16) -> io::Result<Box<dyn HostListener>> {
        Ok(Box::new(Self::listen(self, port).await?))
    }
}

#[async_trait]
impl HostListener for SimTcpListener {
    async fn accept(&mut self) -> io::Result<Box<dyn Link>> {
        Ok(Box::new(Self::accept(self).await?))
    }
}
