//! What the clauses on vsock and the network share: the guest's tools `vsock` and `tcp`, and bytes that go round.

use super::probe::{SOON, Vm};
use crate::{
    clause::{Broken, Verdict},
    context::Context,
    ensure,
};
use bytes::Bytes;
use futures_util::future::join;
use std::{io, time::Duration};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use vm_trait::{ExecRequest, ExecStatus, GuestListener, GuestProcess, GuestStream, VmInstance};

/// How long bytes may take that a busy host and a link in trouble hold up.
pub(super) const LONG: Duration = Duration::from_secs(90);

/// Draws a port that nobody else uses.
pub(super) fn port(ctx: &Context) -> u32 {
    u32::try_from(ctx.draw(2_000, 1 << 29)).unwrap_or(2_000)
}

/// Starts the guest's `vsock listen` with these words, and waits until it says that it listens.
pub(super) async fn listens(
    ctx: &Context,
    vm: &Vm,
    words: &[&str],
    port: u32,
) -> Result<GuestProcess, Broken> {
    tool_listens(ctx, vm, "vsock", words, port).await
}

/// Starts one of the guest's tools with `listen` and these words, and waits until it says that it listens.
pub(super) async fn tool_listens(
    ctx: &Context,
    vm: &Vm,
    tool: &str,
    words: &[&str],
    port: u32,
) -> Result<GuestProcess, Broken> {
    let words = ["listen"].iter().chain(words).copied();
    let request = ExecRequest::new(tool).args(words).arg(port.to_string()).open_stdin();
    let process = vm.spawn(request).await?;
    let what = format!("the guest's `{tool} listen`");
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains("listening") {
        match ctx.within(SOON, &what, process.read_stderr()).await?? {
            Some(bytes) => said.extend_from_slice(&bytes),
            None => {
                let said = String::from_utf8_lossy(&said);
                return Err(Broken::new(format!("{what} ended and said `{said}`")));
            }
        }
    }
    Ok(process)
}

/// Starts an echo in the guest.
pub(super) async fn echo(ctx: &Context, vm: &Vm) -> Result<(GuestProcess, u32), Broken> {
    let port = port(ctx);
    Ok((listens(ctx, vm, &["--echo"], port).await?, port))
}

/// Starts the guest's `vsock connect`, with its standard input open.
pub(super) async fn dials(vm: &Vm, port: u32) -> Result<GuestProcess, Broken> {
    let request = ExecRequest::new("vsock").args(["connect", &port.to_string()]).open_stdin();
    Ok(vm.spawn(request).await?)
}

/// Opens a stream to the guest, which must come about soon.
pub(super) async fn connect(ctx: &Context, vm: &Vm, port: u32) -> Result<GuestStream, Broken> {
    let stream = ctx.within(SOON, "connect", vm.connect(port)).await??;
    ensure!(stream.port() == port, "the stream to port {port} says {}", stream.port());
    Ok(stream)
}

/// Takes the next stream of the guest, which must come soon.
pub(super) async fn accept(
    ctx: &Context,
    listener: &mut GuestListener,
) -> Result<GuestStream, Broken> {
    Ok(ctx.within(SOON, "accept", listener.accept()).await??)
}

/// Turns the error of a stream into a broken promise.
#[track_caller]
pub(super) fn fine<T>(what: &str, result: io::Result<T>) -> Result<T, Broken> {
    match result {
        Ok(value) => Ok(value),
        Err(error) => Err(Broken::new(format!("{what}: {error}"))),
    }
}

/// Writes bytes in pieces of drawn sizes.
pub(super) async fn write(
    ctx: &Context,
    stream: &mut (impl AsyncWrite + Unpin),
    bytes: &Bytes,
) -> Verdict {
    let mut rest = bytes.clone();
    while !rest.is_empty() {
        let most = ctx.pick(&[1, 100, 4096, 70_000, 1 << 20]);
        let piece = rest.split_to(ctx.index(most.min(rest.len())) + 1);
        let written = ctx.within(LONG, "a write to a stream", stream.write_all(&piece)).await?;
        fine("a write to a stream", written)?;
    }
    Ok(())
}

