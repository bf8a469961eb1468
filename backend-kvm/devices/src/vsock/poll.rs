//! [`Poll`]: everything that a vsock device waits for on the host, behind one descriptor.

use crate::queue::Wakeup;
use rustix::{
    event::{
        Timespec,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
    },
    fd::OwnedFd,
    io::Errno,
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create,
        timerfd_settime,
    },
};
use std::{
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

/// How long a tick is.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// The first number for a stream.
pub(super) const FIRST_TOKEN: u64 = 2;

/// What the host's side waits for: streams, a timer, and its own wish to be called again.
///
/// Streams are watched for edges, so that one that nobody can serve now does not wake anyone.
#[derive(Debug)]
pub(super) struct Poll {
    epoll: OwnedFd,
    wakeup: Wakeup,
    timer: OwnedFd,
    ticking: bool,
}

/// What a call of [`Poll::wait`] found.
#[derive(Clone, Copy, Debug)]
pub(super) enum Found {
    /// A tick has passed, or several while nobody called.
    Tick,
    /// Something is there on the stream with this number.
    Stream(u64, EventFlags),
}

impl Poll {
    /// Makes one that waits for nothing.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let wakeup = Wakeup::new()?;
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        epoll::add(&epoll, &wakeup, EventData::new_u64(WAKEUP), EventFlags::IN)?;
        epoll::add(&epoll, &timer, EventData::new_u64(TIMER), EventFlags::IN)?;
        Ok(Self { epoll, wakeup, timer, ticking: false })
    }

    /// Watches a stream from now on.
    pub(super) fn add(&self, stream: &UnixStream, token: u64) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, stream, EventData::new_u64(token), stream_flags(false))?)
    }

    /// Watches a stream for room to write too, or no longer; also tells once more what is there.
    pub(super) fn change(&self, stream: &UnixStream, token: u64, room: bool) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, stream, EventData::new_u64(token), stream_flags(room))?)
    }

    /// Watches a stream no longer.
    pub(super) fn remove(&self, stream: &UnixStream) {
        // It fails only where the stream is not watched.
        let _ = epoll::delete(&self.epoll, stream);
    }

    /// Makes the descriptor readable, so that the device is called again.
    pub(super) fn call_again(&self) {
        self.wakeup.raise();
    }

    /// Ticks from now on, or no longer.
    pub(super) fn tick(&mut self, on: bool) {
        if self.ticking == on {
            return;
        }
        self.ticking = on;
        let every = if on { TICK } else { Duration::ZERO };
        let every = Timespec { tv_sec: 0, tv_nsec: every.subsec_nanos().into() };
        // It fails only for times that make no sense.
        let _ = timerfd_settime(
            &self.timer,
            TimerfdTimerFlags::empty(),
            &Itimerspec { it_interval: every, it_value: every },
        );
    }

    /// Ticks no longer, and forgets that the device wanted to be called again.
    pub(super) fn rest(&mut self) {
        self.tick(false);
        self.wakeup.lower();
    }

    /// Gives some of what is there, without waiting; the rest stays for the next call.
    pub(super) fn wait(&self, found: &mut Vec<Found>) {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut buffer = [const { MaybeUninit::<Event>::uninit() }; MAX_EVENTS];
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut buffer, Some(&now)) else {
            return;
        };
        for event in events {
            let flags = event.flags;
            match event.data.u64() {
                WAKEUP => self.wakeup.lower(),
                TIMER => {
                    let mut count = [0; 8];
                    if rustix::io::read(&self.timer, &mut count) != Err(Errno::AGAIN) {
                        found.push(Found::Tick);
                    }
                }
                token => found.push(Found::Stream(token, flags)),
            }
        }
    }
}

impl AsFd for Poll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

const WAKEUP: u64 = 0;
const TIMER: u64 = 1;

/// The most events that one call takes.
const MAX_EVENTS: usize = 128;

fn stream_flags(room: bool) -> EventFlags {
    let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
    if room { flags | EventFlags::OUT } else { flags }
}
