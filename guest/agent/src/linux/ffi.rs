//! System calls that have no safe form elsewhere, each behind a safe function.
//!
//! All unsafe code of the crate is here and in [`spawn`](super::spawn).
#![allow(unsafe_code)]

use crate::os::{Errno, SysResult};
use rustix::{
    io::retry_on_intr,
    process::{Pid, WaitOptions, waitpid},
};
use std::{
    ffi::CString,
    io,
    mem::MaybeUninit,
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
    sync::atomic::{AtomicI32, Ordering},
};

/// The highest signal number of Linux.
const MAX_SIGNAL: i32 = 64;

/// Every signal of Linux.
pub(super) fn all_signals() -> Vec<i32> {
    (1..=MAX_SIGNAL).collect()
}

/// How long the kernel's sets of signals are.
const SET_SIZE: usize = 8;

/// How much stack there is between vfork and exec.
const STACK: usize = 32 << 10;

/// Sends a signal to a process, or with a negative `pid` to a group, or with -1 to all.
pub(super) fn kill(pid: i32, signal: u8) -> SysResult<()> {
    // SAFETY: kill(2) takes two numbers and touches no memory of ours.
    check(unsafe { libc::kill(pid, i32::from(signal)) })
}

/// Sends a signal to the process that a pidfd names.
pub(super) fn signal_exactly(process: BorrowedFd<'_>, signal: u8) -> SysResult<()> {
    let none = ptr::null::<libc::siginfo_t>();
    let (fd, signal, flags) = (process.as_raw_fd(), libc::c_int::from(signal), 0 as libc::c_uint);
    // SAFETY: pidfd_send_signal(2) takes numbers and a siginfo that may be null.
    let answer = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, flags) };
    check(if answer == 0 { 0 } else { -1 })
}

/// Gives the pid of a child that has ended and was not reaped, leaving it so.
pub(super) fn peek_ended() -> Option<i32> {
    // SAFETY: siginfo_t is plain data, for which all zeroes is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` is a valid siginfo_t that outlives the call.
    let answer = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, options) };
    if answer != 0 {
        return None;
    }
    // SAFETY: waitid has filled the fields of a SIGCHLD, or left the zeroes.
    let pid = unsafe { info.si_pid() };
    (pid > 0).then_some(pid)
}

/// Blocks `signals` on this thread and makes them readable from a descriptor.
pub(super) fn signals_as_descriptor(signals: &[i32]) -> io::Result<OwnedFd> {
    let mut set = empty_signal_set();
    for signal in signals {
        // SAFETY: `set` is an initialised set; a bad number is refused with an error.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    // SAFETY: `set` is an initialised set, and the old mask is not asked for.
    let answer = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    if answer != 0 {
        return Err(io::Error::from_raw_os_error(answer));
    }
    // SAFETY: `set` is an initialised set; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes the next signal's number from such a descriptor.
pub(super) fn next_signal(fd: BorrowedFd<'_>) -> Option<i32> {
    let mut record = [0_u8; size_of::<libc::signalfd_siginfo>()];
    match rustix::io::read(fd, &mut record) {
        // The number is the record's first field.
        Ok(read) if read == record.len() => {
            Some(i32::from_ne_bytes([record[0], record[1], record[2], record[3]]))
        }
        _ => None,
    }
}

/// Lists the signals that this process ignores or handles.
pub(super) fn changed_signals() -> Vec<i32> {
    let none = ptr::null::<libc::c_void>();
    let changed = |signal: &i32| {
        // The kernel's `sigaction`, whose first word is the handler; 0 is SIG_DFL.
        let mut action = [0_u64; 4];
        let place = action.as_mut_ptr();
        // SAFETY: `action` is at least as long as the structure that is written; nothing is changed.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, *signal, none, place, SET_SIZE) };
        action[0] != 0
    };
    (1..=MAX_SIGNAL).filter(changed).collect()
}

/// Gives signals their default meaning and unblocks all. Safe between vfork and exec.
pub(super) fn reset_signals(signals: &[i32]) {
    // The kernel's `sigaction`, not the C library's, which keeps some signals for itself: all zeroes is SIG_DFL.
    let default = [0_u64; 4];
    let none = ptr::null_mut::<libc::c_void>();
    for signal in signals {
        // SAFETY: `default` is at least as long as the structure that is read; KILL and STOP are refused.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, *signal, default.as_ptr(), none, SET_SIZE) };
    }
    swap_signal_mask(0);
}

/// Blocks the signals of a set on this thread, and no others; gives those that were blocked before.
fn swap_signal_mask(set: u64) -> u64 {
    let mut before = 0_u64;
    let how = libc::SIG_SETMASK;
    // SAFETY: both sets are as long as the kernel's, and local. The C library's form would leave its own signals out.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, how, &raw const set, &raw mut before, SET_SIZE)
    };
    before
}

/// Runs `steps` in a new process until that becomes a program, and gives its pid; where `steps` returns, what it returns
/// is the errno, and no process is left.
///
/// The new process shares this one's memory, so that nothing of it is copied; this thread stands still meanwhile, with
/// all signals blocked.
///
/// # Safety
/// `steps` runs beside this process's other threads while this one stands still, with signals blocked until it unblocks
/// them: it must make system calls only, on this process's memory as it is, take no lock and not allocate, and it must
/// reset every signal that has a handler before it unblocks any.
pub(super) unsafe fn vfork(steps: &dyn Fn() -> i32) -> SysResult<Pid> {
    struct Call<'a> {
        steps: &'a dyn Fn() -> i32,
        failure: AtomicI32,
    }
    extern "C" fn run(call: *mut libc::c_void) -> libc::c_int {
        // SAFETY: vfork passes a Call that lives until this process is a program or has ended.
        let call = unsafe { &*call.cast::<Call<'_>>() };
        call.failure.store((call.steps)(), Ordering::Relaxed);
        1
    }
    let call = Call { steps, failure: AtomicI32::new(0) };
    // In words of the alignment that stacks have.
    let mut stack = [MaybeUninit::<u128>::uninit(); STACK / size_of::<u128>()];
    let top = stack.as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let mask = swap_signal_mask(u64::MAX);
    let argument = (&raw const call).cast_mut().cast();
    // SAFETY: the new process runs on a stack of its own, and this one goes on only when that is not used any more.
    let pid = unsafe { libc::clone(run, top.cast(), flags, argument) };
    let cloned = check(pid);
    swap_signal_mask(mask);
    cloned?;
    let pid = Pid::from_raw(pid).ok_or(Errno::SRCH)?;
    match call.failure.load(Ordering::Relaxed) {
        0 => Ok(pid),
        failure => {
            let _ = retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()));
            Err(Errno(failure))
        }
    }
}

