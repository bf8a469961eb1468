//! Requests and outputs that are larger than most.

use super::{
    probe::works,
    streams::{SOON, length, sh},
};
use crate::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use vm_trait::{ExecRequest, VmErrorKind};

/// The clauses on large requests and outputs.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(megabytes_of_errors, "exec.megabytes_on_stderr",
        "a program may write megabytes on stderr and nothing on stdout, and ends", [Exec], faults: []),
    clause!(too_large, "exec.request_too_large",
        "a request that is larger than can be sent is refused, and the machine goes on", [Exec], faults: []),
];

async fn megabytes_of_errors(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let count = length(ctx, 1 << 20, 3 << 20);
    let request = sh("head -c \"$1\" /dev/zero >&2", [count.to_string()]).output_limit(4 << 20);
    let output = ctx.within(SOON, "megabytes on stderr", vm.exec(request)).await??;
    ensure!(output.status.success(), "the program ended with {:?}", output.status);
    ensure_eq!((output.stdout.len(), output.stderr.len()), (0, count), "lengths of the outputs");
    ensure!(
        output.stderr.iter().all(|byte| *byte == 0),
        "stderr has other bytes than were written"
    );
    Ok(())
}

async fn too_large(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let word = "x".repeat(length(ctx, 5 << 20, 6 << 20));
    ensure_err!(
        vm.exec(ExecRequest::new("true").arg(word)).await,
        VmErrorKind::InvalidConfig { .. } | VmErrorKind::ExecFailed { .. },
        "a request of megabytes"
    );
    works(ctx, &vm, "after a request that was too large").await
}
