//! [`on_this_host`]: a whole backend of one hypervisor.

use rustix::rand::GetRandomFlags;
use std::{env, path::PathBuf, sync::Arc};
use vm_core::{
    backend::{CoreBackend, CoreParts},
    env::TokioEnv,
    host_fs::StdFs,
    machine::Hypervisor,
    observe::Observer,
};

/// Puts a backend together on tokio and the real file system. Snapshots that are given no path go to `snapshots`, by
/// default `twinvm-snapshots-UID` in the system's directory for temporary files.
///
/// # Panics
/// Outside a tokio runtime with I/O and time enabled.
#[must_use]
pub fn on_this_host(
    hypervisor: Arc<dyn Hypervisor>,
    snapshots: Option<PathBuf>,
    observer: Arc<dyn Observer>,
) -> CoreBackend {
    let user = rustix::process::geteuid().as_raw();
    let snapshots =
        snapshots.unwrap_or_else(|| env::temp_dir().join(format!("twinvm-snapshots-{user}")));
    CoreBackend::new(CoreParts {
        hypervisor,
        env: Arc::new(TokioEnv::real(fill_random)),
        fs: Arc::new(StdFs),
        snapshots,
        observer,
    })
}

/// Takes randomness from the operating system.
fn fill_random(mut bytes: &mut [u8]) {
    while !bytes.is_empty() {
        match rustix::rand::getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(filled) => bytes = &mut bytes[filled..],
            Err(rustix::io::Errno::INTR) => {}
            // Only a Linux from before 2014 has no getrandom, and it has no pidfds either.
            Err(_) => return,
        }
    }
}
