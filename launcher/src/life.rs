//! [`Life`]: one launcher process, the talk with it, and the certain end of both.

mod listening;

use self::listening::Listeners;
pub use self::listening::Listening;
use crate::{
    control::{
        Answer, CONTROL_VERSION, End, FromLauncher, MAX_PACKET, Refusal, Request, ToLauncher,
    },
    packet::{self, BadPacket, Received},
    program::{self, Process, Started, last_words},
    ready::watched,
    ring::ConsoleRing,
    sync::lock,
};
use bytes::Bytes;
use rustix::{
    event::{PollFd, PollFlags},
    time::ClockId,
};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, PipeWriter},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    process::ExitStatus,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{oneshot, watch},
};
use vm_core::machine::{MachineError, MachineExit};
use vm_guest_protocol::boot::BootMark;
use vm_trait::{CrashReason, VmId};

/// How long a launcher that has said its last word may take to exit before it is killed.
const EXIT_GRACE: Duration = Duration::from_secs(2);

/// The most processes that a machine has beside its launcher.
const MOST_COMPANIONS: usize = 4;

/// How long a launcher may take to say hello.
const HELLO: Duration = Duration::from_secs(15);

/// How long the stages of a machine's life took, as far as it has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StageTimes {
    /// Starting the launcher's process, until its program was entered.
    pub launcher_spawn: Duration,
    /// From there until the launcher said hello.
    pub launcher_hello: Duration,
    /// From there until the machine was made.
    pub vm_setup: Option<Duration>,
    /// From the order to boot until the guest's first process ran.
    pub kernel_to_init: Option<Duration>,
    /// When that was, on the host's monotonic clock.
    pub init_at: Option<Duration>,
    /// From there until the agent listened.
    pub init_to_listening: Option<Duration>,
}

/// The present lives of VMs.
#[derive(Debug, Default)]
pub struct Lives(Mutex<BTreeMap<VmId, Weak<Life>>>);

impl Lives {
    /// Gives a VM's present life, while its machine exists.
    #[must_use]
    pub fn of(&self, vm: VmId) -> Option<Arc<Life>> {
        lock(&self.0).get(&vm)?.upgrade()
    }

    /// Notes a VM's present life.
    pub fn keep(&self, vm: VmId, life: &Arc<Life>) {
        let mut lives = lock(&self.0);
        lives.retain(|_, life| life.strong_count() > 0);
        lives.insert(vm, Arc::downgrade(life));
    }
}

/// One launcher process, running or ended.
#[derive(Debug)]
pub struct Life {
    control: AsyncFd<OwnedFd>,
    exact: AsyncFd<OwnedFd>,
    pid: u32,
    process: Mutex<Process>,
    /// When it closes, the launcher ends.
    lifeline: Mutex<Option<PipeWriter>>,
    messages: File,
    ring: ConsoleRing,
    exit: watch::Sender<Option<MachineExit>>,
    killed: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next_request: u64,
    waiting: BTreeMap<Awaited, oneshot::Sender<Heard>>,
    listeners: Listeners,
    /// Other processes of the machine.
    companions: Vec<OwnedFd>,
    end: Option<End>,
    /// What the launcher did that made it unfit to live.
    broken: Option<String>,
    over: bool,
    stages: StageTimes,
    boot_ordered: Option<Duration>,
}

/// What a launcher answered, with its descriptors.
type Heard = (Result<Answer, Refusal>, Vec<OwnedFd>);

/// An answer that somebody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Awaited {
    Hello,
    SetUp,
    Request(u64),
}

impl Life {
    /// Takes charge of a launcher that was started, and waits until it says hello. When the future is dropped, the
    /// launcher is killed.
    ///
    /// # Errors
    /// When the launcher does not say hello in time, is of another version, or exits: with what it said.
    pub async fn begin(started: Started, ring: ConsoleRing) -> Result<Arc<Self>, MachineError> {
        Self::hear_first(started, ring, BTreeMap::new()).await
    }

