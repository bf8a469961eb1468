//! An owner of launchers that speaks the control protocol and does nothing else: what tests and measurements drive the
//! VMM with.
#![allow(dead_code)]

pub(crate) mod payload;

use command_fds::{CommandFdExt, FdMapping};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
};
use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    ops::{Deref, DerefMut},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};
use vm_backend_kvm::control::{
    Answer, CONTROL_FD, ConsoleDevice, FromLauncher, LIFELINE_FD, MAX_FDS, MAX_PACKET,
    MachineSetUp, Refusal, Request, ToLauncher,
};

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How much of the console is kept.
pub(crate) const RING: u32 = 64 << 10;

/// A launcher that runs, and is this process's child.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) child: Child,
    link: Link,
}

/// The talk with a launcher.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) socket: OwnedFd,
    pub(crate) lifeline: Option<OwnedFd>,
    /// What came while an answer was waited for.
    pub(crate) heard: Vec<FromLauncher>,
    next_id: u64,
}

impl Deref for Owner {
    type Target = Link;

    fn deref(&self) -> &Link {
        &self.link
    }
}

impl DerefMut for Owner {
    fn deref_mut(&mut self) -> &mut Link {
        &mut self.link
    }
}

/// What is handed over beside a set-up.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) set_up: MachineSetUp,
    pub(crate) kernel: File,
    pub(crate) initrd: Vec<File>,
    pub(crate) ring: File,
    pub(crate) disks: Vec<File>,
}

impl Parts {
    /// A small machine with this kernel.
    pub(crate) fn new(kernel: &[u8]) -> Self {
        Self {
            set_up: MachineSetUp {
                name: "test".to_owned(),
                vcpus: 1,
                memory_mib: 64,
                cmdline: String::new(),
                devices_in_cmdline: true,
                console_device: ConsoleDevice::SerialPort,
                initrd_parts: 0,
                console_ring_bytes: RING,
                console_file: false,
                console_file_limit: 0,
                disks: Vec::new(),
                shares: Vec::new(),
                vsock_cid: 3,
                network: vm_trait::NetworkConfig::None,
                passt: None,
            },
            kernel: in_memory(kernel),
            initrd: Vec::new(),
            ring: ring(RING),
            disks: Vec::new(),
        }
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let mut fds = vec![self.kernel.as_fd()];
        fds.extend(self.initrd.iter().map(AsFd::as_fd));
        fds.push(self.ring.as_fd());
        fds.extend(self.disks.iter().map(AsFd::as_fd));
        fds
    }

    /// Reads the ring: how many bytes were ever written, and those that are kept.
    pub(crate) fn console(&self) -> (u64, Vec<u8>) {
        let mut count = [0; 8];
        self.ring.read_exact_at(&mut count, 0).unwrap();
        let count = u64::from_le_bytes(count);
        let len = u64::from(self.set_up.console_ring_bytes);
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.ring.read_exact_at(&mut bytes, 8).unwrap();
        let of = |n: u64| bytes[usize::try_from(n % len).unwrap()];
        (count, (count - count.min(len)..count).map(of).collect())
    }

    pub(crate) fn console_text(&self) -> String {
        String::from_utf8_lossy(&self.console().1).into_owned()
    }
}

