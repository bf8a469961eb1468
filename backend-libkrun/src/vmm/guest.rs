//! [`Guest`]: the child in which libkrun runs the machine, from outside and from inside.

use super::{
    child,
    context::{Context, Refused},
    freeze::{self, Freezer},
    passt::Passt,
    place::path_of,
    plan::Plan,
    sockets,
    until::until,
};
use rustix::{
    fs::OFlags,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
    pipe::PipeFlags,
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus},
    pty::OpenptFlags,
    stdio::dup2_stderr,
};
use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    process,
    time::Duration,
};
use vm_guest_protocol::{AGENT_PORT, boot::BootShare};
use vm_launcher::{
    control::ConsoleDevice,
    inside::{
        process::name_thread,
        split::{Side, keep_only, split},
    },
    passt::GUEST_NETWORK,
};
use vm_trait::NetworkConfig;

/// The name of the agent's socket in the machine's place.
const SOCKET: &str = "agent";

/// How long a machine that was just started may take until it can be paused: libkrun is still making it.
const BEGINNING: Duration = Duration::from_secs(20);

/// How long anything else may take that the child is told.
const PATIENCE: Duration = Duration::from_secs(5);

const LOOK: Duration = Duration::from_millis(1);

/// The child, which is killed and reaped when this is dropped.
#[derive(Debug)]
pub(super) struct Guest {
    pid: Pid,
    exact: OwnedFd,
    freezer: Freezer,
    /// What the guest prints.
    pub(super) console: File,
    /// What libkrun says, and why it could not start.
    pub(super) words: File,
    plan: Plan,
    /// Whether what the machine boots from was given back.
    booted: bool,
    ended: Option<Option<WaitIdStatus>>,
}

impl Guest {
    /// Starts the child. In the child, it never returns.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn start(mut plan: Plan, name: &str) -> io::Result<Self> {
        let (console, its_console) = match plan.console_device {
            ConsoleDevice::SerialPort => pipe()?,
            ConsoleDevice::Virtio => terminal()?,
        };
        let (words, its_words) = pipe()?;
        let (freezer, orders) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let launcher = rustix::process::getpid();
        match split()? {
            Side::Original(pid) => {
                if let Some(passt) = &mut plan.passt {
                    passt.let_go_of_packets();
                }
                let exact = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
                let guest = Self {
                    pid,
                    exact,
                    freezer: Freezer(freezer),
                    console,
                    words,
                    plan,
                    booted: false,
                    ended: None,
                };
                Ok(guest)
            }
            Side::Copy => {
                // What a panic would tell goes to the launcher, which tells the owner.
                let _ = std::panic::take_hook();
                let why =
                    match become_machine(&plan, name, launcher, its_console, &its_words, orders) {
                        Ok(never) => match never {},
                        Err(error) => error,
                    };
                let _ = File::from(its_words).write_all(why.to_string().as_bytes());
                process::exit(1);
            }
        }
    }

    /// Gives a descriptor that becomes readable when it has ended.
    pub(super) fn exact(&self) -> BorrowedFd<'_> {
        self.exact.as_fd()
    }

    /// Gives the passt of its network, where that has one.
    pub(super) fn passt(&self) -> Option<&Passt> {
        self.plan.passt.as_ref()
    }

    /// As [`passt`](Self::passt).
    pub(super) fn passt_mut(&mut self) -> Option<&mut Passt> {
        self.plan.passt.as_mut()
    }

    /// Opens a stream to the agent, which ends at once where it does not listen; nothing where nobody takes streams.
    pub(super) fn connect(&mut self) -> io::Result<Option<OwnedFd>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let address = SocketAddrUnix::new(self.plan.place.path(SOCKET))?;
        use rustix::io::Errno;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {
                self.give_back();
                Ok(Some(socket))
            }
            Err(Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives back the memory of what the machine booted from, once it has: the guest has asked for its devices.
    fn give_back(&mut self) {
        if !self.booted {
            self.booted = true;
            let _ = self.plan.initrd.set_len(0);
        }
    }

    /// Has the guest stand still, with its clock, and then passt.
    ///
    /// # Errors
    /// Why it does not; then it runs.
    pub(super) fn pause(&self) -> io::Result<()> {
        self.pause_guest()?;
        // It would end connections of a guest that answers nothing.
        let paused = self.plan.passt.as_ref().map_or(Ok(()), Passt::pause);
        if paused.is_err() {
            let _ = self.resume();
        }
        paused
    }

    fn pause_guest(&self) -> io::Result<()> {
        let mut last = Ok(());
        until(BEGINNING, LOOK, || {
            last = self.freezer.hold(PATIENCE);
            (last.is_ok() || child::is_over(self.exact.as_fd())).then_some(())
        });
        last?;
        if child::stop(self.exact.as_fd(), PATIENCE)? {
            return Ok(());
        }
        let _ = self.resume_guest();
        Err(io::Error::other("the machine's process does not stop"))
    }

    /// Lets the guest go on.
    ///
    /// # Errors
    /// When the child does not answer.
    pub(super) fn resume(&self) -> io::Result<()> {
        self.plan.passt.as_ref().map_or(Ok(()), Passt::resume)?;
        self.resume_guest()
    }

    fn resume_guest(&self) -> io::Result<()> {
        self.signal(Signal::CONT)?;
        self.freezer.release(PATIENCE)
    }

    /// Says whether the guest stands where it stood when this was last asked, deaf to interrupts: nothing wakes it any more.
    pub(super) fn stands(&self) -> bool {
        self.freezer.stands(PATIENCE).is_ok()
    }

    /// Says what it used: time on processors, and memory that is resident.
    ///
    /// # Errors
    /// When the host does not tell.
    pub(super) fn usage(&self) -> io::Result<(Duration, u64)> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid.as_raw_nonzero()))?;
        usage_in(&stat).ok_or_else(|| io::Error::other("the host's process table is unreadable"))
    }

    /// Waits for its end, and says how it was.
    pub(super) fn reap(&mut self) -> Option<WaitIdStatus> {
        if let Some(ended) = self.ended {
            return ended;
        }
        let waited = rustix::io::retry_on_intr(|| {
            rustix::process::waitid(WaitId::PidFd(self.exact.as_fd()), WaitIdOptions::EXITED)
        });
        let status = waited.ok().flatten();
        self.ended = Some(status);
        status
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(rustix::process::pidfd_send_signal(&self.exact, signal)?)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.signal(Signal::KILL);
            self.reap();
        }
    }
}