/// Marks every descriptor above the standard three to be closed by exec. Safe between vfork and exec.
pub(super) fn close_others_on_exec() {
    const CLOSE_ON_EXEC: libc::c_uint = 4;
    let (first, last): (libc::c_uint, libc::c_uint) = (3, libc::c_uint::MAX);
    // SAFETY: with this flag close_range(2) closes nothing now; it only sets a flag on descriptors.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, CLOSE_ON_EXEC) };
}

/// A program with arguments and environment in the form that execve(2) takes.
pub(super) struct ExecImage {
    path: CString,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    // What the pointers above point into; the heap blocks stay where they are when this moves.
    _strings: Vec<CString>,
}

// SAFETY: the pointers point into strings that the image owns and that nothing changes.
unsafe impl Send for ExecImage {}
// SAFETY: as for Send; all access is reading.
unsafe impl Sync for ExecImage {}

impl ExecImage {
    /// Lays out the image; a NUL byte anywhere is `INVAL`.
    pub(super) fn new(path: &str, argv: &[String], env: &[(String, String)]) -> SysResult<Self> {
        let text = |it: &str| CString::new(it).map_err(|_| Errno::INVAL);
        let mut strings = Vec::with_capacity(argv.len() + env.len());
        for argument in argv {
            strings.push(text(argument)?);
        }
        for (name, value) in env {
            strings.push(text(&format!("{name}={value}"))?);
        }
        let list = |strings: &[CString]| -> Vec<*const libc::c_char> {
            strings.iter().map(|it| it.as_ptr()).chain([ptr::null()]).collect()
        };
        let (argv, envp) = strings.split_at(argv.len());
        Ok(Self { path: text(path)?, argv: list(argv), envp: list(envp), _strings: strings })
    }

    /// Becomes the program; returns only the errno. Safe between vfork and exec.
    pub(super) fn execute(&self) -> i32 {
        // SAFETY: path, argv and envp are NUL-terminated strings and NULL-terminated lists that `self` keeps alive.
        unsafe {
            libc::execve(self.path.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr());
        }
        io::Error::last_os_error().raw_os_error().unwrap_or(Errno::IO.0)
    }
}

/// Adds 256 bits to the kernel's random pool, counts them, and makes the generator draw on the pool at once.
pub(super) fn add_entropy(random: BorrowedFd<'_>, entropy: &[u8; 32]) -> SysResult<()> {
    #[repr(C)]
    struct PoolInfo {
        bits: libc::c_int,
        bytes: libc::c_int,
        pool: [u8; 32],
    }
    // From <linux/random.h>: _IOW('R', 3, int[2]) and _IO('R', 7).
    const ADD: libc::c_ulong = 0x4008_5203;
    const RESEED: libc::c_ulong = 0x5207;
    let info = PoolInfo { bits: 256, bytes: 32, pool: *entropy };
    let fd = random.as_fd().as_raw_fd();
    // SAFETY: the request reads a `rand_pool_info` with `bytes` bytes behind it, which `info` is.
    check(unsafe { libc::ioctl(fd, ADD as _, &raw const info) })?;
    // SAFETY: the request takes no argument.
    check(unsafe { libc::ioctl(fd, RESEED as _) })
}