/// Reads to the end of a stream that is to give no more than `most` bytes.
pub(super) async fn read_all(
    ctx: &Context,
    stream: &mut (impl AsyncRead + Unpin),
    most: usize,
) -> Result<Vec<u8>, Broken> {
    let mut read = Vec::new();
    let mut limited = stream.take(most as u64 + 1);
    let done = ctx.within(LONG, "the end of a stream", limited.read_to_end(&mut read)).await?;
    fine("a read of a stream", done)?;
    Ok(read)
}

/// Sends bytes through an echo, ends the host's side, and checks that they all come back and then the end.
pub(super) async fn round_trip(
    ctx: &Context,
    stream: impl AsyncRead + AsyncWrite,
    bytes: &Bytes,
) -> Verdict {
    let (mut reader, mut writer) = split(stream);
    let send = async {
        write(ctx, &mut writer, bytes).await?;
        fine("shutdown", writer.shutdown().await)
    };
    let (sent, came) = join(send, read_all(ctx, &mut reader, bytes.len())).await;
    sent?;
    super::streams::same_bytes(&came?, bytes, "what an echo sent back")
}

/// Sends a few bytes through an echo on a stream that stays open.
pub(super) async fn ping(
    ctx: &Context,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    when: &str,
) -> Verdict {
    let bytes = ctx.bytes(ctx.index(500) + 1);
    write(ctx, stream, &bytes).await?;
    let mut back = vec![0; bytes.len()];
    let read = ctx.within(LONG, when, stream.read_exact(&mut back)).await?;
    fine(when, read)?;
    super::streams::same_bytes(&back, &bytes, when)
}

/// Sends a few bytes to a guest's tool that is connected, and checks that it writes them out.
pub(super) async fn passes_on(
    ctx: &Context,
    stream: &mut (impl AsyncWrite + Unpin),
    tool: &GuestProcess,
    when: &str,
) -> Verdict {
    let bytes = ctx.bytes(ctx.index(200) + 1);
    write(ctx, stream, &bytes).await?;
    let mut came = Vec::new();
    while came.len() < bytes.len() {
        let read = ctx.within(SOON, when, tool.read_stdout()).await??;
        let Some(read) = read else { return Err(Broken::new(format!("{when}: it ended"))) };
        came.extend_from_slice(&read);
    }
    super::streams::same_bytes(&came, &bytes, when)
}

/// Checks that a stream of a machine that is gone ends: reading does not wait, and writing fails.
pub(super) async fn has_ended(
    ctx: &Context,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    when: &str,
) -> Verdict {
    let mut sink = vec![0; 4096];
    loop {
        match ctx.within(SOON, &format!("{when}: the end"), stream.read(&mut sink)).await? {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => {
                let reset = error.kind() == io::ErrorKind::ConnectionReset;
                ensure!(reset, "{when}: reading fails with {error} ({:?})", error.kind());
                break;
            }
        }
    }
    let begun = ctx.now();
    // What the host had not yet noticed when the first write was made, it has at a later one.
    while ctx.within(SOON, &format!("{when}: a write"), stream.write(b"x")).await?.is_ok() {
        ensure!(ctx.now() - begun < SOON, "{when}: writing goes on");
        ctx.sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// Waits for the end of a guest's tool, and gives how it ended and what it wrote.
pub(super) async fn finished(
    ctx: &Context,
    process: &GuestProcess,
) -> Result<(ExecStatus, Vec<u8>, String), Broken> {
    let work = async {
        let mut error = Vec::new();
        let out = super::probe::read_to_end(process).await?;
        while let Some(bytes) = process.read_stderr().await? {
            error.extend_from_slice(&bytes);
        }
        Ok::<_, Broken>((process.wait().await?, out, String::from_utf8_lossy(&error).into_owned()))
    };
    ctx.within(LONG, "the end of the guest's tool", work).await?
}

/// Checks that the guest's tool was refused: it says so, and ends with 1.
pub(super) async fn is_refused(ctx: &Context, vm: &Vm, port: u32, when: &str) -> Verdict {
    let process = dials(vm, port).await?;
    let (status, out, error) = finished(ctx, &process).await?;
    ensure!(
        status == ExecStatus::Exited(1) && !error.is_empty() && out.is_empty(),
        "{when}: `vsock connect` ended with {status:?} and said `{error}`"
    );
    Ok(())
}

/// Checks that a machine has no listener of the host left on a port: another one can be made.
pub(super) async fn is_free(vm: &dyn VmInstance, port: u32) -> Verdict {
    drop(vm.listen(port).await?);
    Ok(())
}