    /// Takes charge of a launcher that another one made as a copy of itself, and waits until its machine is made.
    ///
    /// # Errors
    /// As [`begin`](Self::begin) and [`set_up`](Self::set_up).
    pub async fn of_copy(started: Started, ring: ConsoleRing) -> Result<Arc<Self>, MachineError> {
        let began = now();
        let (made, heard) = oneshot::channel();
        let waiting = BTreeMap::from([(Awaited::SetUp, made)]);
        let life = Self::hear_first(started, ring, waiting).await?;
        let mut doomed = Doomed(Some(life.clone()));
        life.made(heard.await.ok(), began).await?;
        doomed.0 = None;
        Ok(life)
    }

    async fn hear_first(
        started: Started,
        ring: ConsoleRing,
        mut waiting: BTreeMap<Awaited, oneshot::Sender<Heard>>,
    ) -> Result<Arc<Self>, MachineError> {
        let Started { control, process, lifeline, messages, spawn_time } = started;
        let began = now();
        let (hello, heard) = oneshot::channel();
        let stages = StageTimes { launcher_spawn: spawn_time, ..StageTimes::default() };
        waiting.insert(Awaited::Hello, hello);
        let state = State { waiting, stages, ..State::default() };
        let control = watched(control, Interest::READABLE | Interest::WRITABLE);
        let control = control.map_err(|error| host(&error))?;
        let exact = process.exact().map_err(|error| host(&error))?;
        let exact = watched(exact, Interest::READABLE).map_err(|error| host(&error))?;
        let (exit, _) = watch::channel(None);
        let life = Arc::new(Self {
            control,
            exact,
            pid: process.pid(),
            process: Mutex::new(process),
            lifeline: Mutex::new(Some(lifeline)),
            messages,
            ring,
            exit,
            killed: AtomicBool::new(false),
            state: Mutex::new(state),
        });
        let mut doomed = Doomed(Some(life.clone()));
        tokio::spawn(watch(Watch(Some(life.clone()))));
        match tokio::time::timeout(HELLO, heard).await {
            Ok(Ok((Ok(_), _))) => {}
            Ok(Ok((Err(refusal), _))) => return Err(refusal.into()),
            Ok(Err(_)) => return Err(life.end_as_error("did not come up")),
            Err(_) => {
                let text = life.words();
                return Err(MachineError::Failed(format!(
                    "the launcher did not say hello within {HELLO:?}{text}"
                )));
            }
        }
        life.lock().stages.launcher_hello = now().saturating_sub(began);
        doomed.0 = None;
        Ok(life)
    }

