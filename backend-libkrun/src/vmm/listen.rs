//! Where a machine listens on the host: at the mapped ports of the loopback address, and nowhere else.
//!
//! With TSI libkrun binds a socket of the host's to whatever the guest names, on all of the host's addresses. So a filter has
//! every bind(2) of the threads that libkrun makes asked of a thread that is not under it (seccomp_unotify(2)), which binds
//! the socket itself or refuses. Both are threads of one process, so the socket is the same in both.
#![allow(unsafe_code)]

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketType, sockopt},
};
use std::{
    io,
    mem::MaybeUninit,
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    sync::mpsc,
    thread,
};
use vm_trait::PortForward;

/// `AUDIT_ARCH_X86_64`, by which a filter knows whose numbers of system calls these are.
const X86_64: u32 = 0xc000_003e;

/// Where a filter finds the architecture and the number of a system call (`struct seccomp_data`).
const ARCHITECTURE: u32 = 4;
const NUMBER: u32 = 0;

/// `SECCOMP_IOCTL_NOTIF_RECV` and `SECCOMP_IOCTL_NOTIF_SEND`.
const RECEIVE: libc::c_ulong = 0xc050_2100;
const SEND: libc::c_ulong = 0xc018_2101;

/// The largest address of a socket that is of interest: `struct sockaddr_in6`.
const LONGEST: usize = 28;

/// What becomes of a socket that is to be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// It is bound as asked.
    AsAsked,
    /// It is bound to this address.
    To(SocketAddr),
    /// It is not.
    Refused,
}

/// Starts the thread, and has it asked by this thread and all that this one starts later.
///
/// # Errors
/// When the kernel has no such filters (before Linux 5.5), or no thread can be had.
pub(super) fn restrict(ports: &[PortForward]) -> io::Result<()> {
    let mapped: Vec<u16> = ports.iter().map(|port| port.host).collect();
    let (give, take) = mpsc::channel::<OwnedFd>();
    let watch = move || {
        // Where this ends, whoever asks is refused.
        if let Ok(questions) = take.recv() {
            while answer_one(&questions, &mapped).is_ok() {}
        }
    };
    thread::Builder::new().name("twinvm listen".to_owned()).spawn(watch)?;
    let questions = install()?;
    give.send(questions).map_err(|_| io::Error::other("the thread that is asked has ended"))
}

/// Puts the filter over this thread; gives the descriptor that questions come through.
fn install() -> io::Result<OwnedFd> {
    let load = |at| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at);
    let give = |what| statement(libc::BPF_RET | libc::BPF_K, what);
    let unless = |value, skipped| libc::sock_filter {
        code: u16::try_from(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K).unwrap_or_default(),
        jt: 0,
        jf: skipped,
        k: value,
    };
    let bind = u32::try_from(libc::SYS_bind).unwrap_or_default();
    let mut program = [
        load(ARCHITECTURE),
        unless(X86_64, 3),
        load(NUMBER),
        unless(bind, 1),
        give(libc::SECCOMP_RET_USER_NOTIF),
        give(libc::SECCOMP_RET_ALLOW),
    ];
    let length = u16::try_from(program.len()).unwrap_or_default();
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    rustix::thread::set_no_new_privs(true)?;
    // SAFETY: the program is borrowed for the call, with its length.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    match RawFd::try_from(fd) {
        // SAFETY: the call made the descriptor for its caller alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: u16::try_from(code).unwrap_or_default(), jt: 0, jf: 0, k }
}

/// Waits for a question and answers it.
fn answer_one(questions: &OwnedFd, mapped: &[u16]) -> io::Result<()> {
    // SAFETY: all-zero is a valid value of this plain structure, and what the kernel wants it to be.
    let mut question: libc::seccomp_notif = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: the request writes the structure that it is for, which is borrowed for the call.
    if unsafe { libc::ioctl(questions.as_raw_fd(), RECEIVE, &raw mut question) } < 0 {
        let error = io::Error::last_os_error();
        // The thread that asked was interrupted or has ended.
        let gone = matches!(error.raw_os_error(), Some(libc::EINTR | libc::ENOENT));
        return if gone { Ok(()) } else { Err(error) };
    }
    let mut answer =
        libc::seccomp_notif_resp { id: question.id, val: 0, error: 0, flags: 0 };
    match decided(&question.data.args, mapped) {
        Ok(true) => {}
        Ok(false) => {
            let go_on = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE;
            answer.flags = u32::try_from(go_on).unwrap_or_default();
        }
        Err(error) => answer.error = -error.raw_os_error(),
    }
    // SAFETY: as above; the request reads. Whoever asked may have ended, and then there is nobody to be answered.
    unsafe { libc::ioctl(questions.as_raw_fd(), SEND, &raw const answer) };
    Ok(())
}

