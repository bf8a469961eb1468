//! [`serve`]: the event loop, which answers the owner and drives the devices.

use super::{
    channel::{Channel, Received},
    copies,
    fds::of_event,
    machine::Machine,
    process::name_thread,
    saving,
};
use crate::control::{Answer, FromLauncher, MachineSetUp, Refusal, Request, Status, ToLauncher};
use rustix::{
    event::{PollFd, PollFlags, epoll, poll},
    io::Errno,
};
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};
use vm_kvm_devices::vsock::Listener;

/// Tokens of the outer epoll descriptor.
const CONTROL: u64 = 0;
const OUTCOME: u64 = 1;
const FLUSH: u64 = 2;
const DEVICES: u64 = 3;

/// How many devices' events are handled before the owner is looked at again.
const BATCH: usize = 16;

/// Makes the machine that the owner describes, and serves until it ends or the owner hangs up.
///
/// # Errors
/// When the owner breaks the protocol, or the host fails.
pub(super) fn serve(channel: &Arc<Channel>) -> io::Result<()> {
    let mut buffer = Vec::new();
    let Some((message, fds)) = wait_for_set_up(channel, &mut buffer)? else { return Ok(()) };
    let named = |set_up: &MachineSetUp| name_thread(&format!("vm-{}", set_up.name));
    let made = match message {
        ToLauncher::SetUp(set_up) => {
            named(&set_up);
            Machine::new(&set_up, fds, channel)
        }
        ToLauncher::Load { set_up, memory_files, track } => {
            named(&set_up);
            let mut machine = Machine::load(&set_up, memory_files, fds, channel);
            if track && let Ok(machine) = &mut machine {
                machine.track_from_loaded();
            }
            machine
        }
        _ => return Err(io::Error::other("something came before the machine's description")),
    };
    serve_made(made, channel, buffer)
}

/// Tells the owner what came of the making of a machine, and serves it until it ends or the owner hangs up.
///
/// # Errors
/// As [`serve`]; also why there is no machine.
pub(super) fn serve_made(
    made: Result<Machine, Refusal>,
    channel: &Arc<Channel>,
    buffer: Vec<u8>,
) -> io::Result<()> {
    let machine = match made {
        Ok(machine) => machine,
        Err(refusal) => {
            channel.send(&FromLauncher::SetUpDone(Err(refusal.clone())))?;
            return Err(io::Error::other(refusal));
        }
    };
    let mut server = Server::new(machine, channel.clone(), buffer)?;
    channel.send(&FromLauncher::SetUpDone(Ok(())))?;
    server.run()
}

