//! Byte streams between the host and programs in the guest, over vsock.

use crate::error::VmResult;
use async_trait::async_trait;
use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A byte stream to a program in the guest, from [`connect`](crate::VmInstance::connect) or
/// [`GuestListener::accept`].
///
/// It reads and writes through tokio's traits. `shutdown` ends the host's side alone: the guest reads end-of-file once it
/// has read what was written, and what it writes still arrives. Dropping the stream closes it both ways.
///
/// A reader that does not read stalls its own stream and nothing else: a few hundred KiB are under way in each direction
/// at most, then the writer waits. While the machine is paused the stream stalls, and goes on after resume. When the
/// machine has ended, reading gives what had arrived and then end-of-file or an error of kind
/// [`ConnectionReset`](io::ErrorKind::ConnectionReset), and writing an error; neither waits.
pub struct GuestStream {
    port: u32,
    io: Box<dyn GuestStreamIo>,
}

/// What a backend wraps into a [`GuestStream`]. Dropping it must close the stream.
pub trait GuestStreamIo: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> GuestStreamIo for T {}

/// Takes the streams that programs in the guest open to one vsock port of the host, from
/// [`listen`](crate::VmInstance::listen).
///
/// It belongs to the life of the machine in which it was made. Dropping it frees the port; connections that were not
/// accepted are then closed, and later ones refused.
#[derive(Debug)]
pub struct GuestListener {
    handle: Box<dyn GuestListenerHandle>,
}

/// What a backend implements to give out [`GuestListener`]s. Dropping it must free the port.
#[async_trait]
#[allow(missing_docs, clippy::missing_errors_doc)]
pub trait GuestListenerHandle: Send + fmt::Debug {
    fn port(&self) -> u32;
    async fn accept(&mut self) -> VmResult<GuestStream>;
}

impl GuestStream {
    /// Wraps a backend's stream; `port` is the one that was connected to, or listened on.
    #[must_use]
    pub fn new(port: u32, io: Box<dyn GuestStreamIo>) -> Self {
        Self { port, io }
    }

    /// Gives the port: the guest's where the host connected, the host's where the guest did.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.port
    }
}

impl GuestListener {
    /// Wraps a backend's handle.
    #[must_use]
    pub fn new(handle: Box<dyn GuestListenerHandle>) -> Self {
        Self { handle }
    }

    /// Gives the port that it listens on.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.handle.port()
    }

    /// Waits for the next stream, in the order in which the guest opened them, as long as it takes. While nobody waits,
    /// at most 16 streams are kept; more are refused. Cancellation safe: no stream is lost.
    ///
    /// # Errors
    /// [`Interrupted`](crate::VmErrorKind::Interrupted) once the machine is stopped or killed,
    /// [`Disconnected`](crate::VmErrorKind::Disconnected), [`GuestCrashed`](crate::VmErrorKind::GuestCrashed) or
    /// [`VmmCrashed`](crate::VmErrorKind::VmmCrashed) once it has ended otherwise; and so for every later call.
    pub async fn accept(&mut self) -> VmResult<GuestStream> {
        self.handle.accept().await
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

impl fmt::Debug for GuestStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestStream").field("port", &self.port).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn bytes_go_through_whole_in_whatever_way_they_are_written() {
        let (near, far) = tokio::io::duplex(4);
        let mut stream = GuestStream::new(1025, Box::new(near));
        assert_eq!(stream.port(), 1025);
        let far = tokio::spawn(async move {
            let mut far = far;
            let mut all = Vec::new();
            far.read_to_end(&mut all).await.unwrap();
            all
        });
        stream.write_all(b"one after ").await.unwrap();
        let mut pieces: &[&[u8]] = &[b"the ", b"other, ", b"gathered"];
        while let [first, rest @ ..] = pieces {
            let slices = [io::IoSlice::new(first)];
            let written = stream.write_vectored(&slices).await.unwrap();
            assert!(written > 0);
            stream.write_all(&first[written..]).await.unwrap();
            pieces = rest;
        }
        stream.shutdown().await.unwrap();
        assert_eq!(far.await.unwrap(), b"one after the other, gathered");
    }

    /// Notes what is asked of it, and takes pieces together or not.
    struct Noting {
        vectored: bool,
        flushed: Arc<AtomicUsize>,
    }

    impl AsyncRead for Noting {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Noting {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.flushed.fetch_add(1, Ordering::Relaxed);
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn is_write_vectored(&self) -> bool {
            self.vectored
        }
    }

    #[tokio::test]
    async fn the_backend_s_stream_is_asked_to_flush_and_whether_it_takes_pieces() {
        for vectored in [true, false] {
            let flushed = Arc::new(AtomicUsize::new(0));
            let io = Noting { vectored, flushed: Arc::clone(&flushed) };
            let mut stream = GuestStream::new(1025, Box::new(io));
            assert_eq!(stream.is_write_vectored(), vectored);
            stream.flush().await.unwrap();
            assert_eq!(flushed.load(Ordering::Relaxed), 1);
        }
    }

    #[test]
    fn a_stream_is_shown_with_its_port() {
        let stream = GuestStream::new(1025, Box::new(tokio::io::empty()));
        assert_eq!(format!("{stream:?}"), "GuestStream { port: 1025, .. }");
    }
}
