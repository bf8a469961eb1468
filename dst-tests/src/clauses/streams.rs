//! What the clauses on programs and files share: requests, streams read to a point, comparisons, faults of the link.

use super::probe::{Ordered, order};
use crate::{
    clause::{Broken, Verdict},
    context::Context,
};
use bytes::Bytes;
use std::{future::Future, sync::Arc, time::Duration};
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    ExecFailure, ExecRequest, GuestFileError, GuestProcess, OutputChannel, VmConfig, VmErrorKind,
    VmInstance, VmInstanceExt, VmResult,
};

/// How long something may take that needs no time of its own, over a link in trouble or on a busy host.
pub(super) const SOON: Duration = Duration::from_secs(60);

/// Turns a drawn number into milliseconds.
pub(super) fn millis(ctx: &Context, low: u64, high: u64) -> Duration {
    Duration::from_millis(ctx.draw(low, high))
}

/// Turns a drawn number into a length.
pub(super) fn length(ctx: &Context, low: u64, high: u64) -> usize {
    usize::try_from(ctx.draw(low, high)).expect("a length that fits in memory")
}

/// Asks for a script with arguments.
pub(super) fn sh<S: Into<String>>(script: &str, args: impl IntoIterator<Item = S>) -> ExecRequest {
    ExecRequest::new("sh").args(["-c", script, "sh"]).args(args)
}

/// Makes a machine of this configuration and starts it.
pub(super) async fn running_with(ctx: &Context, config: VmConfig) -> VmResult<Arc<dyn VmInstance>> {
    let vm = ctx.backend().create(config).await?;
    vm.start().await?;
    Ok(vm)
}

/// Makes an empty directory of this run's own.
pub(super) async fn fresh_dir(ctx: &Context, vm: &dyn VmInstance) -> VmResult<String> {
    let dir = format!("{}/run-{:016x}", ctx.scratch(vm), ctx.draw(0, u64::MAX));
    vm.create_dir_all(&dir).await?;
    Ok(dir)
}

/// Draws bytes whose number is often one at which buffers and frames end.
pub(super) fn payload(ctx: &Context, most: u64) -> Bytes {
    let edge = ctx.pick(&[0, 1, 4095, 4096, 4097, (64 << 10) - 1, 64 << 10, (64 << 10) + 1]);
    let size = if ctx.one_in(2) { edge } else { ctx.draw(0, most) };
    ctx.bytes(usize::try_from(size.min(most)).expect("a length that fits in memory"))
}

/// Draws a file name: any characters but a slash, never empty, `.` or `..`, and short enough for every file system.
pub(super) fn odd_name(ctx: &Context) -> String {
    let text = ctx.text(20).replace('/', "");
    match text.as_str() {
        "" | "." | ".." => "plain".to_owned(),
        _ => text,
    }
}

/// Compares bytes without printing all of them.
#[track_caller]
pub(super) fn same_bytes(got: &[u8], wanted: &[u8], what: &str) -> Verdict {
    if got == wanted {
        return Ok(());
    }
    let at = got.iter().zip(wanted).take_while(|(a, b)| a == b).count();
    let (got_len, wanted_len) = (got.len(), wanted.len());
    Err(Broken::new(format!(
        "{what}: got {got_len} bytes, wanted {wanted_len}; they differ from byte {at} on: got {:?}, wanted {:?}",
        Bytes::copy_from_slice(&got[at..got_len.min(at + 32)]),
        Bytes::copy_from_slice(&wanted[at..wanted_len.min(at + 32)]),
    )))
}

/// Asks that an operation on files failed in this way.
#[track_caller]
pub(super) fn file_error<T>(result: VmResult<T>, wanted: &GuestFileError, what: &str) -> Verdict {
    match result {
        Ok(_) => Err(Broken::new(format!("{what}: got Ok, wanted {wanted}"))),
        Err(error) => match error.kind() {
            VmErrorKind::GuestFile { error: got, .. } if got == wanted => Ok(()),
            _ => Err(Broken::new(format!("{what}: got `{error}`, wanted {wanted}"))),
        },
    }
}

/// Asks that a program could not be started for this reason.
#[track_caller]
pub(super) fn exec_failure<T>(result: VmResult<T>, wanted: &ExecFailure, what: &str) -> Verdict {
    match result {
        Ok(_) => Err(Broken::new(format!("{what}: got Ok, wanted {wanted}"))),
        Err(error) => match error.kind() {
            VmErrorKind::ExecFailed { failure } if failure == wanted => Ok(()),
            _ => Err(Broken::new(format!("{what}: got `{error}`, wanted {wanted}"))),
        },
    }
}

