//! [`serve`]: answers the owner, keeps the console, and watches the child.

use super::{guest::Guest, passt::Passt, plan::Plan};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};
use vm_guest_protocol::AGENT_PORT;
use vm_launcher::{
    control::{
        Answer, End, FromLauncher, MachineSetUp, Refusal, Request, Stats, Status, ToLauncher,
    },
    inside::{
        channel::{Channel, Received},
        console::Console,
        process::name_thread,
        refuse::failed,
    },
};

/// How many bytes of the console are taken at a time.
const CONSOLE_STEP: usize = 16 << 10;

/// How much of what libkrun says is kept: the last of it.
const WORDS: usize = 4 << 10;

/// A guest without ACPI that is turned off halts, which libkrun does not notice. It says so; then it is looked at this
/// often, until it stood still so many times in a row, or has not for so long that it only said so.
const HALT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
const HALT_LOOKS: u32 = 3;
const HALT_PATIENCE: u32 = 100;

/// How long a child may take to end after passt has, where both do.
const END_GRACE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The longest line that asks for a connection.
const LONGEST_ASKING: usize = 32;

/// Makes the machine that the owner describes, and serves until it ends or the owner hangs up.
///
/// # Errors
/// When the owner breaks the protocol, or the host fails.
pub(super) fn serve(channel: &Arc<Channel>) -> io::Result<()> {
    let mut buffer = Vec::new();
    let (set_up, fds) = loop {
        match channel.receive(&mut buffer)? {
            Received::Message(ToLauncher::SetUp(set_up), fds) => break (set_up, fds),
            Received::Message(..) => {
                return Err(io::Error::other("something came before the machine's description"));
            }
            Received::HungUp => return Ok(()),
            Received::Nothing => {
                wait(&mut [PollFd::new(&**channel, PollFlags::IN)])?;
            }
        }
    };
    name_thread(&format!("vm-{}", set_up.name));
    let (plan, console) = match Plan::new(&set_up, fds) {
        Ok(made) => made,
        Err(refusal) => {
            channel.send(&FromLauncher::SetUpDone(Err(refusal.clone())))?;
            return Err(io::Error::other(refusal));
        }
    };
    if let Some(passt) = &plan.passt {
        channel.send_with(&FromLauncher::Companion, Some(passt.exact()))?;
    }
    channel.send(&FromLauncher::SetUpDone(Ok(())))?;
    let machine = Machine::Fresh(Box::new(plan));
    let (words, halt) = (Vec::new(), Halt::default());
    Server { set_up, channel: channel.clone(), buffer, machine, console, words, halt }.run()
}

/// What there is of the machine.
#[derive(Debug)]
enum Machine {
    Fresh(Box<Plan>),
    Running(Box<Guest>),
    Paused(Box<Guest>),
    /// It could not be started, which was told.
    Gone,
}

#[derive(Debug)]
struct Server {
    set_up: Box<MachineSetUp>,
    channel: Arc<Channel>,
    buffer: Vec<u8>,
    machine: Machine,
    console: Console,
    /// The last of what libkrun said.
    words: Vec<u8>,
    halt: Halt,
}

/// A guest that may have halted.
#[derive(Clone, Copy, Debug, Default)]
struct Halt {
    looks_left: u32,
    stood: u32,
}

/// What there is to do.
#[derive(Clone, Copy, Debug, Default)]
struct Ready {
    owner: bool,
    ended: bool,
    console: bool,
    words: bool,
    passt_ended: bool,
}

impl Server {
    fn run(mut self) -> io::Result<()> {
        loop {
            let ready = self.wait()?;
            if ready.console {
                self.take_console();
            }
            if ready.words {
                self.take_words();
            }
            if ready.ended || (ready.passt_ended && self.ends_soon()) {
                let end = self.end();
                return self.channel.send(&FromLauncher::Ended(end));
            }
            if ready.passt_ended {
                let end = self.end_without_passt();
                return self.channel.send(&FromLauncher::Ended(end));
            }
            if self.has_halted() {
                return self.channel.send(&FromLauncher::Ended(End::PoweredOff));
            }
            if ready.owner && !self.hear_owner()? {
                return Ok(());
            }
        }
    }

    fn wait(&self) -> io::Result<Ready> {
        let (Machine::Running(guest) | Machine::Paused(guest)) = &self.machine else {
            let owner = wait(&mut [PollFd::new(&*self.channel, PollFlags::IN)])?[0];
            return Ok(Ready { owner, ..Ready::default() });
        };
        let exact = guest.exact();
        // Without a passt this tells nothing new.
        let passt = guest.passt().map_or(exact, Passt::exact);
        let mut fds = [
            PollFd::new(&*self.channel, PollFlags::IN),
            PollFd::new(&exact, PollFlags::IN),
            PollFd::new(&guest.console, PollFlags::IN),
            PollFd::new(&guest.words, PollFlags::IN),
            PollFd::new(&passt, PollFlags::IN),
        ];
        let [owner, ended, console, words, passt_ended] = match self.halt.looks_left {
            0 => wait(&mut fds)?,
            _ => wait_for(&mut fds, Some(&HALT_PAUSE))?,
        };
        // Pipes whose other end is closed are told by the process's end, which follows.
        Ok(Ready { owner, ended, console, words, passt_ended })
    }

