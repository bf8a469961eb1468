//! Catching panics: those of a check, and those of tasks that the code under test runs beside it.

use std::{
    any::Any,
    backtrace::Backtrace,
    cell::RefCell,
    panic::{self, AssertUnwindSafe, PanicHookInfo},
    sync::{Arc, Mutex, Once, PoisonError},
};

/// Collects what panicked on the threads that joined it, instead of printing it.
#[derive(Clone, Debug, Default)]
pub struct PanicSink(Arc<Mutex<Vec<String>>>);

thread_local! {
    static SINK: RefCell<Option<PanicSink>> = const { RefCell::new(None) };
}

static HOOK: Once = Once::new();

impl PanicSink {
    /// Collects the panics of this thread from now on, until the guard is dropped.
    #[must_use]
    pub fn join(&self) -> PanicGuard {
        HOOK.call_once(|| {
            let before = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                if !collect(info) {
                    before(info);
                }
            }));
        });
        PanicGuard { before: SINK.replace(Some(self.clone())) }
    }

    /// Collects the panics of this thread for as long as it lives.
    pub fn join_for_good(&self) {
        let guard = self.join();
        std::mem::forget(guard);
    }

    /// Gives what was collected, the earliest first.
    #[must_use]
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Ends the collecting when it is dropped.
#[derive(Debug)]
pub struct PanicGuard {
    before: Option<PanicSink>,
}

impl Drop for PanicGuard {
    fn drop(&mut self) {
        SINK.set(self.before.take());
    }
}

/// Runs `work` and gives its output, or the text of its panic.
///
/// # Errors
/// The text of the panic.
pub fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    panic::catch_unwind(AssertUnwindSafe(work)).map_err(|payload| text_of(&*payload))
}

fn collect(info: &PanicHookInfo<'_>) -> bool {
    // A thread that is being torn down has no sink any more.
    let sink = SINK.try_with(|sink| sink.borrow().clone()).ok().flatten();
    let Some(sink) = sink else { return false };
    let place =
        info.location().map_or_else(String::new, |at| format!(" ({}:{})", at.file(), at.line()));
    let mut text = format!("panicked: {}{place}", text_of(info.payload()));
    // Only where RUST_BACKTRACE asks for it.
    let trace = Backtrace::capture();
    if trace.status() == std::backtrace::BacktraceStatus::Captured {
        text.push_str(&format!("\n{trace}"));
    }
    sink.0.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    true
}

fn text_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a text".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_collected_with_its_text_and_place() {
        let sink = PanicSink::default();
        let guard = sink.join();
        let result = caught(|| -> u8 { panic!("no {} left", "milk") });
        drop(guard);
        assert_eq!(result, Err("no milk left".to_owned()));
        let collected = sink.take();
        assert_eq!(collected.len(), 1);
        assert!(collected[0].contains("no milk left") && collected[0].contains("panics.rs:"));
        assert!(sink.take().is_empty());
    }

    #[test]
    fn threads_collect_apart() {
        let mine = PanicSink::default();
        let _guard = mine.join();
        let theirs = PanicSink::default();
        let sink = theirs.clone();
        let thread = std::thread::spawn(move || {
            sink.join_for_good();
            panic!("theirs");
        });
        assert!(thread.join().is_err());
        assert!(mine.take().is_empty());
        assert_eq!(theirs.take().len(), 1);
    }
}