/// What never comes.
enum Never {}

fn share_tag() -> CString {
    CString::new(BootShare::TAG).unwrap_or_default()
}

/// Describes the machine to libkrun and enters it, in the child.
fn become_machine(
    plan: &Plan,
    name: &str,
    launcher: Pid,
    console: OwnedFd,
    words: &OwnedFd,
    orders: OwnedFd,
) -> io::Result<Never> {
    // Also a stopped process ends by it, and the launcher's only thread is its parent for as long as it lives.
    child::die_with(launcher)?;
    dup2_stderr(words)?;
    let mut kept = plan.fds();
    kept.extend([console.as_fd(), words.as_fd(), orders.as_fd()]);
    keep_only(&kept)?;
    name_thread(&format!("krun-{name}"));
    freeze::start_keeper(orders, plan.vcpus)?;
    if let NetworkConfig::Tsi(ports) = &plan.network {
        let restricted = sockets::restrict(&ports.0);
        restricted.map_err(|error| io::Error::other(format!("filter of system calls: {error}")))?;
    }
    let context = Context::new().map_err(io::Error::other)?;
    // Libkrun has one of its own, as of everything that it is given by its number.
    let packets = plan.passt.as_ref().and_then(Passt::packets);
    let packets = packets.map(|it| it.try_clone_to_owned()).transpose()?;
    describe(&context, plan, console, packets).map_err(io::Error::other)?;
    Err(io::Error::other(context.enter()))
}

/// Describes the machine to libkrun.
fn describe(
    context: &Context,
    plan: &Plan,
    console: OwnedFd,
    packets: Option<OwnedFd>,
) -> Result<(), Refused> {
    context.set_size(plan.vcpus, plan.memory_mib)?;
    let (kernel, initrd) = (path_of(&plan.kernel), path_of(&plan.initrd));
    context.set_kernel(&kernel, &initrd, &plan.cmdline)?;
    match plan.console_device {
        ConsoleDevice::SerialPort => context.add_serial_port(console.into_raw_fd())?,
        ConsoleDevice::Virtio => context.add_virtio_console(console.into_raw_fd())?,
    }
    for disk in &plan.disks {
        context.add_disk(&disk.serial, &path_of(&disk.file), disk.read_only)?;
    }
    if let Some(tree) = &plan.shares {
        context.add_share(&share_tag(), &tree.path(), tree.is_read_only())?;
    }
    if let Some(packets) = packets {
        context.add_network(packets.into_raw_fd(), &GUEST_NETWORK.mac)?;
    }
    let socket = plan.place.path(SOCKET);
    let socket = CString::new(socket.as_os_str().as_bytes()).unwrap_or_default();
    let tsi = matches!(plan.network, NetworkConfig::Tsi(_));
    context.add_vsock(AGENT_PORT, &socket, tsi)
}

/// Makes a pipe that is read without waiting.
fn pipe() -> io::Result<(File, OwnedFd)> {
    let (ours, its) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let flags = rustix::fs::fcntl_getfl(&ours)?;
    rustix::fs::fcntl_setfl(&ours, flags | OFlags::NONBLOCK)?;
    Ok((File::from(ours), its))
}

/// Makes a terminal, of which ours is read without waiting: libkrun tells the guest of a console only where there is one.
fn terminal() -> io::Result<(File, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&ours)?;
    let its = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
    let mut mode = rustix::termios::tcgetattr(&its)?;
    mode.make_raw();
    rustix::termios::tcsetattr(&its, rustix::termios::OptionalActions::Now, &mode)?;
    rustix::fs::fcntl_setfl(&ours, rustix::fs::fcntl_getfl(&ours)? | OFlags::NONBLOCK)?;
    Ok((File::from(ours), its))
}

/// Finds time on processors and resident memory in what proc(5) says of a process.
fn usage_in(stat: &str) -> Option<(Duration, u64)> {
    // The name may hold anything; the fields after it are counted from the third.
    let fields: Vec<_> = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let second = rustix::param::clock_ticks_per_second().max(1);
    let ticks = field(14)?.saturating_add(field(15)?);
    let time = Duration::from_nanos(ticks.saturating_mul(1_000_000_000 / second));
    let page = u64::try_from(rustix::param::page_size()).ok()?;
    Some((time, field(24)?.saturating_mul(page)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_found_whatever_the_name() {
        let mut fields: Vec<String> = (3..=52).map(|number| number.to_string()).collect();
        fields[11] = "100".to_owned();
        fields[12] = "50".to_owned();
        fields[21] = "7".to_owned();
        let stat = format!("12 (a) b (c)) {}\n", fields.join(" "));
        let (time, memory) = usage_in(&stat).unwrap();
        let second = rustix::param::clock_ticks_per_second();
        assert_eq!(time, Duration::from_nanos(150 * (1_000_000_000 / second)));
        assert_eq!(memory, 7 * rustix::param::page_size() as u64);
        assert_eq!(usage_in("12 (a) 3 4"), None);
        assert_eq!(usage_in(""), None);
    }
}