    /// Says whether the guest has halted for good, as far as that is known yet.
    fn has_halted(&mut self) -> bool {
        if self.console.take_halt() {
            self.halt = Halt { looks_left: HALT_PATIENCE, stood: 0 };
        }
        let Machine::Running(guest) = &self.machine else { return false };
        if self.halt.looks_left == 0 {
            return false;
        }
        self.halt.looks_left -= 1;
        self.halt.stood = if guest.stands() { self.halt.stood + 1 } else { 0 };
        self.halt.stood >= HALT_LOOKS
    }

    fn take_console(&mut self) {
        let (Machine::Running(guest) | Machine::Paused(guest)) = &mut self.machine else { return };
        let mut bytes = [0; CONSOLE_STEP];
        while let Some(taken) = take(&mut guest.console, &mut bytes) {
            for byte in taken {
                self.console.add(*byte);
            }
            self.console.write_out();
        }
    }

    fn take_words(&mut self) {
        let (Machine::Running(guest) | Machine::Paused(guest)) = &mut self.machine else { return };
        let mut bytes = [0; WORDS];
        while let Some(taken) = take(&mut guest.words, &mut bytes) {
            self.words.extend(taken);
            let surplus = self.words.len().saturating_sub(WORDS);
            self.words.drain(..surplus);
        }
    }

    /// Says whether the child is about to end: passt ends with it, and may be seen to have ended first.
    fn ends_soon(&self) -> bool {
        let (Machine::Running(guest) | Machine::Paused(guest)) = &self.machine else {
            return false;
        };
        let exact = guest.exact();
        let ended = wait_for(&mut [PollFd::new(&exact, PollFlags::IN)], Some(&END_GRACE));
        matches!(ended, Ok([true]))
    }

    /// Ends a machine whose network is gone, and with it the ports that are promised to it.
    fn end_without_passt(&mut self) -> End {
        self.take_console();
        let (Machine::Running(guest) | Machine::Paused(guest)) = &mut self.machine else {
            return End::Failed("passt ended".to_owned());
        };
        let how = guest.passt_mut().map(Passt::end).unwrap_or_default();
        End::Failed(format!("passt ended, and the guest's network with it: {how}"))
    }

    /// Says how the child ended, which it has.
    fn end(&mut self) -> End {
        self.take_console();
        self.take_words();
        let (Machine::Running(guest) | Machine::Paused(guest)) = &mut self.machine else {
            return End::Failed("the machine was never started".to_owned());
        };
        let status = guest.reap();
        let how = match status.as_ref().map(|status| (status.exit_status(), status)) {
            // Libkrun says the same of a guest that turned itself off and of one that was reset.
            Some((Some(0), _)) if self.console.saw_panic() => return End::Panicked,
            Some((Some(0), _)) => return End::PoweredOff,
            Some((Some(code), _)) => format!("status {code}"),
            Some((None, status)) => match status.terminating_signal() {
                Some(signal) => format!("signal {signal}"),
                None => "an unknown status".to_owned(),
            },
            None => "an unknown status".to_owned(),
        };
        let words = String::from_utf8_lossy(&self.words);
        End::Failed(match words.trim() {
            "" => format!("libkrun ended with {how}"),
            words => format!("libkrun ended with {how}: {words}"),
        })
    }

    /// Takes a message, if there is one. Says whether to go on.
    fn hear_owner(&mut self) -> io::Result<bool> {
        match self.channel.receive(&mut self.buffer)? {
            Received::Nothing => {}
            Received::HungUp => return Ok(false),
            Received::Message(ToLauncher::SetUp(_) | ToLauncher::Load { .. }, _) => {
                return Err(io::Error::other("the machine was described twice"));
            }
            Received::Message(ToLauncher::Taken { .. }, _) => {}
            Received::Message(ToLauncher::Request { id, request }, fds) => {
                let companion = request == Request::Boot;
                let (result, beside) = match self.answer(&request, &fds) {
                    Ok((answer, beside)) => (Ok(answer), beside),
                    Err(refusal) => (Err(refusal), None),
                };
                if companion && let Machine::Running(guest) = &self.machine {
                    self.channel.send_with(&FromLauncher::Companion, Some(guest.exact()))?;
                }
                let reply = FromLauncher::Reply { id, result };
                self.channel.send_with(&reply, beside.as_ref().map(AsFd::as_fd))?;
            }
        }
        Ok(true)
    }

