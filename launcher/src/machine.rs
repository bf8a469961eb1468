//! [`LauncherMachine`]: the seam's view of a life.

use crate::{
    control::{Answer, Refusal, Request, Status},
    life::{Life, Listening, Lives, host},
};
use async_trait::async_trait;
use bytes::Bytes;
use std::{
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    sync::Arc,
    time::Duration,
};
use tokio::net::UnixStream;
use vm_core::machine::{
    Acceptor, CaptureOrder, Captured, Link, Machine, MachineError, MachineExit, MachineSpec,
    MachineStats, MachineStatus, Sections,
};

/// The longest line with which a connection is accepted: `OK`, a port and a newline.
const LONGEST_ACCEPTANCE: usize = 32;

/// One life of a machine in a launcher, which cannot be saved or copied. Dropping it kills the launcher.
#[derive(Debug)]
pub struct LauncherMachine {
    life: Arc<Life>,
}

impl LauncherMachine {
    /// Makes the machine of a VM's present life, which is kept among all `lives`.
    #[must_use]
    pub fn new(spec: &MachineSpec, life: Arc<Life>, lives: &Lives) -> Self {
        lives.keep(spec.vm, &life);
        Self { life }
    }

    /// Gives its life.
    #[must_use]
    pub fn life(&self) -> &Arc<Life> {
        &self.life
    }

    async fn order(&self, request: Request) -> Result<(), MachineError> {
        match self.life.request(request, &[]).await? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

#[async_trait]
impl Machine for LauncherMachine {
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
        let (answer, beside) = self.life.ask_for(Request::Connect, &[its.as_fd()]).await?;
        match (answer, beside.into_iter().next()) {
            (Ok(Answer::Done), _) => {}
            (Ok(Answer::Connected), Some(stream)) if is_stream(&stream) => {
                let stream = stream_of(stream).map_err(|error| host(&error))?;
                return Ok(Box::new(stream));
            }
            (Ok(other), _) => return Err(unexpected(&other)),
            (Err(Refusal::State(Status::Fresh)), _) => return Err(MachineError::NotListening),
            (Err(refusal), _) => return Err(refusal.into()),
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
        Ok(Box::new(LauncherAcceptor(self.life.listen(port).await?)))
    }

    async fn capture(&self, _: CaptureOrder) -> Result<Box<dyn Captured>, MachineError> {
        unsupported("snapshot")
    }

    async fn load(&self, _: &Sections, _: bool) -> Result<(), MachineError> {
        unsupported("restore")
    }

    async fn fork(&self, specs: &[MachineSpec]) -> Vec<Result<Arc<dyn Machine>, MachineError>> {
        specs.iter().map(|_| unsupported("fork")).collect()
    }

    async fn stats(&self) -> Result<MachineStats, MachineError> {
        match self.life.request(Request::Stats, &[]).await? {
            Answer::Stats(stats) => Ok(MachineStats {
                cpu_time: Some(Duration::from_nanos(stats.vcpu_time_ns)),
                memory_used_bytes: Some(stats.guest_resident_bytes),
                vm_exits: stats.vm_exits,
            }),
            other => Err(unexpected(&other)),
        }
    }

    fn console(&self) -> Bytes {
        self.life.console()
    }
}

impl Drop for LauncherMachine {
    fn drop(&mut self) {
        if !self.life.is_over() {
            self.life.kill();
        }
    }
}

/// Gives the name of a machine's process.
#[must_use]
pub fn name_of(spec: &MachineSpec) -> String {
    spec.config.name.clone().unwrap_or_else(|| spec.vm.to_string())
}

/// Says that a launcher broke its protocol.
#[must_use]
pub fn unexpected(answer: &Answer) -> MachineError {
    MachineError::Failed(format!("the launcher answered something else: {answer:?}"))
}

#[derive(Debug)]
struct LauncherAcceptor(Listening);

#[async_trait]
impl Acceptor for LauncherAcceptor {
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

fn unsupported<T>(what: &str) -> Result<T, MachineError> {
    Err(MachineError::Unsupported(what.to_owned()))
}