/// Binds the socket that is asked for, and says so; or says that it may be bound as asked.
fn decided(arguments: &[u64; 6], mapped: &[u16]) -> Result<bool, Errno> {
    let [fd, address, length, ..] = *arguments;
    let length = usize::try_from(length).unwrap_or(LONGEST).min(LONGEST);
    let mut bytes = [0; LONGEST];
    read(address, &mut bytes[..length])?;
    let fd = u32::try_from(fd & u64::from(u32::MAX)).unwrap_or_default().cast_signed();
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: the thread that asked waits in bind(2), which has it open.
    let socket = unsafe { BorrowedFd::borrow_raw(fd) };
    let stream = sockopt::socket_type(socket)? == SocketType::STREAM;
    match answer_for(&bytes[..length], stream, mapped) {
        Answer::AsAsked => Ok(false),
        Answer::To(address) => rustix::net::bind(socket.as_fd(), &address).map(|()| true),
        Answer::Refused => Err(Errno::ACCESS),
    }
}

/// Says what becomes of a socket that is to be bound to an address.
fn answer_for(address: &[u8], stream: bool, mapped: &[u16]) -> Answer {
    let Some(family) = address.first_chunk().map(|family| u16::from_ne_bytes(*family)) else {
        return Answer::AsAsked;
    };
    let port = address.get(2..4).and_then(|port| port.first_chunk()).map(|port| u16::from_be_bytes(*port));
    let ip = match family {
        family if family == AddressFamily::INET.as_raw() => Ipv4Addr::LOCALHOST.into(),
        // A socket of this family that is bound so takes connections to the loopback address of the other.
        family if family == AddressFamily::INET6.as_raw() => {
            Ipv4Addr::LOCALHOST.to_ipv6_mapped().into()
        }
        _ => return Answer::AsAsked,
    };
    match port {
        Some(port) if stream && mapped.contains(&port) => Answer::To(SocketAddr::new(ip, port)),
        // Datagrams go out from a port of the host's choice.
        Some(0) if !stream => Answer::AsAsked,
        _ => Answer::Refused,
    }
}

/// Reads what this process has at an address, which need not be there.
fn read(from: u64, bytes: &mut [u8]) -> Result<(), Errno> {
    let from = usize::try_from(from).map_err(|_| Errno::FAULT)?;
    let ours = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let there =
        libc::iovec { iov_base: ptr::with_exposed_provenance_mut(from), iov_len: bytes.len() };
    let this = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the kernel writes at most the bytes that are borrowed, and checks whether the others can be read.
    let read = unsafe { libc::process_vm_readv(this, &raw const ours, 1, &raw const there, 1, 0) };
    match usize::try_from(read) {
        Ok(read) if read == bytes.len() => Ok(()),
        _ => Err(Errno::FAULT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    fn answer(address: &[u8], stream: bool) -> Answer {
        answer_for(address, stream, &[8080])
    }

    fn inet(port: u16) -> Vec<u8> {
        let mut bytes = AddressFamily::INET.as_raw().to_ne_bytes().to_vec();
        bytes.extend(port.to_be_bytes());
        bytes.extend([0; 12]);
        bytes
    }

    #[test]
    fn mapped_ports_are_bound_to_the_loopback_address_and_no_others() {
        assert_eq!(answer(&inet(8080), true), Answer::To("127.0.0.1:8080".parse().unwrap()));
        let mut six = inet(8080);
        six[..2].copy_from_slice(&AddressFamily::INET6.as_raw().to_ne_bytes());
        six.extend([0; 12]);
        assert_eq!(answer(&six, true), Answer::To("[::ffff:127.0.0.1]:8080".parse().unwrap()));
        for (address, stream) in
            [(inet(8081), true), (inet(0), true), (inet(8080), false), (inet(8080)[..3].to_vec(), true)]
        {
            assert_eq!(answer(&address, stream), Answer::Refused, "{address:?}");
        }
        assert_eq!(answer(&inet(0), false), Answer::AsAsked);
        let unix = AddressFamily::UNIX.as_raw().to_ne_bytes();
        for other in [&unix[..], &[], &[1]] {
            assert_eq!(answer(other, true), Answer::AsAsked);
        }
    }

    #[test]
    fn threads_under_the_filter_listen_where_they_may() {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (mapped, other) = (free(), free());
        let confined = thread::spawn(move || {
            restrict(&[PortForward { host: mapped, guest: 80 }]).unwrap();
            assert_eq!(
                TcpListener::bind(("0.0.0.0", other)).unwrap_err().kind(),
                io::ErrorKind::PermissionDenied
            );
            assert!(UdpSocket::bind("0.0.0.0:0").is_ok());
            let six = TcpListener::bind(("::", mapped));
            if let Ok(six) = six {
                assert!(TcpStream::connect(("127.0.0.1", mapped)).is_ok());
                drop(six);
            }
            let listener = TcpListener::bind(("0.0.0.0", mapped)).unwrap();
            let expected: SocketAddr = (Ipv4Addr::LOCALHOST, mapped).into();
            assert_eq!(listener.local_addr().unwrap(), expected);
            assert!(TcpStream::connect(expected).is_ok());
        });
        confined.join().unwrap();
    }
}
