//! [`KvmMachine`]: the seam's view of a life.

use crate::{
    control::{Answer, Refusal, Request, Status},
    files,
    hypervisor::LoadParcel,
    launcher::{Ours, Process, Started},
    life::{Life, Listening, Lives, host},
    snapshot::{capture::Capture, load::Saved},
    vmm::memory_end,
};
use async_trait::async_trait;
use bytes::Bytes;
use rustix::pipe::PipeFlags;
use std::{
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    net::{UnixStream, unix::pipe},
    task::spawn_blocking,
};
use vm_core::machine::{
    Acceptor, CaptureOrder, Captured, Generation, Link, Machine, MachineError, MachineExit,
    MachineSpec, MachineStats, MachineStatus, Sections,
};
use vm_trait::{Inspection, VmConfig};

/// How much of a state may wait in the pipe for its reader.
const PIPE_BYTES: usize = 1 << 20;

/// The longest line with which a connection is accepted: `OK`, a port and a newline.
const LONGEST_ACCEPTANCE: usize = 32;

/// One life of a KVM machine.
#[derive(Debug)]
pub(crate) struct KvmMachine {
    life: Arc<Life>,
    lives: Arc<Lives>,
    config: Arc<VmConfig>,
    /// The name of its process.
    name: String,
}

impl KvmMachine {
    /// Makes the machine of a VM's present life, which is kept among all `lives`.
    pub(crate) fn new(spec: &MachineSpec, life: Arc<Life>, lives: &Arc<Lives>) -> Self {
        lives.keep(spec.vm, &life);
        Self { life, lives: lives.clone(), config: spec.config.clone(), name: name_of(spec) }
    }

