//! [`Passt`]: the process that makes connections of the host's out of a guest's packets, and packets out of those.
#![allow(unsafe_code)]

use super::{child, ports::HostPorts};
use command_fds::{CommandFdExt, FdMapping};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    net::{AddressFamily, SocketFlags, SocketType},
    pipe::PipeFlags,
    process::{Gid, Signal, Uid},
};
use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
    time::Duration,
};
use vm_launcher::{
    control::Refusal,
    inside::refuse::failed,
    passt::{GUEST_NETWORK, PASST_MAC},
    program::Process,
};
use vm_trait::PortForward;

/// The descriptor on which passt finds the guest's packets; all others but the standard ones it closes.
const PACKETS_FD: i32 = 3;

/// How long it may take until it is ready.
const PATIENCE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// How long it may take to stand still.
const STOPPED: Duration = Duration::from_secs(5);

/// How much of what it says is told: the beginning, which is followed by a list of options where it was told something that it
/// does not know.
const WORDS: usize = 1 << 10;

/// Whom passt runs as where this process is the superuser; it would become that by itself, and then outlive us.
const NOBODY: u32 = 65_534;

/// The process, which is killed and reaped when this is dropped.
#[derive(Debug)]
pub(super) struct Passt {
    process: Process,
    exact: OwnedFd,
    /// What it says on its standard error. What does not fit into the pipe is lost: passt waits for nobody there.
    said: File,
    /// It becomes readable once passt is ready.
    ready: Option<File>,
    /// The guest's end of the packets, until the machine has it.
    packets: Option<OwnedFd>,
}

