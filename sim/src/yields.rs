//! Seeded yields, so that even a first-in-first-out scheduler explores interleavings.

use crate::rng::{Purpose, Streams};
use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

/// How often the simulator lets other tasks go first where it could go on at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Yields(u32);

impl Yields {
    /// Never yields.
    pub const NEVER: Self = Self(0);

    /// Yields once in `n` times; never where `n` is 0.
    #[must_use]
    pub fn one_in(n: u32) -> Self {
        Self(n)
    }

    pub(crate) fn strike(self, streams: &Streams) -> bool {
        streams.one_in(Purpose::Yield, self.0)
    }
}

/// Lets every other ready task go first, once.
pub(crate) fn yield_now() -> impl Future<Output = ()> + Send {
    YieldNow(false)
}

struct YieldNow(bool);

impl Future for YieldNow {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.0 {
            return Poll::Ready(());
        }
        self.0 = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
