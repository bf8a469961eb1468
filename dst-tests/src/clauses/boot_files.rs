//! Kernels, initial RAM disks and roots of the user's choice: what cannot be used is refused, by name.

use super::streams::refused_field;
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure,
};
use bytes::Bytes;
use std::path::PathBuf;
use vm_trait::{KernelConfig, RootConfig, VmConfig};

/// The clauses on what a machine boots from.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(missing_kernel, "boot_files.missing_kernel",
        "a kernel or initial RAM disk that is not there is refused at create, naming the field",
        [Kernel], faults: []),
    clause!(no_kernel, "boot_files.no_kernel",
        "a file that is no kernel is refused at create, naming the field", [Kernel], faults: []),
    clause!(missing_root, "boot_files.missing_root",
        "a root that is not there is refused at create, naming the field", [Root], faults: []),
    clause!(mistaken_root, "boot_files.mistaken_root",
        "a file where a directory is wanted, and a text where a disk image is, are refused at create",
        [Root], faults: []),
];

async fn refused(ctx: &Context, change: impl FnOnce(&mut VmConfig), field: &str) -> Verdict {
    let mut config = VmConfig::default();
    change(&mut config);
    let text = format!("{:?} {:?}", config.kernel, config.root);
    refused_field(ctx.backend().create(config).await, field, &text)?;
    ensure!(ctx.leftovers().is_empty(), "a refused create left {:?}", ctx.leftovers());
    Ok(())
}

/// Writes a host file with some text.
async fn text_file(ctx: &Context) -> Result<PathBuf, Broken> {
    let path = ctx.host_path("text");
    let lines = usize::try_from(ctx.draw(1, 2_000)).unwrap_or(1);
    let text = Bytes::from("This is no kernel and no disk.\n".repeat(lines));
    let written = ctx.write_host_file(&path, text).await;
    written.map_err(|error| Broken::new(format!("{}: {error}", path.display())))?;
    Ok(path)
}

async fn missing_kernel(ctx: &Context) -> Verdict {
    let path = ctx.host_path("no-such-file");
    let kernel = KernelConfig::default().with_path(&path);
    refused(ctx, |config| config.kernel = kernel, "kernel.path").await?;
    let initrd = KernelConfig::default().with_initrd(&path);
    refused(ctx, |config| config.kernel = initrd, "kernel.initrd").await
}

async fn no_kernel(ctx: &Context) -> Verdict {
    let path = text_file(ctx).await?;
    let kernel = KernelConfig::default().with_path(path);
    refused(ctx, |config| config.kernel = kernel, "kernel.path").await
}

async fn missing_root(ctx: &Context) -> Verdict {
    let path = ctx.host_path("no-such-root");
    refused(ctx, |config| config.root = RootConfig::directory(&path), "root.source").await?;
    refused(ctx, |config| config.root = RootConfig::image(&path), "root.source").await
}

async fn mistaken_root(ctx: &Context) -> Verdict {
    let path = text_file(ctx).await?;
    refused(ctx, |config| config.root = RootConfig::directory(&path), "root.source").await?;
    refused(ctx, |config| config.root = RootConfig::image(&path), "root.source").await
}
