//! What a machine's sockets do on the host: they listen at the host's mapped ports of the loopback address and nowhere
//! else, and lead what the guest seeks at a mapped port of its own there too.
//!
//! With TSI libkrun binds a socket of the host's to whatever the guest names, on all of the host's addresses, and connects one
//! to whatever it names. So a filter has every bind(2) and connect(2) of the threads that libkrun makes asked of a thread
//! that is not under it (seccomp_unotify(2)), which makes the call itself, has it go on, or refuses. Both are threads of one
//! process, so the socket is the same in both.
#![allow(unsafe_code)]

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketType, sockopt},
};
use std::{
    io,
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
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

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Bind,
    Connect,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// It is made as asked.
    AsAsked,
    /// It is made with this address.
    To(SocketAddr),
    /// It is not.
    Refused,
}

/// Starts the thread, and has it asked by this thread and all that this one starts later.
///
/// # Errors
/// When the kernel has no such filters (before Linux 5.5), or no thread can be had.
pub(super) fn restrict(ports: &[PortForward]) -> io::Result<()> {
    let ports = ports.to_vec();
    let (give, take) = mpsc::channel::<OwnedFd>();
    let watch = move || {
        // Where this ends, whoever asks is refused.
        if let Ok(questions) = take.recv() {
            while answer_one(&questions, &ports).is_ok() {}
        }
    };
    thread::Builder::new().name("twinvm sockets".to_owned()).spawn(watch)?;
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
    let number = |call| u32::try_from(number_of(call)).unwrap_or_default();
    let jump_if = |value, skipped| libc::sock_filter { jt: skipped, jf: 0, ..unless(value, 0) };
    let mut program = [
        load(ARCHITECTURE),
        unless(X86_64, 4),
        load(NUMBER),
        jump_if(number(Call::Bind), 1),
        unless(number(Call::Connect), 1),
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

fn number_of(call: Call) -> libc::c_long {
    match call {
        Call::Bind => libc::SYS_bind,
        Call::Connect => libc::SYS_connect,
    }
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: u16::try_from(code).unwrap_or_default(), jt: 0, jf: 0, k }
}

/// Waits for a question and answers it.
fn answer_one(questions: &OwnedFd, ports: &[PortForward]) -> io::Result<()> {
    // SAFETY: all-zero is a valid value of this plain structure, and what the kernel wants it to be.
    let mut question: libc::seccomp_notif = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: the request writes the structure that it is for, which is borrowed for the call.
    if unsafe { libc::ioctl(questions.as_raw_fd(), RECEIVE, &raw mut question) } < 0 {
        let error = io::Error::last_os_error();
        // The thread that asked was interrupted or has ended.
        let gone = matches!(error.raw_os_error(), Some(libc::EINTR | libc::ENOENT));
        return if gone { Ok(()) } else { Err(error) };
    }
    let mut answer = libc::seccomp_notif_resp { id: question.id, val: 0, error: 0, flags: 0 };
    let call = match libc::c_long::from(question.data.nr) == number_of(Call::Connect) {
        true => Call::Connect,
        false => Call::Bind,
    };
    match decided(call, &question.data.args, ports) {
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

/// Makes the call and says so, or says that it may go on as it is.
fn decided(call: Call, arguments: &[u64; 6], ports: &[PortForward]) -> Result<bool, Errno> {
    let [fd, address, length, ..] = *arguments;
    let length = usize::try_from(length).unwrap_or(LONGEST).min(LONGEST);
    let mut bytes = [0; LONGEST];
    read(address, &mut bytes[..length])?;
    let fd = u32::try_from(fd & u64::from(u32::MAX)).unwrap_or_default().cast_signed();
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: the thread that asked waits in its call, which has it open.
    let socket = unsafe { BorrowedFd::borrow_raw(fd) };
    let stream = sockopt::socket_type(socket)? == SocketType::STREAM;
    match answer_for(call, &bytes[..length], stream, ports) {
        Answer::AsAsked => Ok(false),
        Answer::To(address) if call == Call::Connect => {
            rustix::net::connect(socket, &address).map(|()| true)
        }
        Answer::To(address) => {
            // What is left of connections when the machine has ended keeps nobody from the port.
            sockopt::set_socket_reuseaddr(socket, true)?;
            rustix::net::bind(socket, &address).map(|()| true)
        }
        // By this error the guest's kernel knows that it may listen, and is reached from inside alone.
        Answer::Refused => Err(Errno::PERM),
    }
}

/// Says what becomes of a call with an address.
fn answer_for(call: Call, address: &[u8], stream: bool, ports: &[PortForward]) -> Answer {
    let Some(family) = address.first_chunk().map(|family| u16::from_ne_bytes(*family)) else {
        return Answer::AsAsked;
    };
    let Some(port) = address.get(2..4).and_then(|port| port.first_chunk()) else {
        return Answer::AsAsked;
    };
    let port = u16::from_be_bytes(*port);
    // A socket of the sixth version that is given an address of the fourth has connections of the fourth.
    let (asked, loopback) = match family {
        family if family == AddressFamily::INET.as_raw() => {
            let asked = address.get(4..8).and_then(|ip| ip.first_chunk::<4>());
            (asked.map(|ip| IpAddr::from(*ip)), IpAddr::from(Ipv4Addr::LOCALHOST))
        }
        family if family == AddressFamily::INET6.as_raw() => {
            let asked = address.get(8..24).and_then(|ip| ip.first_chunk::<16>());
            let loopback = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
            (asked.map(|ip| IpAddr::from(*ip)), loopback.into())
        }
        _ => return Answer::AsAsked,
    };
    let at = |mapped: &PortForward| Answer::To(SocketAddr::new(loopback, mapped.host));
    match call {
        Call::Bind if stream => {
            ports.iter().find(|mapped| mapped.guest == port).map_or(Answer::Refused, at)
        }
        // Datagrams go out from a port of the host's choice.
        Call::Bind if port == 0 => Answer::AsAsked,
        Call::Bind => Answer::Refused,
        Call::Connect => {
            let own = stream && asked.is_some_and(|ip| ip.to_canonical().is_loopback());
            let mapped = ports.iter().find(|mapped| own && mapped.guest == port);
            mapped.map_or(Answer::AsAsked, at)
        }
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
    use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};

    /// Nobody listens there.
    const GUEST: u16 = 1;

    const PORTS: &[PortForward] = &[PortForward { host: 8080, guest: 80 }];

    fn v4(ip: [u8; 4], port: u16) -> Vec<u8> {
        let mut bytes = AddressFamily::INET.as_raw().to_ne_bytes().to_vec();
        bytes.extend(port.to_be_bytes());
        bytes.extend(ip);
        bytes.extend([0; 8]);
        bytes
    }

    fn v6(ip: Ipv6Addr, port: u16) -> Vec<u8> {
        let mut bytes = AddressFamily::INET6.as_raw().to_ne_bytes().to_vec();
        bytes.extend(port.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(ip.octets());
        bytes.extend([0; 4]);
        bytes
    }

    fn to(address: &str) -> Answer {
        Answer::To(address.parse().unwrap())
    }

    #[test]
    fn mapped_ports_are_bound_to_the_loopback_address_and_no_others() {
        let bind = |address: &[u8], stream| answer_for(Call::Bind, address, stream, PORTS);
        assert_eq!(bind(&v4([0; 4], 80), true), to("127.0.0.1:8080"));
        assert_eq!(bind(&v6(Ipv6Addr::UNSPECIFIED, 80), true), to("[::ffff:127.0.0.1]:8080"));
        for (port, stream) in [(8081, true), (8080, true), (0, true), (80, false)] {
            assert_eq!(bind(&v4([127, 0, 0, 1], port), stream), Answer::Refused, "{port}");
        }
        assert_eq!(bind(&v4([0; 4], 0), false), Answer::AsAsked);
        let unix = AddressFamily::UNIX.as_raw().to_ne_bytes();
        for other in [&unix[..], &[], &[1], &v4([0; 4], 80)[..3]] {
            assert_eq!(bind(other, true), Answer::AsAsked);
        }
    }

    #[test]
    fn a_guest_finds_its_own_mapped_ports_at_its_loopback_address() {
        let connect = |address: &[u8], stream| answer_for(Call::Connect, address, stream, PORTS);
        assert_eq!(connect(&v4([127, 0, 0, 1], 80), true), to("127.0.0.1:8080"));
        assert_eq!(connect(&v6(Ipv6Addr::LOCALHOST, 80), true), to("[::ffff:127.0.0.1]:8080"));
        for other in [
            v4([127, 0, 0, 1], 8080),
            v4([10, 0, 0, 1], 80),
            v6(Ipv6Addr::UNSPECIFIED, 80),
            v4([127, 0, 0, 1], 80)[..6].to_vec(),
        ] {
            assert_eq!(connect(&other, true), Answer::AsAsked, "{other:?}");
        }
        assert_eq!(connect(&v4([127, 0, 0, 1], 80), false), Answer::AsAsked);
    }

    #[test]
    fn threads_under_the_filter_listen_where_they_may() {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (mapped, other) = (free(), free());
        let confined = thread::spawn(move || {
            restrict(&[PortForward { host: mapped, guest: GUEST }]).unwrap();
            assert_eq!(
                TcpListener::bind(("0.0.0.0", other)).unwrap_err().kind(),
                io::ErrorKind::PermissionDenied
            );
            assert!(UdpSocket::bind("0.0.0.0:0").is_ok());
            let six = TcpListener::bind(("::", GUEST));
            if let Ok(six) = six {
                assert!(TcpStream::connect(("127.0.0.1", mapped)).is_ok());
                drop(six);
            }
            let listener = TcpListener::bind(("0.0.0.0", GUEST)).unwrap();
            let expected: SocketAddr = (Ipv4Addr::LOCALHOST, mapped).into();
            assert_eq!(listener.local_addr().unwrap(), expected);
            assert!(TcpStream::connect(expected).is_ok());
            let own = TcpStream::connect(("127.0.0.1", GUEST)).unwrap();
            assert_eq!(own.peer_addr().unwrap(), expected);
        });
        confined.join().unwrap();
    }
}
