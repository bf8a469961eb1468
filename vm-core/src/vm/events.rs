//! Event streams: each reader has a bounded queue of its own.

use futures_core::Stream;
use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, Weak},
    task::{Context, Poll, Waker},
};
use vm_planted_bugs::{Bug, planted};
use vm_trait::VmEvent;

/// How many events a reader may be behind.
const MOST: usize = 1024;

/// The readers of one machine's events.
#[derive(Debug, Default)]
pub(super) struct Subscribers(Vec<Weak<Mutex<Queue>>>);

/// One reader.
#[derive(Debug)]
pub(super) struct Subscription(Arc<Mutex<Queue>>);

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<VmEvent>,
    missed: u64,
    ended: bool,
    waker: Option<Waker>,
}

impl Subscribers {
    pub(super) fn subscribe(&mut self) -> Subscription {
        let queue = Arc::new(Mutex::new(Queue::default()));
        let only = planted(Bug::OneReaderAtATime);
        self.0.retain(|known| known.strong_count() > 0 && !only);
        self.0.push(Arc::downgrade(&queue));
        Subscription(queue)
    }

    pub(super) fn publish(&self, event: &VmEvent) {
        self.each(|queue| {
            if queue.events.len() == MOST {
                queue.events.pop_front();
                queue.missed += u64::from(!planted(Bug::MissedEventsAreNotTold));
            }
            queue.events.push_back(event.clone());
        });
    }

    /// Ends all streams once their readers have read what there is.
    pub(super) fn end(&self) {
        self.each(|queue| queue.ended = true);
    }

    fn each(&self, mut change: impl FnMut(&mut Queue)) {
        for queue in self.0.iter().filter_map(Weak::upgrade) {
            let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut queue);
            if let Some(waker) = queue.waker.take() {
                waker.wake();
            }
        }
    }
}

impl Stream for Subscription {
    type Item = VmEvent;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<VmEvent>> {
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.missed > 0 {
            let missed = std::mem::take(&mut queue.missed);
            return Poll::Ready(Some(VmEvent::Missed(missed)));
        }
        match queue.events.pop_front() {
            Some(event) => Poll::Ready(Some(event)),
            None if queue.ended => Poll::Ready(None),
            None => {
                queue.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{FutureExt, StreamExt};

    #[test]
    fn a_slow_reader_is_told_what_it_missed() {
        let mut subscribers = Subscribers::default();
        let mut reader = subscribers.subscribe();
        for _ in 0..MOST + 3 {
            subscribers.publish(&VmEvent::AgentLost);
        }
        subscribers.end();
        assert_eq!(reader.next().now_or_never(), Some(Some(VmEvent::Missed(3))));
        let rest = reader.collect::<Vec<_>>().now_or_never();
        assert_eq!(rest.map(|events| events.len()), Some(MOST));
    }

    #[test]
    fn readers_that_left_are_forgotten() {
        let mut subscribers = Subscribers::default();
        for _ in 0..10 {
            drop(subscribers.subscribe());
        }
        let _reader = subscribers.subscribe();
        assert_eq!(subscribers.0.len(), 1);
    }
}
