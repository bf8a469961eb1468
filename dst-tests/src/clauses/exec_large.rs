//! Requests and outputs that are larger than most.

use super::{
    probe::works,
    streams::{SOON, length, running_with, sh},
};
use crate::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use std::collections::BTreeMap;
use vm_trait::{ExecRequest, VmConfig, VmErrorKind};

/// The clauses on large requests and outputs.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(megabytes_of_errors, "exec.megabytes_on_stderr",
        "a program may write megabytes on stderr and nothing on stdout, and ends", [Exec], faults: []),
    clause!(large_environment, "exec.large_environment",
        "an environment of many variables and long values arrives whole", [Exec], faults: []),
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

async fn large_environment(ctx: &Context) -> Verdict {
    // What Linux lets a program have: 128 KiB for one, and 2 MiB for all.
    let (count, size) = ctx.pick(&[(2, 130_000), (12, 60_000), (400, 1_000), (4_000, 100)]);
    let count = ctx.draw(1, count);
    let variable = |n: u64| {
        let word = format!("{:016x}", ctx.draw(0, u64::MAX));
        let length = length(ctx, 1, size);
        (format!("LARGE_{n}"), word.repeat(length / word.len() + 1)[..length].to_owned())
    };
    let variables: BTreeMap<String, String> = (0..count).map(variable).collect();
    // Some are the machine's own, which every request carries.
    let (of_vm, of_request): (BTreeMap<_, _>, BTreeMap<_, _>) =
        variables.iter().partition(|_| ctx.one_in(3));
    let config = of_vm.iter().fold(VmConfig::builder(), |config, (k, v)| config.with_env(*k, *v));
    let vm = running_with(ctx, config.build()?).await?;
    let request = ExecRequest::new("env").output_limit(4 << 20);
    let request = of_request.iter().fold(request, |request, (k, v)| request.env(*k, *v));
    let got = ctx.within(SOON, "a program with a large environment", vm.exec(request)).await??;
    let text = got.stdout_text();
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    let mut wanted: Vec<String> = variables.iter().map(|(k, v)| format!("{k}={v}")).collect();
    wanted.sort_unstable();
    ensure_eq!(lines.len(), wanted.len(), "variables that arrived");
    ensure!(lines == wanted, "a variable's value is not what was given");
    works(ctx, &vm, "after a program with a large environment").await
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
