//! Machines whose network goes by passt, seen from the host: with stand-ins of passt that fail, and with the real one and
//! guests, which takes a KVM that runs them.

use crate::network::{SERVE, config, fetched, fetched_soon, free_port, run, sh, started};
use crate::{RING, begin, set_up};
use std::{
    fs::{self, File},
    io::Write,
    net::{IpAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use vm_backend_libkrun::{KrunHypervisor, control::ToLauncher};
use vm_core::machine::MachineError;
use vm_launcher::backend::on_this_host;
use vm_trait::{NetworkConfig, StopOptions, VmBackend, VmErrorKind, VmState};

const SOON: Duration = Duration::from_secs(10);

/// Waits until it is so.
fn soon(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + SOON;
    while !is_so() {
        assert!(Instant::now() < end, "{what} takes too long");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A program in the place of passt, in a directory that everybody may enter.
fn stand_in(script: &str) -> PathBuf {
    let name = format!("twinvm-passt-{}-{}", std::process::id(), free_port());
    let path = Path::new("/tmp").join(name);
    let mut file = File::create(&path).unwrap();
    file.write_all(format!("#!/bin/sh\n{script}\n").as_bytes()).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Has a machine made with this program in the place of passt.
async fn made_with(program: &Path, network: NetworkConfig) -> Result<(), MachineError> {
    let (life, ring) = begin().await;
    let none = File::open("/etc/passwd").unwrap();
    let ToLauncher::SetUp(mut described) = set_up("quiet") else { panic!("something else") };
    described.network = network;
    described.passt = Some(program.into());
    let message = ToLauncher::SetUp(described);
    let outcome = life.set_up(&message, &[none.as_fd(), none.as_fd(), ring.as_fd()]).await;
    life.kill();
    life.ended().await;
    outcome
}

#[test]
fn a_passt_that_does_not_come_up_is_told_with_its_words() {
    assert_eq!(RING, 4096);
    run(|| async {
        let port = free_port();
        let network = || NetworkConfig::passt().with_port(port, 80);
        let program = stand_in("echo no way out >&2; exit 3");
        let Err(MachineError::Failed(why)) = made_with(&program, network()).await else {
            panic!("it came up")
        };
        assert!(why.contains("no way out") && why.contains('3'), "{why}");
        fs::remove_file(&program).unwrap();
        let Err(MachineError::Failed(why)) = made_with(&program, network()).await else {
            panic!("it came up")
        };
        assert!(why.contains(&program.display().to_string()), "{why}");
        assert!(TcpListener::bind(("127.0.0.1", port)).is_ok(), "it kept its port");
    });
}

#[test]
fn a_port_that_is_taken_while_passt_comes_up_is_told_as_one() {
    run(|| async {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let network = NetworkConfig::passt().with_port(port, 80);
        let program = stand_in("exit 1");
        let refused = made_with(&program, network.clone()).await;
        assert_eq!(refused, Err(MachineError::PortInUse(port.into())));
        drop(listener);
        // Whoever takes it after it was found to be free.
        let takes_it = stand_in(&format!(
            "python3 -c 'import socket, time; s = socket.socket(); s.bind((\"127.0.0.1\", {port})); s.listen(); time.sleep(3)' \
             </dev/null >/dev/null 2>&1 &\nsleep 1; exit 1"
        ));
        let refused = made_with(&takes_it, network).await;
        assert_eq!(refused, Err(MachineError::PortInUse(port.into())));
        for program in [program, takes_it] {
            fs::remove_file(program).unwrap();
        }
    });
}

fn hypervisor() -> Arc<KrunHypervisor> {
    let launcher = env!("CARGO_BIN_EXE_vm-krun-launcher");
    Arc::new(KrunHypervisor::builder().with_launcher(launcher).build().unwrap())
}

fn backend(hypervisor: &Arc<KrunHypervisor>) -> impl VmBackend {
    on_this_host(hypervisor.clone(), None, Arc::new(vm_core::observe::NoObserver))
}

/// The passt of a launcher: which of its children was started with passt's arguments.
fn passt_of(launcher: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children"));
    let children = children.unwrap();
    let named = |pid: &&str| {
        fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|it| it.contains("--tcp-ports"))
    };
    children.split_whitespace().find(named).expect("it has a passt").parse().unwrap()
}

fn signal(pid: u32, signal: &str) {
    let status = Command::new("kill").args([signal, &pid.to_string()]).status();
    assert!(status.unwrap().success());
}

fn is_there(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// The address by which this host goes out.
fn own_address() -> IpAddr {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect("192.0.2.1:9").unwrap();
    socket.local_addr().unwrap().ip()
}

/// A server at an address of the host that says a word to everybody.
fn server(address: &str, word: &'static str) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().write_all(word.as_bytes());
        }
    });
    port
}

async fn word_of(port: u16) -> Option<String> {
    tokio::task::spawn_blocking(move || fetched_soon(port)).await.unwrap()
}

#[test]
#[ignore = "takes passt and a KVM that runs guests"]
fn a_guest_with_passt_is_reached_and_reaches_out() {
    run(|| async {
        let (mapped, other) = (free_port(), free_port());
        let machines = hypervisor();
        let network = NetworkConfig::passt().with_port(mapped, 80).with_port(other, 81);
        let vm = started(&backend(&machines), config(network)).await;
        assert_eq!(fetched(mapped), None, "nobody listens in the guest yet");
        assert_eq!(sh(&vm, SERVE).await, "served\n");
        assert!(word_of(mapped).await.is_some_and(|it| it.contains("from the guest")));
        assert_eq!(fetched(other), None, "nobody listens there");
        assert!(TcpStream::connect(("127.0.0.2", mapped)).is_err());
        assert!(TcpStream::connect((own_address(), mapped)).is_err());
        // The guest goes out, and not to the host's loopback address, by its own or by the gateway's.
        let (out, inner) = (server("0.0.0.0", "from the host"), server("127.0.0.1", "from within"));
        let heard = sh(&vm, &format!("nc -w 10 {} {out} </dev/null", own_address())).await;
        assert_eq!(heard, "from the host");
        for there in ["127.0.0.1", "10.0.2.2", "10.0.2.3"] {
            let heard = sh(&vm, &format!("timeout 5 nc -w 3 {there} {inner} </dev/null")).await;
            assert!(!heard.contains("from within"), "{there}: {heard}");
        }
        assert_eq!(sh(&vm, "cat /etc/resolv.conf").await, "nameserver 10.0.2.3\n");
        vm.pause().await.unwrap();
        vm.resume().await.unwrap();
        assert!(word_of(mapped).await.is_some_and(|it| it.contains("from the guest")));
        vm.stop(StopOptions::default()).await.unwrap();
        vm.start().await.unwrap();
        assert_eq!(sh(&vm, SERVE).await, "served\n");
        assert!(word_of(mapped).await.is_some_and(|it| it.contains("from the guest")));
        vm.kill().await.unwrap();
        assert_eq!(fetched(mapped), None);
    });
}

#[test]
#[ignore = "takes passt and a KVM that runs guests"]
fn passt_has_nothing_that_it_does_not_need_and_ends_with_its_launcher() {
    run(|| async {
        let machines = hypervisor();
        for paused in [true, false] {
            let mapped = free_port();
            let network = NetworkConfig::passt().with_port(mapped, 80);
            let vm = started(&backend(&machines), config(network)).await;
            let launcher = machines.launcher_pid(vm.id()).unwrap();
            let passt = passt_of(launcher);
            let at = |name: &str| PathBuf::from(format!("/proc/{passt}/{name}"));
            // A shell may have started it, which adds words of its own.
            let variables = fs::read_to_string(at("environ")).unwrap();
            assert!(!variables.contains("PATH=") && !variables.contains("TWINVM_"), "{variables}");
            // Of what is in there, all is the superuser's.
            assert_ne!(fs::metadata(at("")).unwrap().uid(), 0, "it is the superuser");
            for fd in fs::read_dir(at("fd")).unwrap() {
                let what = fs::read_link(fd.unwrap().path()).unwrap().display().to_string();
                let needed = ["socket:", "pipe:", "anon_inode:[eventpoll]", "anon_inode:[timerfd]"];
                let needed = needed.iter().any(|it| what.starts_with(it)) || what == "/dev/null";
                assert!(needed, "{what}");
            }
            if paused {
                vm.pause().await.unwrap();
                let status = fs::read_to_string(at("status")).unwrap();
                assert!(status.contains("T (stopped)"), "{status}");
            }
            signal(launcher, "-KILL");
            soon("the end of passt", || !is_there(passt));
            soon("the end of the machine", || {
                vm.state() != VmState::Running && vm.state() != VmState::Paused
            });
            assert!(TcpListener::bind(("127.0.0.1", mapped)).is_ok());
        }
    });
}

#[test]
#[ignore = "takes passt and a KVM that runs guests"]
fn a_machine_ends_with_its_passt() {
    run(|| async {
        let machines = hypervisor();
        let mapped = free_port();
        let network = NetworkConfig::passt().with_port(mapped, 80);
        let vm = started(&backend(&machines), config(network)).await;
        signal(passt_of(machines.launcher_pid(vm.id()).unwrap()), "-KILL");
        soon("the end of the machine", || vm.state() != VmState::Running);
        assert!(matches!(vm.state(), VmState::Crashed(_)), "{:?}", vm.state());
        assert!(TcpListener::bind(("127.0.0.1", mapped)).is_ok());
    });
}

#[test]
#[ignore = "takes a kernel"]
fn a_missing_passt_is_told_when_a_machine_is_created() {
    run(|| async {
        let launcher = env!("CARGO_BIN_EXE_vm-krun-launcher");
        let builder = KrunHypervisor::builder().with_launcher(launcher);
        let machines = Arc::new(builder.with_passt("/nowhere/passt").build().unwrap());
        let refused = backend(&machines).create(config(NetworkConfig::passt())).await;
        assert!(matches!(
            refused.unwrap_err().kind(),
            VmErrorKind::InvalidConfig { field, reason }
                if field == "network" && reason.contains("/nowhere/passt") && reason.contains("TWINVM_PASST")
        ));
        assert!(backend(&machines).create(config(NetworkConfig::None)).await.is_ok());
    });
}