/// Asks that a request was refused because of this field.
#[track_caller]
pub(super) fn refused_field<T>(result: VmResult<T>, wanted: &str, what: &str) -> Verdict {
    match result {
        Ok(_) => Err(Broken::new(format!("{what}: got Ok, wanted `{wanted}` refused"))),
        Err(error) => match error.kind() {
            VmErrorKind::InvalidConfig { field, .. } if field.starts_with(wanted) => Ok(()),
            _ => Err(Broken::new(format!("{what}: got `{error}`, wanted `{wanted}` refused"))),
        },
    }
}

/// Waits until `holds` gives true, asking again and again.
pub(super) async fn until<F>(
    ctx: &Context,
    what: &str,
    mut holds: impl FnMut() -> F + Send,
) -> Verdict
where
    F: Future<Output = VmResult<bool>> + Send,
{
    let end = ctx.now() + SOON;
    while !holds().await? {
        if ctx.now() > end {
            return Err(Broken::new(format!("{what}: not after {SOON:?}")));
        }
        ctx.sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

async fn next(process: &GuestProcess, channel: OutputChannel) -> VmResult<Option<Bytes>> {
    match channel {
        OutputChannel::Stdout => process.read_stdout().await,
        OutputChannel::Stderr => process.read_stderr().await,
    }
}

/// Reads an output to its end.
pub(super) async fn read_to_end(
    process: &GuestProcess,
    channel: OutputChannel,
) -> VmResult<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(bytes) = next(process, channel).await? {
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

/// Reads at least `least` bytes of an output.
pub(super) async fn read_at_least(
    process: &GuestProcess,
    channel: OutputChannel,
    least: usize,
) -> Result<Vec<u8>, Broken> {
    let mut all = Vec::new();
    while all.len() < least {
        match next(process, channel).await? {
            Some(bytes) => all.extend_from_slice(&bytes),
            None => {
                let got = all.len();
                return Err(Broken::new(format!("the output ended after {got} of {least} bytes")));
            }
        }
    }
    Ok(all)
}

/// Reads standard output until it holds `text`, and gives all that was read.
pub(super) async fn read_until_text(
    ctx: &Context,
    process: &GuestProcess,
    text: &str,
) -> Result<String, Broken> {
    let mut all = Vec::new();
    loop {
        let seen = String::from_utf8_lossy(&all).into_owned();
        if seen.contains(text) {
            return Ok(seen);
        }
        let waiting = format!("waiting for {text:?} after {seen:?}");
        match ctx.within(SOON, &waiting, process.read_stdout()).await?? {
            Some(bytes) => all.extend_from_slice(&bytes),
            None => {
                return Err(Broken::new(format!(
                    "the output ended with {seen:?}, without {text:?}"
                )));
            }
        }
    }
}

/// Begins a script with a child that writes to the file `$1` again and again as long as it lives.
pub(super) const TICKING_CHILD: &str =
    "(while true; do echo tick >> \"$1\"; sleep 0.02; done) & echo ready; ";

/// Asks that whatever wrote to the file before does not any more.
pub(super) async fn no_more_ticks(ctx: &Context, vm: &dyn VmInstance, path: &str) -> Verdict {
    let before = vm.read_file(path).await?.len();
    ctx.sleep(Duration::from_millis(300)).await;
    let after = vm.read_file(path).await?.len();
    if after == before {
        return Ok(());
    }
    Err(Broken::new(format!("a child lives on: {before} bytes have become {after}")))
}

/// A fault of the link that nobody above it may notice.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(super) struct Disturbance(Option<Ordered>);

/// In half of the runs, where the target can do so, breaks, stalls or shortens the traffic with the agent while `sent`
/// bytes are sent to it.
pub(super) fn disturb_link(
    ctx: &Context,
    vm: &dyn VmInstance,
    sent: usize,
) -> Result<Disturbance, Broken> {
    let kinds = [FaultKind::LinkDisconnect, FaultKind::LinkStall, FaultKind::LinkShort];
    let kind = ctx.pick(&kinds);
    if ctx.one_in(2) || !ctx.can_fault(kind) {
        return Ok(Disturbance(None));
    }
    break_link(ctx, vm, kind, sent)
}

/// Breaks, stalls or shortens the traffic with the agent while `sent` bytes are sent to it.
pub(super) fn break_link(
    ctx: &Context,
    vm: &dyn VmInstance,
    kind: FaultKind,
    sent: usize,
) -> Result<Disturbance, Broken> {
    // A link is written to at least once for every so many bytes.
    let occasions = sent.div_ceil(256 << 10).max(1);
    let skip = u32::try_from(ctx.index(occasions)).unwrap_or(0);
    let wanted = FaultOrder::next(kind).on(vm.id()).after(skip);
    order(ctx, wanted.with_amount(millis(ctx, 5, 2000))).map(|ordered| Disturbance(Some(ordered)))
}

impl Disturbance {
    /// Calls the check broken where it was ordered and has not happened.
    #[track_caller]
    pub(super) fn took_place(self, ctx: &Context) -> Verdict {
        self.0.map_or(Ok(()), |ordered| ordered.must_have_fired(ctx))
    }
}
