//! Packets of the control socket, with descriptors beside them.

use crate::control::{FromLauncher, MAX_FDS, MAX_PACKET, ToLauncher};
use rustix::{
    cmsg_space,
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags,
    },
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
};

/// A packet that a sound launcher does not send.
#[derive(Debug, thiserror::Error)]
pub enum BadPacket {
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It, or what is beside it, is not whole.
    #[error("a packet or its descriptors were cut short")]
    Cut,
    /// It is none of the protocol's.
    #[error("a packet cannot be read: {0}")]
    Nonsense(postcard::Error),
}

/// What came of a look for a packet.
#[derive(Debug)]
pub enum Received {
    /// A message, with its descriptors.
    Packet(FromLauncher, Vec<OwnedFd>),
    /// There is none at the moment.
    Nothing,
    /// The other side is gone.
    HangUp,
}

/// Writes a message as a packet.
///
/// # Errors
/// When it is larger than a packet can be.
pub fn encode(message: &ToLauncher) -> io::Result<Vec<u8>> {
    let bytes = postcard::to_allocvec(message).map_err(io::Error::other)?;
    if bytes.len() > MAX_PACKET {
        return Err(io::Error::other(format!("a packet of {} bytes", bytes.len())));
    }
    Ok(bytes)
}

/// Sends a packet without waiting.
///
/// # Errors
/// `WouldBlock` where there is no room; then nothing was sent.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if fds.len() > MAX_FDS {
        return Err(io::Error::other(format!("{} descriptors in a packet", fds.len())));
    }
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut beside, flags)
    })?;
    if sent != bytes.len() {
        return Err(io::Error::other("a packet was sent in part"));
    }
    Ok(())
}

/// Takes the next packet, if there is one, into `buffer`, which has room for [`MAX_PACKET`] bytes.
///
/// # Errors
/// [`BadPacket`].
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Received, BadPacket> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut beside, flags)
    });
    let received = match received {
        Ok(received) => received,
        Err(Errno::AGAIN) => return Ok(Received::Nothing),
        Err(Errno::CONNRESET) => return Ok(Received::HangUp),
        Err(error) => return Err(BadPacket::Io(error.into())),
    };
    // Taken before anything can fail, so that they are closed.
    let fds: Vec<OwnedFd> = beside
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(BadPacket::Cut);
    }
    if received.bytes == 0 {
        return Ok(Received::HangUp);
    }
    match postcard::from_bytes(&buffer[..received.bytes]) {
        Ok(message) => Ok(Received::Packet(message, fds)),
        Err(error) => Err(BadPacket::Nonsense(error)),
    }
}
