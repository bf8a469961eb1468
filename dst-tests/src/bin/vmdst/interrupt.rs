//! Ctrl-C: the first asks for an end, the second ends at once.

use crate::INTERRUPTED;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// Gives a flag that the first Ctrl-C sets.
///
/// Where no handler can be installed, Ctrl-C ends the process as ever.
pub(crate) fn flag() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_io().build() else {
        return flag;
    };
    // Made here, so that the handler stands before the first run begins.
    let signal = {
        let _inside = runtime.enter();
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())
    };
    let Ok(mut signal) = signal else { return flag };
    let set = flag.clone();
    let wait = move || {
        runtime.block_on(async {
            if signal.recv().await.is_some() {
                set.store(true, Ordering::Relaxed);
            }
            if signal.recv().await.is_some() {
                std::process::exit(i32::from(INTERRUPTED));
            }
        });
    };
    // Without a thread the flag is never set; the session then runs to its end.
    let _ = thread::Builder::new().name("interrupt".to_owned()).spawn(wait);
    flag
}