/// Makes a file in memory.
pub(crate) fn in_memory(bytes: &[u8]) -> File {
    let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// Makes a ring's file.
pub(crate) fn ring(len: u32) -> File {
    let file = in_memory(&[]);
    file.set_len(8 + u64::from(len)).unwrap();
    file
}

impl Owner {
    /// Starts a launcher and hears its greeting.
    pub(crate) fn start(program: &Path) -> Self {
        let mut owner = Self::spawn(program, None).unwrap();
        match owner.hear().expect("a greeting") {
            (FromLauncher::Hello { version }, _) => {
                assert_eq!(version, vm_backend_kvm::control::CONTROL_VERSION);
            }
            other => panic!("{other:?}"),
        }
        owner
    }

    /// Starts a launcher, with another lifeline than its own if there is one.
    pub(crate) fn spawn(program: &Path, other_lifeline: Option<OwnedFd>) -> io::Result<Self> {
        let (socket, its_socket) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let (its_lifeline, lifeline) = io::pipe()?;
        let its_lifeline = other_lifeline.unwrap_or_else(|| its_lifeline.into());
        let mut command = Command::new(program);
        command
            .env_clear()
            .stdin(Stdio::null())
            .fd_mappings(vec![
                FdMapping { parent_fd: its_socket, child_fd: CONTROL_FD },
                FdMapping { parent_fd: its_lifeline, child_fd: LIFELINE_FD },
            ])
            .map_err(io::Error::other)?;
        let child = command.spawn()?;
        Ok(Self { child, link: Link::new(socket, lifeline.into()) })
    }

    /// Waits until the process has exited.
    pub(crate) fn exited(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the launcher does not exit");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Link {
    pub(crate) fn new(socket: OwnedFd, lifeline: OwnedFd) -> Self {
        Self { socket, lifeline: Some(lifeline), heard: Vec::new(), next_id: 0 }
    }

    pub(crate) fn say(&self, message: &ToLauncher, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.say_bytes(&postcard::to_allocvec(message).unwrap(), fds)
    }

    pub(crate) fn say_bytes(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        sendmsg(&self.socket, &[IoSlice::new(packet)], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Hears the next message; none if the launcher hung up.
    pub(crate) fn hear(&mut self) -> Option<(FromLauncher, Vec<OwnedFd>)> {
        let (message, fds) = self.hear_within(PATIENCE).expect("the launcher says something");
        message.map(|message| (message, fds))
    }

    /// Hears what comes within a time: nothing, or a message, or a hang-up.
    pub(crate) fn hear_within(
        &mut self,
        time: Duration,
    ) -> Option<(Option<FromLauncher>, Vec<OwnedFd>)> {
        let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
        let wait = Timespec::try_from(time).unwrap();
        if poll(&mut ready, Some(&wait)).unwrap() == 0 {
            return None;
        }
        let mut buffer = vec![0; MAX_PACKET];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut buffer)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
        .ok()
        .filter(|received| received.bytes > 0);
        let Some(received) = received else { return Some((None, Vec::new())) };
        let fds = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        });
        let fds = fds.flatten().collect();
        Some((Some(postcard::from_bytes(&buffer[..received.bytes]).unwrap()), fds))
    }

    /// Describes the machine.
    pub(crate) fn set_up(&mut self, parts: &Parts) -> Result<(), Refusal> {
        self.set_up_with(&parts.set_up, &parts.fds())
    }

    pub(crate) fn set_up_with(
        &mut self,
        set_up: &MachineSetUp,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Refusal> {
        self.say(&ToLauncher::SetUp(Box::new(set_up.clone())), fds).unwrap();
        match self.hear() {
            Some((FromLauncher::SetUpDone(result), _)) => result,
            other => panic!("{other:?}"),
        }
    }

    /// Asks, and waits for the answer.
    pub(crate) fn ask(&mut self, request: Request) -> Result<Answer, Refusal> {
        self.ask_with(request, &[])
    }

    pub(crate) fn ask_with(
        &mut self,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, Refusal> {
        self.ask_for(request, fds).0
    }

    /// Asks, and waits for the answer with its descriptors.
    pub(crate) fn ask_for(
        &mut self,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> (Result<Answer, Refusal>, Vec<OwnedFd>) {
        let id = self.next_id;
        self.next_id += 1;
        self.say(&ToLauncher::Request { id, request }, fds).unwrap();
        loop {
            match self.hear().expect("an answer") {
                (FromLauncher::Reply { id: answered, result }, fds) => {
                    assert_eq!(answered, id);
                    return (result, fds);
                }
                (other, _) => self.heard.push(other),
            }
        }
    }

    /// Hears messages up to the end of the machine.
    pub(crate) fn hear_end(&mut self) -> vm_backend_kvm::control::End {
        loop {
            match self.hear().expect("an end").0 {
                FromLauncher::Ended(end) => return end,
                other => self.heard.push(other),
            }
        }
    }
}
