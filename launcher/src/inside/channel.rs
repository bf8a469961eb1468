//! [`Channel`]: the launcher's end of the control socket.

use crate::control::{FromLauncher, MAX_FDS, MAX_PACKET, ToLauncher};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

/// How long a message waits for an owner that does not read.
const SEND_PATIENCE: Duration = Duration::from_secs(10);

/// The launcher's end of the control socket. Packets are whole, so any thread may send.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

/// What came from the owner.
#[derive(Debug)]
pub enum Received {
    /// A message with its descriptors.
    Message(ToLauncher, Vec<OwnedFd>),
    /// Nothing is there.
    Nothing,
    /// The owner hung up.
    HungUp,
}

impl Channel {
    /// Speaks through this socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Takes the next message without waiting. `buffer` is what packets are read into.
    ///
    /// # Errors
    /// When the socket fails, or the packet is none of the protocol's.
    pub fn receive(&self, buffer: &mut Vec<u8>) -> io::Result<Received> {
        if buffer.len() < MAX_PACKET {
            // Fresh memory takes room only where packets come to lie in it.
            *buffer = vec![0; MAX_PACKET];
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = loop {
            let mut parts = [IoSliceMut::new(buffer)];
            match recvmsg(&self.socket, &mut parts, &mut ancillary, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(Errno::CONNRESET) => return Ok(Received::HungUp),
                other => break other?,
            }
        };
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(io::Error::other("a control packet is too large"));
        }
        if received.bytes == 0 {
            return Ok(Received::HungUp);
        }
        match postcard::take_from_bytes(&buffer[..received.bytes]) {
            Ok((message, [])) => Ok(Received::Message(message, fds)),
            Ok(_) => Err(io::Error::other("a control packet is longer than its message")),
            Err(error) => Err(io::Error::other(format!("a control packet is unreadable: {error}"))),
        }
    }

    /// Sends a message, and waits for an owner that does not read, though not for ever.
    ///
    /// # Errors
    /// When the owner is gone or does not read.
    pub fn send(&self, message: &FromLauncher) -> io::Result<()> {
        self.send_with(message, None)
    }

    /// As [`send`](Self::send), with a descriptor if there is one.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn send_with(&self, message: &FromLauncher, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let deadline = Instant::now() + SEND_PATIENCE;
        while !self.try_send(message, fd)? {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the owner does not read"));
            }
            let wait = Timespec::try_from(left.min(Duration::from_millis(100)));
            let mut writable = [PollFd::new(&self.socket, PollFlags::OUT)];
            match poll(&mut writable, wait.ok().as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Sends a message, with a descriptor if there is one, unless the owner has too many unread; says whether it did.
    ///
    /// # Errors
    /// When the owner is gone.
    pub fn try_send(&self, message: &FromLauncher, fd: Option<BorrowedFd<'_>>) -> io::Result<bool> {
        let packet = postcard::to_allocvec(message).map_err(io::Error::other)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if let Some(fd) = &fd {
            ancillary.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd)));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            match sendmsg(&self.socket, &[IoSlice::new(&packet)], &mut ancillary, flags) {
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::TOOMANYREFS) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