// Numbers of the C library in the types that its structures have them in.
#[allow(clippy::cast_possible_truncation)]
const VSOCK_FAMILY: libc::sa_family_t = libc::AF_VSOCK as libc::sa_family_t;
#[allow(clippy::cast_possible_truncation)]
const VSOCK_ADDRESS_SIZE: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
#[allow(clippy::cast_possible_truncation)]
const INTERNET_FAMILY: libc::sa_family_t = libc::AF_INET as libc::sa_family_t;
#[allow(clippy::cast_possible_truncation)]
const INTERFACE_UP: libc::c_short = libc::IFF_UP as libc::c_short;

/// Binds a vsock socket to a port on every address of this machine.
pub(super) fn vsock_bind(socket: BorrowedFd<'_>, port: u32) -> io::Result<()> {
    let (address, length) = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: `address` is a sockaddr_vm of that length and outlives the call.
    let answer = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    checked(answer)
}

/// Connects a vsock socket to a port of the machine that `cid` names.
pub(super) fn vsock_connect(socket: BorrowedFd<'_>, cid: u32, port: u32) -> io::Result<()> {
    let (address, length) = vsock_address(cid, port);
    // SAFETY: `address` is a sockaddr_vm of that length and outlives the call.
    let answer = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) };
    checked(answer)
}

fn vsock_address(cid: u32, port: u32) -> (libc::sockaddr_vm, libc::socklen_t) {
    // SAFETY: sockaddr_vm is plain data, for which all zeroes is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = VSOCK_FAMILY;
    address.svm_cid = cid;
    address.svm_port = port;
    (address, VSOCK_ADDRESS_SIZE)
}

/// Turns a network interface on.
pub(super) fn set_interface_up(name: &str) -> io::Result<()> {
    let socket = datagram_socket()?;
    let mut request = interface_request(name)?;
    let fd = socket.as_raw_fd();
    // SAFETY: the request reads the name in `request` and writes the flags into it.
    checked(unsafe { libc::ioctl(fd, libc::SIOCGIFFLAGS, &raw mut request) })?;
    // SAFETY: the kernel has filled the flags, which are a plain number.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | INTERFACE_UP;
    // SAFETY: the request reads name and flags in `request`.
    checked(unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request) })
}

/// Gives a network interface an address in a network.
pub(super) fn set_interface_address(
    name: &str,
    address: Ipv4Addr,
    netmask: Ipv4Addr,
) -> io::Result<()> {
    let socket = datagram_socket()?;
    let mut request = interface_request(name)?;
    for (call, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, netmask)] {
        request.ifr_ifru.ifru_addr = ipv4_address(value);
        // SAFETY: the request reads name and address in `request`.
        checked(unsafe { libc::ioctl(socket.as_raw_fd(), call as _, &raw const request) })?;
    }
    Ok(())
}

/// Sends what is for no network of this machine's own to a gateway.
pub(super) fn add_default_route(gateway: Ipv4Addr) -> io::Result<()> {
    let socket = datagram_socket()?;
    // SAFETY: rtentry is plain data and a pointer that may be null, for which all zeroes is a value.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = ipv4_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = ipv4_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = ipv4_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: the request reads the addresses and flags in `route`, which names no device.
    checked(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT as _, &raw const route) })
}

/// Makes a socket for requests about network interfaces.
fn datagram_socket() -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

/// Begins a request about the network interface of that name.
fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero, which ends the name.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

/// Writes an address as the kernel's structures have it: a `sockaddr_in` in the place of a `sockaddr`.
fn ipv4_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: sockaddr is plain data, for which all zeroes is a value.
    let mut place: libc::sockaddr = unsafe { std::mem::zeroed() };
    place.sa_family = INTERNET_FAMILY;
    // Two bytes of a port come first.
    for (to, from) in place.sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = from.cast_signed();
    }
    place
}

/// Writes a byte to an I/O port, where the processor has ports and this process may use them.
#[cfg(target_arch = "x86_64")]
pub(super) fn write_port(port: u16, byte: u8) -> io::Result<()> {
    // SAFETY: ioperm only changes which ports this thread may use.
    checked(unsafe { libc::ioperm(port.into(), 1, 1) })?;
    // SAFETY: the instruction writes to the port, which this thread may use, and touches neither memory nor flags.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") byte, options(nomem, nostack, preserves_flags));
    }
    // SAFETY: as above.
    checked(unsafe { libc::ioperm(port.into(), 1, 0) })
}

/// Writes a byte to an I/O port: this processor has none.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn write_port(_port: u16, _byte: u8) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Gives how many bytes a terminal has still to send; 0 for what is no terminal.
pub(super) fn unsent_output(terminal: BorrowedFd<'_>) -> i32 {
    let mut unsent: libc::c_int = 0;
    // SAFETY: the request writes one int to `unsent`.
    let answer = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCOUTQ, &raw mut unsent) };
    if answer == 0 { unsent } else { 0 }
}

fn empty_signal_set() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data, for which all zeroes is a value.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid place for a set.
    unsafe { libc::sigemptyset(&raw mut set) };
    set
}

fn check(answer: libc::c_int) -> SysResult<()> {
    if answer >= 0 {
        return Ok(());
    }
    Err(Errno(io::Error::last_os_error().raw_os_error().unwrap_or(Errno::IO.0)))
}

fn checked(answer: libc::c_int) -> io::Result<()> {
    if answer >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
