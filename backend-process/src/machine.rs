//! [`ProcessMachine`]: the seam's view of a life.

use crate::{
    hypervisor::{Lives, lock},
    life::{Life, Phase},
};
use async_trait::async_trait;
use bytes::Bytes;
use rustix::event::{PollFd, PollFlags};
use std::{io, os::fd::AsFd, sync::Arc, thread};
use tokio::{net::UnixStream, task::spawn_blocking};
use vm_core::machine::{
    Acceptor, CaptureOrder, Captured, Link, Machine, MachineError, MachineExit, MachineSpec,
    MachineStats, MachineStatus, Sections,
};
use vm_guest_protocol::AGENT_PORT;
use vm_trait::VmId;

/// One life of a process VM.
#[derive(Debug)]
pub(crate) struct ProcessMachine {
    vm: VmId,
    life: Arc<Life>,
    lives: Lives,
}

impl ProcessMachine {
    pub(crate) fn new(vm: VmId, life: Arc<Life>, lives: Lives) -> Self {
        Self { vm, life, lives }
    }
}

#[async_trait]
impl Machine for ProcessMachine {
    async fn boot(&self) -> Result<(), MachineError> {
        let exit = self.life.boot()?;
        let (vm, life, lives) = (self.vm, Arc::clone(&self.life), Arc::clone(&self.lives));
        // A thread and no task, so that it outlives the runtime.
        let watch = move || {
            let mut exit = [PollFd::from_borrowed_fd(exit.as_fd(), PollFlags::IN)];
            let _ = rustix::io::retry_on_intr(|| rustix::event::poll(&mut exit, None));
            let _ = end(vm, &life, &lives);
        };
        if let Err(error) = thread::Builder::new().name("vm-process".to_owned()).spawn(watch) {
            // Nobody would see the agent's end.
            self.kill().await?;
            return Err(MachineError::Exhausted(format!("threads ({error})")));
        }
        Ok(())
    }

    async fn pause(&self) -> Result<(), MachineError> {
        unsupported("pause")
    }

    async fn resume(&self) -> Result<(), MachineError> {
        unsupported("resume")
    }

    async fn kill(&self) -> Result<(), MachineError> {
        self.life.note_kill();
        let (vm, life, lives) = (self.vm, Arc::clone(&self.life), Arc::clone(&self.lives));
        // It goes on when this future is dropped.
        spawn_blocking(move || end(vm, &life, &lives)).await.map_err(failed)?
    }

    async fn wait(&self) -> MachineExit {
        self.life.ended().await
    }

    async fn status(&self) -> Result<MachineStatus, MachineError> {
        Ok(match self.life.phase() {
            Phase::Fresh => MachineStatus::Fresh,
            Phase::Running => MachineStatus::Running,
            Phase::Ended(_) => MachineStatus::Ended,
        })
    }

    async fn listen(&self, _port: u32) -> Result<Box<dyn Acceptor>, MachineError> {
        unsupported("vsock")
    }

    async fn connect(&self, port: u32) -> Result<Box<dyn Link>, MachineError> {
        if port != AGENT_PORT {
            return unsupported("vsock");
        }
        match self.life.phase() {
            Phase::Fresh => return Err(MachineError::NotListening),
            Phase::Running => {}
            Phase::Ended(_) => return Err(MachineError::Ended),
        }
        match UnixStream::connect(self.life.socket()).await {
            Ok(stream) => Ok(Box::new(stream)),
            // Not there yet, there and not listening yet, or too many before us.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::ConnectionRefused
                        | io::ErrorKind::WouldBlock
                ) =>
            {
                Err(MachineError::NotListening)
            }
            Err(error) => Err(failed(error)),
        }
    }

    async fn capture(&self, _: CaptureOrder) -> Result<Box<dyn Captured>, MachineError> {
        unsupported("snapshot")
    }

    async fn load(&self, _sections: &Sections, _track: bool) -> Result<(), MachineError> {
        unsupported("restore")
    }

    async fn fork(&self, specs: &[MachineSpec]) -> Vec<Result<Arc<dyn Machine>, MachineError>> {
        specs.iter().map(|_| unsupported("fork")).collect()
    }

    async fn stats(&self) -> Result<MachineStats, MachineError> {
        match self.life.phase() {
            Phase::Running => Ok(self.life.stats()),
            Phase::Fresh => Ok(MachineStats::default()),
            Phase::Ended(_) => Err(MachineError::Ended),
        }
    }

    fn console(&self) -> Bytes {
        self.life.console()
    }
}

impl Drop for ProcessMachine {
    fn drop(&mut self) {
        if matches!(self.life.phase(), Phase::Ended(_)) {
            return;
        }
        self.life.note_kill();
        // Should this process end first: its end of the lifeline closes with it, and the agent does the rest.
        let (vm, life, lives) = (self.vm, Arc::clone(&self.life), Arc::clone(&self.lives));
        if life.phase() == Phase::Fresh {
            let _ = end(vm, &life, &lives);
            return;
        }
        let started = thread::Builder::new().name("vm-process-end".to_owned()).spawn(move || {
            let _ = end(vm, &life, &lives);
        });
        if started.is_err() {
            let _ = end(self.vm, &self.life, &self.lives);
        }
    }
}

/// Ends a life, from any number of places at once, and forgets it.
fn end(vm: VmId, life: &Arc<Life>, lives: &Lives) -> Result<(), MachineError> {
    let ended = life.end();
    if ended.is_ok() {
        let mut lives = lock(lives);
        // By now it may be the VM's next life that stands there.
        if lives.get(&vm).is_some_and(|known| Arc::ptr_eq(known, life)) {
            lives.remove(&vm);
        }
    }
    ended
}

fn unsupported<T>(what: &str) -> Result<T, MachineError> {
    Err(MachineError::Unsupported(what.to_owned()))
}

fn failed(error: impl std::fmt::Display) -> MachineError {
    MachineError::Failed(error.to_string())
}