impl Passt {
    /// Starts passt, which listens on the host's ports at the loopback address and leads what comes there to the guest's.
    ///
    /// The kernel kills it when the calling thread ends, however that comes about.
    ///
    /// # Errors
    /// [`Refusal::Failed`] or [`Refusal::Exhausted`].
    pub(super) fn start(program: &OsStr, ports: &[PortForward]) -> Result<Self, Refusal> {
        let failed = |error: io::Error| {
            failed(&format!("start of passt ({})", program.to_string_lossy()), error)
        };
        let superuser = rustix::process::geteuid().is_root();
        match Self::spawn(program, ports, superuser) {
            // In a user namespace without anybody else.
            Err(error)
                if superuser
                    && matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) =>
            {
                Self::spawn(program, ports, false).map_err(failed)
            }
            other => other.map_err(failed),
        }
    }

    fn spawn(program: &OsStr, ports: &[PortForward], as_nobody: bool) -> io::Result<Self> {
        let (packets, its_packets) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let (ready, its_ready) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (said, its_said) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        for end in [&said, &its_said] {
            rustix::fs::fcntl_setfl(end, rustix::fs::fcntl_getfl(end)? | OFlags::NONBLOCK)?;
        }
        let mut command = Command::new(program);
        // By its name it knows what it is to do.
        command.arg0("passt").args(arguments(ports)).env_clear().current_dir("/");
        command.stdin(Stdio::null()).stderr(its_said);
        if as_nobody {
            // It opens the pipe by its name.
            let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
            rustix::fs::fchown(&its_ready, Some(user), Some(group))?;
            command.uid(NOBODY).gid(NOBODY);
        }
        command.stdout(its_ready);
        command
            .fd_mappings(vec![FdMapping { parent_fd: its_packets, child_fd: PACKETS_FD }])
            .map_err(io::Error::other)?;
        let launcher = rustix::process::getpid();
        // SAFETY: what runs between fork and exec makes two system calls and allocates nothing.
        unsafe { command.pre_exec(move || child::die_with(launcher)) };
        let process = Process::new(command.spawn()?)?;
        Ok(Self {
            exact: process.exact()?,
            process,
            said: said.into(),
            ready: Some(ready.into()),
            packets: Some(packets),
        })
    }

    /// Waits until it is ready, and so has all its ports.
    ///
    /// # Errors
    /// [`Refusal::PortInUse`] where somebody has one of them; else [`Refusal::Failed`] with what it said.
    pub(super) fn await_ready(&mut self, ports: &[PortForward]) -> Result<(), Refusal> {
        let Some(mut ready) = self.ready.take() else { return Ok(()) };
        let mut fds = [PollFd::new(&ready, PollFlags::IN)];
        let come = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&PATIENCE)));
        // It writes its number there; a pipe that only ends is that of a process that has.
        let mut bytes = [0; 16];
        let is_ready = come.is_ok_and(|come| come > 0) && matches!(ready.read(&mut bytes), Ok(1..));
        if is_ready {
            return Ok(());
        }
        let _ = self.signal(Signal::KILL);
        let how = self.end();
        Err(HostPorts::taken(ports)
            .unwrap_or_else(|| Refusal::Failed(format!("passt was not ready: {how}"))))
    }

    /// Gives the guest's end of the packets.
    pub(super) fn packets(&self) -> Option<BorrowedFd<'_>> {
        self.packets.as_ref().map(AsFd::as_fd)
    }

    /// Closes the guest's end of the packets, which the machine's process has.
    pub(super) fn let_go_of_packets(&mut self) {
        self.packets = None;
    }

    /// Gives a descriptor that becomes readable when it has ended.
    pub(super) fn exact(&self) -> BorrowedFd<'_> {
        self.exact.as_fd()
    }

    /// Has it stand still.
    ///
    /// # Errors
    /// When it does not.
    pub(super) fn pause(&self) -> io::Result<()> {
        match child::stop(self.exact.as_fd(), STOPPED)? {
            true => Ok(()),
            false => Err(io::Error::other("passt does not stop")),
        }
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn resume(&self) -> io::Result<()> {
        self.signal(Signal::CONT)
    }

    /// Says how it ended, which it has or is about to.
    pub(super) fn end(&mut self) -> String {
        let status = self.process.reap().ok().flatten();
        let mut words = Vec::new();
        // It ends where the pipe is empty.
        let _ = self.said.read_to_end(&mut words);
        words.truncate(WORDS);
        let how = status.map_or_else(|| "it is gone".to_owned(), |status| status.to_string());
        match String::from_utf8_lossy(&words).trim() {
            "" => how,
            words => format!("{how}: {words}"),
        }
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(rustix::process::pidfd_send_signal(&self.exact, signal)?)
    }
}

/// Lists what passt is told: the packets come by a descriptor, the guest's addresses are fixed and set by nobody but the
/// guest, and nothing but the mapped ports leads into it, nor anything of it to the host's loopback address.
fn arguments(ports: &[PortForward]) -> Vec<String> {
    let network = &GUEST_NETWORK;
    let mac = PASST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    let options = [
        ("--fd", PACKETS_FD.to_string()),
        ("--pid", "/proc/self/fd/1".to_owned()),
        ("--address", network.address.to_string()),
        ("--netmask", network.prefix.to_string()),
        ("--gateway", network.gateway.to_string()),
        ("--mac-addr", mac),
        ("--dns-forward", network.resolver.to_string()),
        ("--udp-ports", "none".to_owned()),
        // Without this option passt is of before August 2024, and has connections wait in which the guest is to speak first.
        ("--map-host-loopback", "none".to_owned()),
    ];
    let flags = [
        "--foreground",
        "--quiet",
        "--ipv4-only",
        "--no-dhcp",
        "--no-dhcpv6",
        "--no-ndp",
        "--no-ra",
    ];
    let mut all: Vec<String> = flags.into_iter().map(str::to_owned).collect();
    all.extend(options.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
    // It goes on where it has at least one port of an option, so each has one of its own.
    for port in ports {
        all.extend(["--tcp-ports".to_owned(), format!("127.0.0.1/{}:{}", port.host, port.guest)]);
    }
    all
}