    /// Gives the file of the console's ring.
    #[must_use]
    pub fn ring(&self) -> BorrowedFd<'_> {
        self.ring.file()
    }

    /// Describes the machine, and waits until it is made.
    ///
    /// # Errors
    /// Why it cannot be made.
    pub async fn set_up(
        &self,
        message: &ToLauncher,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), MachineError> {
        let began = now();
        let waiting = self.await_answer(Awaited::SetUp)?;
        self.send(message, fds).await?;
        self.made(waiting.answer().await, began).await
    }

    /// Takes note of what came of the making of a machine.
    async fn made(&self, heard: Option<Heard>, began: Duration) -> Result<(), MachineError> {
        match heard {
            Some((Ok(_), _)) => {}
            Some((Err(refusal), _)) => return Err(refusal.into()),
            None => {
                self.ended().await;
                return Err(self.end_as_error("ended during the set-up"));
            }
        }
        self.lock().stages.vm_setup = Some(now().saturating_sub(began));
        Ok(())
    }

    /// Asks for something, and waits for the answer.
    ///
    /// # Errors
    /// [`MachineError::Ended`] where the launcher ends first, and what it refuses.
    pub async fn request(
        &self,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, MachineError> {
        Ok(self.ask(request, fds).await??)
    }

    /// As [`request`](Self::request), but gives a refusal as it is.
    ///
    /// # Errors
    /// [`MachineError::Ended`], or when the launcher cannot be reached.
    pub async fn ask(
        &self,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Result<Answer, Refusal>, MachineError> {
        self.ask_for(request, fds).await.map(|(result, _)| result)
    }

    /// As [`ask`](Self::ask), with the descriptors that came beside the answer.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub async fn ask_for(
        &self,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Heard, MachineError> {
        let id = self.number();
        let waiting = self.await_answer(Awaited::Request(id))?;
        if request == Request::Boot {
            self.lock().boot_ordered = Some(now());
        }
        self.send(&ToLauncher::Request { id, request }, fds).await?;
        waiting.answer().await.ok_or(MachineError::Ended)
    }

    /// Kills the launcher without waiting for its end.
    pub fn kill(&self) {
        self.killed.store(true, Ordering::Release);
        program::kill(self.exact.get_ref());
    }

    /// Waits for the end, after which nothing of this life is left on the host but what this value holds.
    pub async fn ended(&self) -> MachineExit {
        let mut exit = self.exit.subscribe();
        loop {
            if let Some(exit) = &*exit.borrow_and_update() {
                return exit.clone();
            }
            // `self` holds the sender, so that this cannot fail.
            let _ = exit.changed().await;
        }
    }

    /// Says whether it has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Gives the number of its process while that runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        (!self.is_over()).then_some(self.pid)
    }

    /// Gives how long its stages took so far.
    #[must_use]
    pub fn stages(&self) -> StageTimes {
        self.lock().stages
    }

    /// Makes a console ring with the content of this one's.
    ///
    /// # Errors
    /// The operating system's.
    pub fn copy_console(&self) -> io::Result<ConsoleRing> {
        self.ring.copy()
    }

    /// Gives the last of the console, and how the machine failed, if it did.
    #[must_use]
    pub fn console(&self) -> Bytes {
        let console = self.ring.last();
        let state = self.lock();
        let ((Some(End::Failed(why)), _) | (_, Some(why))) = (&state.end, &state.broken) else {
            return console;
        };
        let line_end = if console.last().is_none_or(|last| *last == b'\n') { "" } else { "\r\n" };
        let note = format!("{line_end}twinvm: the machine failed: {why}\r\n");
        [&console[..], note.as_bytes()].concat().into()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn number(&self) -> u64 {
        let mut state = self.lock();
        state.next_request += 1;
        state.next_request
    }

    fn await_answer(&self, awaited: Awaited) -> Result<Waiting<'_>, MachineError> {
        let (send, answer) = oneshot::channel();
        let mut state = self.lock();
        if state.over {
            return Err(MachineError::Ended);
        }
        state.waiting.insert(awaited, send);
        Ok(Waiting { life: self, awaited, answer })
    }

    async fn send(&self, message: &ToLauncher, fds: &[BorrowedFd<'_>]) -> Result<(), MachineError> {
        let bytes = packet::encode(message).map_err(|error| host(&error))?;
        let sent = self
            .control
            .async_io(Interest::WRITABLE, |socket| packet::send(socket.as_fd(), &bytes, fds));
        match sent.await {
            Ok(()) => Ok(()),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                Err(MachineError::Ended)
            }
            Err(error) => Err(host(&error)),
        }
    }

    async fn receive(&self, buffer: &mut [u8]) -> Result<Received, BadPacket> {
        loop {
            let mut ready = self.control.readable().await?;
            match packet::receive(self.control.get_ref().as_fd(), buffer)? {
                Received::Nothing => ready.clear_ready(),
                received => return Ok(received),
            }
        }
    }

    /// Listens to the launcher until nothing more is to be heard.
    async fn hear(&self, buffer: &mut [u8]) {
        loop {
            let heard = match self.receive(buffer).await {
                Ok(Received::Packet(message, fds)) => self.take(message, fds),
                Ok(Received::HangUp | Received::Nothing) => return,
                Err(error) => Err(error.to_string()),
            };
            match heard {
                Ok(true) => {}
                Ok(false) => return,
                Err(why) => {
                    self.lock().broken = Some(format!("the launcher broke its protocol: {why}"));
                    program::kill(self.exact.get_ref());
                    return;
                }
            }
        }
    }

    /// Acts on a message. Says whether more may follow.
    fn take(&self, message: FromLauncher, fds: Vec<OwnedFd>) -> Result<bool, String> {
        let mut state = self.lock();
        match message {
            FromLauncher::Hello { version } if version == CONTROL_VERSION => {
                state.answer(Awaited::Hello, (Ok(Answer::Done), fds))?;
            }
            FromLauncher::Hello { version } => {
                let reason = format!(
                    "the launcher speaks version {version}, this program version {CONTROL_VERSION}"
                );
                state.answer(Awaited::Hello, (Err(Refusal::Failed(reason)), fds))?;
            }
            FromLauncher::SetUpDone(result) => {
                state.answer(Awaited::SetUp, (result.map(|()| Answer::Done), fds))?;
            }
            FromLauncher::Reply { id, .. } if id > state.next_request => {
                return Err(format!("it answered request {id}, which was never made"));
            }
            FromLauncher::Reply { id, result } => {
                // Whoever asked may have gone away.
                let _ = state.answer(Awaited::Request(id), (result, fds));
            }
            FromLauncher::Incoming { port, listener } => {
                self.come_in(&mut state, port, listener, fds.into_iter().next());
            }
            FromLauncher::Companion if state.companions.len() >= MOST_COMPANIONS => {
                return Err("its machine has too many processes".to_owned());
            }
            FromLauncher::Companion => state.companions.extend(fds.into_iter().next()),
            FromLauncher::Mark { mark, at_ns } => state.mark(mark, Duration::from_nanos(at_ns)),
            FromLauncher::Ended(end) => {
                state.end = Some(end);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reaps the launcher, whose process has ended, and tells everybody.
    fn finish(&self, buffer: &mut [u8]) {
        if self.is_over() {
            return;
        }
        // Its last words may still be there to be read.
        while self.lock().end.is_none()
            && let Ok(Received::Packet(message, fds)) =
                packet::receive(self.control.get_ref().as_fd(), buffer)
            && self.take(message, fds) == Ok(true)
        {}
        let status = self.process.lock().unwrap_or_else(PoisonError::into_inner).reap();
        let companions = std::mem::take(&mut self.lock().companions);
        companions.iter().for_each(program::await_end);
        drop(self.lifeline.lock().unwrap_or_else(PoisonError::into_inner).take());
        let exit = {
            let mut state = self.lock();
            state.over = true;
            state.waiting.clear();
            state.listeners.clear();
            self.how(&mut state, status.ok().flatten())
        };
        self.exit.send_replace(Some(exit));
    }

    fn how(&self, state: &mut State, status: Option<ExitStatus>) -> MachineExit {
        match &state.end {
            // A guest that resets its machine goes down in an orderly way; nothing boots it again.
            Some(End::PoweredOff | End::Reset) => MachineExit::PoweredOff,
            Some(End::Panicked) => MachineExit::Crashed(CrashReason::GuestPanic),
            Some(End::Failed(why)) => MachineExit::Failed(why.clone()),
            None if self.killed.load(Ordering::Acquire) => MachineExit::Killed,
            None => {
                let why = state.broken.get_or_insert_with(|| {
                    let status = status.map_or_else(String::new, |status| format!(": {status}"));
                    format!("the launcher ended unasked{status}{}", self.words())
                });
                MachineExit::Failed(why.clone())
            }
        }
    }

    fn end_as_error(&self, what: &str) -> MachineError {
        let state = self.lock();
        let why = match (&state.end, &state.broken) {
            (Some(End::Failed(why)), _) | (_, Some(why)) => why.clone(),
            _ => format!("the launcher {what}"),
        };
        MachineError::Failed(why)
    }

    /// Gives what the launcher wrote to its standard error, to be put after a text.
    fn words(&self) -> String {
        match last_words(&self.messages) {
            words if words.is_empty() => words,
            words => format!("; it said: {words}"),
        }
    }
}

impl State {
    fn answer(&mut self, awaited: Awaited, heard: Heard) -> Result<(), String> {
        let waiting = self.waiting.remove(&awaited);
        let waiting =
            waiting.ok_or_else(|| format!("nobody waits for an answer to {awaited:?}"))?;
        let _ = waiting.send(heard);
        Ok(())
    }

    fn mark(&mut self, mark: u8, at: Duration) {
        if mark == BootMark::Init as u8 && self.stages.init_at.is_none() {
            self.stages.init_at = Some(at);
            self.stages.kernel_to_init =
                self.boot_ordered.map(|ordered| at.saturating_sub(ordered));
        } else if mark == BootMark::Listening as u8 && self.stages.init_to_listening.is_none() {
            self.stages.init_to_listening = self.stages.init_at.map(|init| at.saturating_sub(init));
        }
    }
}

/// Waits for an answer, and forgets about it when dropped.
struct Waiting<'a> {
    life: &'a Life,
    awaited: Awaited,
    answer: oneshot::Receiver<Heard>,
}

impl Waiting<'_> {
    /// Gives the answer, or nothing where the launcher ended first.
    async fn answer(mut self) -> Option<Heard> {
        (&mut self.answer).await.ok()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.life.lock().waiting.remove(&self.awaited);
    }
}

/// Kills a launcher that nobody wants any more.
struct Doomed(Option<Arc<Life>>);

impl Drop for Doomed {
    fn drop(&mut self) {
        if let Some(life) = self.0.take() {
            life.kill();
        }
    }
}

/// The duty to see a launcher's end. It is passed on to a thread when its task is dropped with its runtime.
struct Watch(Option<Arc<Life>>);

impl Drop for Watch {
    fn drop(&mut self) {
        let Some(life) = self.0.take() else { return };
        if life.is_over() {
            return;
        }
        life.kill();
        let end = {
            let life = life.clone();
            move || see_the_end(&life)
        };
        let thread = thread::Builder::new().name("vm-launcher-end".to_owned()).spawn(end);
        if thread.is_err() {
            see_the_end(&life);
        }
    }
}

fn see_the_end(life: &Life) {
    let mut exit = [PollFd::from_borrowed_fd(life.exact.get_ref().as_fd(), PollFlags::IN)];
    let _ = rustix::io::retry_on_intr(|| rustix::event::poll(&mut exit, None));
    life.finish(&mut vec![0; MAX_PACKET]);
}

async fn watch(mut watch: Watch) {
    let Some(life) = watch.0.clone() else { return };
    let mut buffer = vec![0; MAX_PACKET];
    let silent = tokio::select! {
        () = life.hear(&mut buffer) => true,
        _ = life.exact.readable() => false,
    };
    if silent {
        let _ = tokio::time::timeout(EXIT_GRACE, life.exact.readable()).await;
        program::kill(life.exact.get_ref());
    }
    if life.exact.readable().await.is_err() {
        // The runtime is going down.
        return;
    }
    life.finish(&mut buffer);
    watch.0 = None;
}

/// Gives the host's monotonic clock, which launchers read too.
fn now() -> Duration {
    let time = rustix::time::clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Says why the host did not do something for a launcher.
#[must_use]
pub fn host(error: &io::Error) -> MachineError {
    use rustix::io::Errno;
    let what = match Errno::from_io_error(error) {
        Some(Errno::AGAIN) => "processes",
        Some(Errno::NOMEM) => "memory",
        Some(Errno::MFILE | Errno::NFILE) => "file descriptors",
        _ => return MachineError::Failed(format!("the launcher could not be used: {error}")),
    };
    MachineError::Exhausted(what.to_owned())
}

impl From<Refusal> for MachineError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Config { field, reason } => Self::Config { field, reason },
            Refusal::Exhausted(what) => Self::Exhausted(what),
            Refusal::Incompatible { field, found, wanted } => {
                Self::Incompatible { field, found, wanted }
            }
            Refusal::Corrupt(reason) => Self::Corrupt(reason),
            refusal @ (Refusal::State(_) | Refusal::Generation(_)) => {
                Self::Failed(refusal.to_string())
            }
            Refusal::Unsupported(what) => Self::Unsupported(what),
            Refusal::NotListening => Self::NotListening,
            Refusal::PortInUse(port) => Self::PortInUse(port),
            Refusal::Failed(reason) => Self::Failed(reason),
        }
    }
}

#[cfg(test)]
#[path = "life_tests.rs"]
mod tests;