    /// Makes one copy. When the future is dropped, nothing is left of it.
    async fn copy(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, MachineError> {
        let began = Instant::now();
        let of_host = |error: io::Error| host(&error);
        let (ours, control, lifeline) = Ours::new().map_err(of_host)?;
        let ring = self.life.copy_console().map_err(of_host)?;
        let console_file = spec.config.console_file.as_deref().map(files::open_console_file);
        let console_file = console_file.transpose()?;
        let disks = own_disks(&spec.config)?;
        let mut fds = vec![control.as_fd(), lifeline.as_fd(), ours.messages.as_fd(), ring.file()];
        fds.extend(console_file.as_ref().map(AsFd::as_fd));
        fds.extend(disks.iter().map(AsFd::as_fd));
        let name = name_of(spec);
        let (answer, beside) = self.life.ask_for(Request::Fork { name }, &fds).await?;
        let process = match (answer?, beside.into_iter().next()) {
            (Answer::Forked { pid }, Some(exact)) => Process::of_launcher(pid, exact),
            (other, _) => return Err(unexpected(&other)),
        };
        drop((control, lifeline, console_file, disks));
        let Ours { control, lifeline, messages } = ours;
        let spawn_time = began.elapsed();
        let started = Started { control, process, lifeline, messages, spawn_time };
        let life = Life::of_copy(started, ring).await?;
        Ok(Arc::new(Self::new(spec, life, &self.lives)))
    }

    async fn order(&self, request: Request) -> Result<(), MachineError> {
        match self.life.request(request, &[]).await? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

#[async_trait]
impl Machine for KvmMachine {
    async fn boot(&self) -> Result<(), MachineError> {
        self.order(Request::Boot).await
    }

    async fn pause(&self) -> Result<(), MachineError> {
        self.order(Request::Pause).await
    }

    async fn resume(&self) -> Result<(), MachineError> {
        self.order(Request::Resume).await
    }

    async fn kill(&self) -> Result<(), MachineError> {
        self.life.kill();
        self.life.ended().await;
        Ok(())
    }

    async fn wait(&self) -> MachineExit {
        self.life.ended().await
    }

    async fn status(&self) -> Result<MachineStatus, MachineError> {
        match self.life.request(Request::Status, &[]).await {
            Ok(Answer::Status(status)) => Ok(match status {
                Status::Fresh => MachineStatus::Fresh,
                Status::Running => MachineStatus::Running,
                Status::Paused => MachineStatus::Paused,
            }),
            Ok(other) => Err(unexpected(&other)),
            Err(MachineError::Ended) => Ok(MachineStatus::Ended),
            Err(error) => Err(error),
        }
    }

    async fn connect(&self, port: u32) -> Result<Box<dyn Link>, MachineError> {
        let (ours, its) = StdStream::pair().map_err(|error| host(&error))?;
        // Such a short line always finds room in a new socket.
        (&ours).write_all(format!("CONNECT {port}\n").as_bytes()).map_err(|error| host(&error))?;
        match self.life.ask(Request::Connect, &[its.as_fd()]).await? {
            Ok(Answer::Done) => {}
            Ok(other) => return Err(unexpected(&other)),
            Err(Refusal::State(Status::Fresh)) => return Err(MachineError::NotListening),
            Err(refusal) => return Err(refusal.into()),
        }
        drop(its);
        let stream = stream_of(ours.into()).map_err(|error| host(&error))?;
        if accepted(&stream).await {
            return Ok(Box::new(stream));
        }
        if self.life.is_over() {
            return Err(MachineError::Ended);
        }
        Err(MachineError::NotListening)
    }

    async fn listen(&self, port: u32) -> Result<Box<dyn Acceptor>, MachineError> {
        Ok(Box::new(KvmAcceptor(self.life.listen(port).await?)))
    }

    async fn capture(&self, order: CaptureOrder) -> Result<Box<dyn Captured>, MachineError> {
        let of_host = |error: io::Error| host(&error);
        let (its, ours) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map(|(ours, its)| (its, ours))
            .map_err(|error| host(&error.into()))?;
        // A longer pipe is quicker; a host may not allow it.
        let _ = rustix::pipe::fcntl_setpipe_size(&its, PIPE_BYTES);
        let ours = pipe::Receiver::from_owned_fd(ours).map_err(of_host)?;
        let disks = own_disks(&self.config)?;
        let mut fds = vec![its.as_fd()];
        fds.extend(disks.iter().map(AsFd::as_fd));
        let since = order.since.map(|generation| generation.0);
        let request = Request::Capture { since, track: order.track };
        let generation = match self.life.request(request, &fds).await? {
            Answer::Captured { generation } => generation.map(Generation),
            other => return Err(unexpected(&other)),
        };
        let lengths = disks.iter().map(|disk| disk.metadata().map(|about| about.len()));
        let lengths = lengths.collect::<io::Result<_>>().map_err(of_host)?;
        Ok(Box::new(Capture::new(ours, memory_end(self.config.memory.0), lengths, generation)))
    }

    async fn load(&self, sections: &Sections, track: bool) -> Result<(), MachineError> {
        let writable = self.config.disks.iter().filter(|disk| !disk.read_only).count();
        let saved = Saved::new(sections, writable).await?;
        let (config, name) = (self.config.clone(), self.name.clone());
        let ring = self.life.ring().try_clone_to_owned().map_err(|error| host(&error))?;
        let parcel = spawn_blocking(move || LoadParcel::new(saved, &config, name, track));
        let parcel = parcel.await.map_err(|error| MachineError::Failed(error.to_string()))??;
        let (message, fds) = parcel.packet(ring.as_fd());
        self.life.set_up(&message, &fds).await
    }

    async fn fork(&self, specs: &[MachineSpec]) -> Vec<Result<Arc<dyn Machine>, MachineError>> {
        let mut copies = Vec::with_capacity(specs.len());
        for spec in specs {
            copies.push(self.copy(spec).await);
        }
        copies
    }

    async fn inspect(&self) -> Result<Inspection, MachineError> {
        match self.life.request(Request::Inspect, &[]).await? {
            Answer::Inspection(seen) => Ok(*seen),
            other => Err(unexpected(&other)),
        }
    }

    async fn stats(&self) -> Result<MachineStats, MachineError> {
        match self.life.request(Request::Stats, &[]).await? {
            Answer::Stats(stats) => Ok(MachineStats {
                cpu_time: Some(Duration::from_nanos(stats.vcpu_time_ns)),
                memory_used_bytes: Some(stats.guest_resident_bytes),
                vm_exits: Some(stats.vm_exits),
            }),
            other => Err(unexpected(&other)),
        }
    }

    fn console(&self) -> Bytes {
        self.life.console()
    }
}

impl Drop for KvmMachine {
    fn drop(&mut self) {
        if !self.life.is_over() {
            self.life.kill();
        }
    }
}

#[derive(Debug)]
struct KvmAcceptor(Listening);

#[async_trait]
impl Acceptor for KvmAcceptor {
    async fn accept(&mut self) -> Result<Box<dyn Link>, MachineError> {
        loop {
            let stream = self.0.next().await.ok_or(MachineError::Ended)?;
            // Whatever else a launcher may send is of no use to anybody.
            if is_stream(&stream)
                && let Ok(stream) = stream_of(stream)
            {
                return Ok(Box::new(stream));
            }
        }
    }
}

fn is_stream(fd: &OwnedFd) -> bool {
    use rustix::net::{AddressFamily, SocketType, sockopt};
    sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(fd) == Ok(SocketType::STREAM)
}

fn stream_of(fd: OwnedFd) -> io::Result<UnixStream> {
    let stream = StdStream::from(fd);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Reads the line with which a connection is accepted, and no byte more.
async fn accepted(stream: &UnixStream) -> bool {
    let mut line = Vec::with_capacity(LONGEST_ACCEPTANCE);
    while line.len() < LONGEST_ACCEPTANCE {
        let mut byte = [0];
        if stream.readable().await.is_err() {
            return false;
        }
        match stream.try_read(&mut byte) {
            Ok(0) => return false,
            Ok(_) if byte == *b"\n" => return line.starts_with(b"OK "),
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
    }
    false
}

/// Gives the name of a machine's process.
pub(crate) fn name_of(spec: &MachineSpec) -> String {
    spec.config.name.clone().unwrap_or_else(|| spec.vm.to_string())
}

/// Makes an empty file for each writable disk, for a copy of it.
fn own_disks(config: &VmConfig) -> Result<Vec<File>, MachineError> {
    config.disks.iter().filter(|disk| !disk.read_only).map(|_| files::nameless()).collect()
}

fn unexpected(answer: &Answer) -> MachineError {
    MachineError::Failed(format!("the launcher answered something else: {answer:?}"))
}
