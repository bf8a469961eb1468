//! A real link that breaks, stalls and moves fewer bytes than it could.

use super::RealFaults;
use futures_core::future::BoxFuture;
use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vm_core::{fault::FaultKind, machine::Link};
use vm_trait::VmId;

/// How long a stall lasts where the order does not say.
const STALL: Duration = Duration::from_secs(1);

/// A link with faults; its occasions are the host's writes.
pub(super) struct FaultyLink {
    /// Nothing once it was cut.
    inner: Option<Box<dyn Link>>,
    vm: VmId,
    faults: RealFaults,
    stall: Option<BoxFuture<'static, ()>>,
    /// The faults of the write that is under way were drawn.
    drawn: bool,
    most: usize,
}

impl FaultyLink {
    pub(super) fn new(inner: Box<dyn Link>, vm: VmId, faults: RealFaults) -> Self {
        Self { inner: Some(inner), vm, faults, stall: None, drawn: false, most: usize::MAX }
    }

    /// Waits out a stall.
    fn poll_stall(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(stall) = &mut self.stall {
            ready!(stall.as_mut().poll(cx));
            self.stall = None;
        }
        Poll::Ready(())
    }

    fn draw(&mut self) {
        if self.drawn {
            return;
        }
        self.drawn = true;
        if let Some(order) = self.faults.strike(FaultKind::LinkStall, self.vm) {
            self.stall = Some(self.faults.env.sleep(order.amount.unwrap_or(STALL)));
        }
        if self.faults.strike(FaultKind::LinkDisconnect, self.vm).is_some() {
            self.inner = None;
        }
        if self.faults.strike(FaultKind::LinkShort, self.vm).is_some() {
            self.most = 1;
        }
    }

    fn inner(&mut self) -> io::Result<Pin<&mut Box<dyn Link>>> {
        let inner = self.inner.as_mut().ok_or(io::ErrorKind::ConnectionReset)?;
        Ok(Pin::new(inner))
    }
}

impl AsyncRead for FaultyLink {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let link = self.get_mut();
        ready!(link.poll_stall(cx));
        link.inner()?.poll_read(cx, buffer)
    }
}

impl AsyncWrite for FaultyLink {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let link = self.get_mut();
        link.draw();
        ready!(link.poll_stall(cx));
        let most = link.most.min(bytes.len());
        let written = ready!(link.inner()?.poll_write(cx, &bytes[..most]));
        (link.drawn, link.most) = (false, usize::MAX);
        Poll::Ready(written)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().inner()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().inner()?.poll_shutdown(cx)
    }
}