fn wait_for_set_up(
    channel: &Channel,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<(ToLauncher, Vec<OwnedFd>)>> {
    loop {
        match channel.receive(buffer)? {
            Received::Message(message, fds) => return Ok(Some((message, fds))),
            Received::HungUp => return Ok(None),
            Received::Nothing => {
                let mut readable = [PollFd::new(channel, PollFlags::IN)];
                match poll(&mut readable, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
}

/// Whether the event loop goes on.
#[derive(Debug, PartialEq, Eq)]
enum Going {
    On,
    Over,
}

#[derive(Debug)]
struct Server {
    machine: Machine,
    channel: Arc<Channel>,
    buffer: Vec<u8>,
    outer: OwnedFd,
    /// What devices wait for; the outer one has it while the machine is not paused.
    devices: OwnedFd,
    /// Connections that came while the machine was paused.
    waiting: Vec<OwnedFd>,
}

/// How many connections may wait for a paused machine.
const MAX_WAITING: usize = 256;

impl Server {
    fn new(machine: Machine, channel: Arc<Channel>, buffer: Vec<u8>) -> io::Result<Self> {
        let outer = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let devices = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        machine.devices().watch(&devices)?;
        let paused = machine.status() == Status::Paused;
        let add = |fd, token| {
            epoll::add(&outer, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)
        };
        add(channel.as_fd(), CONTROL)?;
        add(of_event(machine.outcome().event()), OUTCOME)?;
        add(machine.flush_timer().as_fd(), FLUSH)?;
        if !paused {
            add(devices.as_fd(), DEVICES)?;
        }
        Ok(Self { machine, channel, buffer, outer, devices, waiting: Vec::new() })
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            for token in wait(&self.outer, None)? {
                let going = match token {
                    CONTROL => self.hear_owner()?,
                    OUTCOME => self.end()?,
                    FLUSH => {
                        self.machine.flush_timer().fired();
                        self.machine.show_console();
                        Going::On
                    }
                    // Devices may have been paused by what came before.
                    _ if self.machine.status() == Status::Paused => Going::On,
                    _ => {
                        self.drive_devices()?;
                        Going::On
                    }
                };
                if going == Going::Over {
                    return Ok(());
                }
            }
        }
    }

    fn drive_devices(&self) -> io::Result<()> {
        for token in wait(&self.devices, Some(()))? {
            self.machine.devices().ready(token);
        }
        Ok(())
    }

    /// Tells how the machine ended.
    fn end(&mut self) -> io::Result<Going> {
        match self.machine.end() {
            None => Ok(Going::On),
            Some(end) => {
                self.channel.send(&FromLauncher::Ended(end))?;
                Ok(Going::Over)
            }
        }
    }

    fn hear_owner(&mut self) -> io::Result<Going> {
        match self.channel.receive(&mut self.buffer)? {
            Received::Nothing => Ok(Going::On),
            Received::HungUp => Ok(Going::Over),
            Received::Message(ToLauncher::SetUp(_) | ToLauncher::Load { .. }, _) => {
                Err(io::Error::other("the machine was described twice"))
            }
            Received::Message(ToLauncher::Request { id, request }, fds) => {
                let (result, beside) = self.answer(request, fds)?;
                let reply = FromLauncher::Reply { id, result };
                self.channel.send_with(&reply, beside.as_ref().map(AsFd::as_fd))?;
                Ok(Going::On)
            }
            Received::Message(ToLauncher::Taken { port, listener, streams }, fds) => {
                if !fds.is_empty() {
                    return Err(io::Error::other("taken streams came with a descriptor"));
                }
                let listener = Listener { port, number: listener };
                self.machine.devices().vsock(|vsock| vsock.taken(listener, streams));
                Ok(Going::On)
            }
        }
    }

    /// Does what is asked; gives the answer, with a descriptor where that says so.
    ///
    /// # Errors
    /// Only where the request makes no sense as a packet, or the host fails.
    fn answer(
        &mut self,
        request: Request,
        fds: Vec<OwnedFd>,
    ) -> io::Result<(Result<Answer, Refusal>, Option<OwnedFd>)> {
        let takes =
            matches!(request, Request::Connect | Request::Capture { .. } | Request::Fork { .. });
        if !takes && !fds.is_empty() {
            return Err(io::Error::other("a request came with a descriptor"));
        }
        let done = match request {
            Request::Status => return Ok((Ok(Answer::Status(self.machine.status())), None)),
            Request::Stats => return Ok((Ok(Answer::Stats(self.machine.stats())), None)),
            Request::Inspect => {
                let seen = self.machine.inspect();
                return Ok((seen.map(|seen| Answer::Inspection(Box::new(seen))), None));
            }
            Request::Fork { name } => {
                return Ok(match copies::fork(&self.machine, name, fds) {
                    Ok((pid, exact)) => (Ok(Answer::Forked { pid }), Some(exact)),
                    Err(refusal) => (Err(refusal), None),
                });
            }
            Request::Capture { since, track } => {
                let begun = saving::capture(&mut self.machine, since, track, fds);
                return Ok((begun.map(|generation| Answer::Captured { generation }), None));
            }
            Request::Boot => self.machine.boot(),
            Request::Pause => self.pause()?,
            Request::Resume => self.resume()?,
            Request::Connect => self.connect(fds)?,
            Request::Listen { port, listener, backlog } => {
                let listener = Listener { port, number: listener };
                self.machine.devices().vsock(|vsock| vsock.listen(listener, backlog));
                Ok(())
            }
            Request::Unlisten { port } => {
                self.machine.devices().vsock(|vsock| vsock.unlisten(port));
                Ok(())
            }
        };
        Ok((done.map(|()| Answer::Done), None))
    }

    fn pause(&mut self) -> io::Result<Result<(), Refusal>> {
        if let Err(refusal) = self.machine.pause() {
            return Ok(Err(refusal));
        }
        epoll::delete(&self.outer, &self.devices)?;
        // What was printed so far is there to be read.
        self.machine.show_console();
        Ok(Ok(()))
    }

    fn resume(&mut self) -> io::Result<Result<(), Refusal>> {
        if let Err(refusal) = self.machine.resume() {
            return Ok(Err(refusal));
        }
        let token = epoll::EventData::new_u64(DEVICES);
        epoll::add(&self.outer, &self.devices, token, epoll::EventFlags::IN)?;
        for stream in self.waiting.drain(..) {
            self.machine.devices().vsock(|vsock| vsock.accept_host(stream));
        }
        Ok(Ok(()))
    }

    /// Takes a connection. That to a paused machine is made when the machine goes on.
    fn connect(&mut self, fds: Vec<OwnedFd>) -> io::Result<Result<(), Refusal>> {
        let Ok([stream]) = <[OwnedFd; 1]>::try_from(fds) else {
            return Err(io::Error::other("a connection came without its descriptor"));
        };
        if self.machine.status() != Status::Paused {
            self.machine.devices().vsock(|vsock| vsock.accept_host(stream));
        } else if self.waiting.len() < MAX_WAITING {
            self.waiting.push(stream);
        } else {
            return Ok(Err(Refusal::Exhausted("connections to a paused machine".to_owned())));
        }
        Ok(Ok(()))
    }
}

/// Waits until something is there, or with `now` only looks; gives the tokens.
fn wait(epoll: &OwnedFd, now: Option<()>) -> io::Result<Vec<u64>> {
    let mut events = Vec::with_capacity(BATCH);
    let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let spare = rustix::buffer::spare_capacity(&mut events);
    match epoll::wait(epoll, spare, now.map(|()| &none)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(events.iter().map(|event: &epoll::Event| event.data.u64()).collect())
}