    fn answer(
        &mut self,
        request: &Request,
        fds: &[OwnedFd],
    ) -> Result<(Answer, Option<OwnedFd>), Refusal> {
        let done = |()| (Answer::Done, None);
        match request {
            Request::Status => Ok((Answer::Status(self.status()), None)),
            Request::Stats => Ok((Answer::Stats(self.stats()?), None)),
            Request::Boot => self.boot().map(done),
            Request::Pause => self.pause().map(done),
            Request::Resume => self.resume().map(done),
            Request::Connect => Ok((Answer::Connected, Some(self.connect(fds)?))),
            Request::Listen { .. } | Request::Unlisten { .. } => {
                Err(Refusal::Unsupported("vsock".to_owned()))
            }
            Request::Inspect => Err(Refusal::Unsupported("inspect".to_owned())),
            Request::Capture { .. } => Err(Refusal::Unsupported("snapshot".to_owned())),
            Request::Fork { .. } => Err(Refusal::Unsupported("fork".to_owned())),
        }
    }

    fn status(&self) -> Status {
        match &self.machine {
            Machine::Fresh(_) => Status::Fresh,
            Machine::Running(_) | Machine::Gone => Status::Running,
            Machine::Paused(_) => Status::Paused,
        }
    }

    fn stats(&self) -> Result<Stats, Refusal> {
        let (Machine::Running(guest) | Machine::Paused(guest)) = &self.machine else {
            return Ok(Stats::default());
        };
        let (time, memory) = guest.usage().map_err(|error| failed("process table", error))?;
        Ok(Stats {
            vcpu_time_ns: u64::try_from(time.as_nanos()).unwrap_or(u64::MAX),
            vm_exits: None,
            guest_resident_bytes: memory,
        })
    }

    fn boot(&mut self) -> Result<(), Refusal> {
        match std::mem::replace(&mut self.machine, Machine::Gone) {
            Machine::Fresh(plan) => {
                let guest = Guest::start(*plan, &self.set_up.name);
                let guest = guest.map_err(|error| failed("copy of the process", error))?;
                self.machine = Machine::Running(Box::new(guest));
                Ok(())
            }
            other => {
                self.machine = other;
                Err(Refusal::State(self.status()))
            }
        }
    }

    fn pause(&mut self) -> Result<(), Refusal> {
        match std::mem::replace(&mut self.machine, Machine::Gone) {
            Machine::Running(guest) => {
                let paused = guest.pause().map_err(|error| failed("pause", error));
                self.machine = match paused {
                    Ok(()) => Machine::Paused(guest),
                    Err(_) => Machine::Running(guest),
                };
                // What was printed so far is there to be read.
                self.take_console();
                paused
            }
            other => {
                self.machine = other;
                Err(Refusal::State(self.status()))
            }
        }
    }

    fn resume(&mut self) -> Result<(), Refusal> {
        match std::mem::replace(&mut self.machine, Machine::Gone) {
            Machine::Paused(guest) => {
                let resumed = guest.resume().map_err(|error| failed("resume", error));
                self.machine = Machine::Running(guest);
                resumed
            }
            other => {
                self.machine = other;
                Err(Refusal::State(self.status()))
            }
        }
    }

    /// Takes a descriptor with a line that names a port, and gives the stream.
    fn connect(&mut self, fds: &[OwnedFd]) -> Result<OwnedFd, Refusal> {
        let port = fds.first().and_then(asked_port);
        if port != Some(AGENT_PORT) {
            return Err(Refusal::Unsupported("vsock".to_owned()));
        }
        let guest = match &mut self.machine {
            Machine::Running(guest) => guest,
            Machine::Fresh(_) | Machine::Paused(_) | Machine::Gone => {
                return Err(Refusal::NotListening);
            }
        };
        let stream = guest.connect().map_err(|error| failed("connection", error))?;
        stream.ok_or(Refusal::NotListening)
    }
}

/// Waits until something is there, and says of each whether it is.
fn wait<const N: usize>(fds: &mut [PollFd<'_>; N]) -> io::Result<[bool; N]> {
    wait_for(fds, None)
}

fn wait_for<const N: usize>(
    fds: &mut [PollFd<'_>; N],
    most: Option<&Timespec>,
) -> io::Result<[bool; N]> {
    match poll(fds, most) {
        Ok(_) => {}
        Err(Errno::INTR) => return Ok([false; N]),
        Err(error) => return Err(error.into()),
    }
    Ok(std::array::from_fn(|index| !fds[index].revents().is_empty()))
}

/// Takes what is there, if anything is.
fn take<'a>(pipe: &mut File, bytes: &'a mut [u8]) -> Option<&'a [u8]> {
    match pipe.read(bytes) {
        Ok(0) | Err(_) => None,
        Ok(length) => Some(&bytes[..length]),
    }
}

/// Reads the port of a line `CONNECT port`.
fn asked_port(fd: &OwnedFd) -> Option<u32> {
    let mut line = [0; LONGEST_ASKING];
    let (length, _) = rustix::net::recv(fd, &mut line, rustix::net::RecvFlags::DONTWAIT).ok()?;
    let line = std::str::from_utf8(line.get(..length)?).ok()?;
    line.strip_prefix("CONNECT ")?.strip_suffix('\n')?.parse().ok()
}
