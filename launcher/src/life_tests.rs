//! The owner's side against a launcher that is a thread of the test, and a process that does nothing.

use super::*;
use crate::{
    control::{Stats, Status},
    machine::LauncherMachine,
};
use proptest::{collection::vec, prelude::*};
use rustix::{
    cmsg_space,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    },
};
use std::{
    io::{IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::unix::net::UnixStream as StdStream,
    process::Command,
    time::Instant,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Runtime,
};
use vm_core::machine::{Machine, MachineSpec, MachineStatus};
use vm_trait::VmId;

#[path = "life_tests/listening.rs"]
mod listening;

/// Makes the machine of a life.
fn machine_of(life: Arc<Life>) -> LauncherMachine {
    let spec = MachineSpec { vm: VmId(1), life: 1, config: Arc::default(), loads: false };
    LauncherMachine::new(&spec, life, &Arc::default())
}

const SOON: Duration = Duration::from_secs(20);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// The launcher's end of the control socket, blocking.
struct Fake {
    socket: OwnedFd,
    pid: u32,
}

impl Fake {
    fn say(&self, message: &FromLauncher) {
        self.say_with(message, &[]);
    }

    fn say_with(&self, message: &FromLauncher, fds: &[BorrowedFd<'_>]) {
        self.say_bytes(&postcard::to_allocvec(message).unwrap(), fds);
    }

    fn say_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(8))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || beside.push(SendAncillaryMessage::ScmRights(fds)));
        // The owner may have let go already.
        let _ = rustix::net::sendmsg(
            &self.socket,
            &[IoSlice::new(bytes)],
            &mut beside,
            SendFlags::NOSIGNAL,
        );
    }

    fn hear(&self) -> Option<(ToLauncher, Vec<OwnedFd>)> {
        let mut buffer = vec![0; MAX_PACKET];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(32))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut buffer)],
            &mut beside,
            RecvFlags::CMSG_CLOEXEC,
        );
        let bytes = received.ok()?.bytes;
        let fds = beside.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        });
        let fds = fds.collect();
        (bytes > 0).then(|| (postcard::from_bytes(&buffer[..bytes]).unwrap(), fds))
    }

    fn hear_request(&self) -> Option<(u64, Request, Vec<OwnedFd>)> {
        match self.hear()? {
            (ToLauncher::Request { id, request }, fds) => Some((id, request, fds)),
            (other, _) => panic!("{other:?}"),
        }
    }

    fn reply(&self, id: u64, result: Result<Answer, Refusal>) {
        self.say(&FromLauncher::Reply { id, result });
    }

    fn hello(&self) {
        self.say(&FromLauncher::Hello { version: CONTROL_VERSION });
    }

    /// Ends the process that stands for the launcher.
    fn exit(self) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }
}

/// Starts a process that does nothing, and `launcher` as its voice.
fn start(launcher: impl FnOnce(Fake) + Send + 'static) -> Started {
    let (control, socket) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    rustix::io::ioctl_fionbio(&control, true).unwrap();
    let process = Process::new(Command::new("sleep").arg("1000").spawn().unwrap()).unwrap();
    let (_, lifeline) = io::pipe().unwrap();
    let fake = Fake { socket, pid: process.pid() };
    thread::spawn(move || launcher(fake));
    let messages = rustix::fs::memfd_create("words", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut messages = File::from(messages);
    messages.write_all(b"a word").unwrap();
    Started { control, process, lifeline, messages, spawn_time: Duration::from_millis(1) }
}

async fn begin(launcher: impl FnOnce(Fake) + Send + 'static) -> Result<Arc<Life>, MachineError> {
    let started = start(launcher);
    Life::begin(started, ConsoleRing::new(1024).unwrap()).await
}

fn is_there(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

/// Runs a test, and sees to it that it ends.
fn run(test: impl Future<Output = ()>) {
    runtime().block_on(async { tokio::time::timeout(SOON, test).await.expect("it hangs") });
}

#[test]
fn requests_are_answered_in_any_order() {
    run(async {
        let life = begin(|fake| {
            fake.hello();
            let (one, request, _) = fake.hear_request().unwrap();
            assert_eq!(request, Request::Stats);
            let (two, request, _) = fake.hear_request().unwrap();
            assert_eq!(request, Request::Status);
            let stats = Stats { vcpu_time_ns: 7, vm_exits: Some(8), guest_resident_bytes: 9 };
            fake.reply(two, Ok(Answer::Status(Status::Paused)));
            fake.reply(one, Ok(Answer::Stats(stats)));
            let (id, _, _) = fake.hear_request().unwrap();
            fake.reply(id, Err(Refusal::Exhausted("memory".to_owned())));
            fake.hear_request();
        });
        let machine = machine_of(life.await.unwrap());
        let (stats, status) = tokio::join!(machine.stats(), async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            machine.status().await
        });
        assert_eq!(status, Ok(MachineStatus::Paused));
        let stats = stats.unwrap();
        assert_eq!((stats.vm_exits, stats.memory_used_bytes), (Some(8), Some(9)));
        assert_eq!(machine.boot().await, Err(MachineError::Exhausted("memory".to_owned())));
        machine.kill().await.unwrap();
        assert_eq!(machine.wait().await, MachineExit::Killed);
    });
}

#[test]
fn an_answer_that_nobody_waits_for_any_more_is_no_fault() {
    run(async {
        let life = begin(|fake| {
            fake.hello();
            let (given_up, _, _) = fake.hear_request().unwrap();
            let (id, _, _) = fake.hear_request().unwrap();
            fake.reply(given_up, Ok(Answer::Done));
            fake.reply(id, Ok(Answer::Status(Status::Running)));
            fake.hear();
        });
        let machine = machine_of(life.await.unwrap());
        let pause = tokio::time::timeout(Duration::from_millis(20), machine.pause()).await;
        assert!(pause.is_err());
        assert_eq!(machine.status().await, Ok(MachineStatus::Running));
    });
}

/// How the stand-in for a launcher ends.
const UNASKED: &str = "the launcher ended unasked: signal: 15 (SIGTERM); it said: a word";

#[test]
fn the_last_word_decides_how_a_machine_ended() {
    let ends = [
        (Some(End::PoweredOff), MachineExit::PoweredOff),
        (Some(End::Reset), MachineExit::PoweredOff),
        (Some(End::Panicked), MachineExit::Crashed(CrashReason::GuestPanic)),
        (Some(End::Failed("odd".to_owned())), MachineExit::Failed("odd".to_owned())),
        (None, MachineExit::Failed(UNASKED.to_owned())),
    ];
    for (end, wanted) in ends {
        run(async {
            let said = end.clone();
            let life = begin(move |fake| {
                fake.hello();
                fake.hear_request();
                if let Some(end) = said {
                    fake.say(&FromLauncher::Ended(end));
                }
                fake.exit();
            });
            let life = life.await.unwrap();
            let machine = machine_of(life.clone());
            assert_eq!(machine.pause().await, Err(MachineError::Ended));
            assert_eq!(machine.wait().await, wanted);
            assert_eq!(machine.status().await, Ok(MachineStatus::Ended));
            assert!(!is_there(life.pid));
            let console = String::from_utf8(machine.console().to_vec()).unwrap();
            let failed = matches!(end, Some(End::Failed(_)) | None);
            assert_eq!(console.contains("twinvm: the machine failed"), failed, "{console}");
            assert_eq!(console.contains("a word"), end.is_none(), "{console}");
        });
    }
}

#[test]
fn a_launcher_that_lingers_after_its_last_word_is_killed() {
    run(async {
        let life = begin(|fake| {
            fake.hello();
            fake.say(&FromLauncher::Ended(End::PoweredOff));
            fake.hear();
        });
        let life = life.await.unwrap();
        let began = Instant::now();
        assert_eq!(life.ended().await, MachineExit::PoweredOff);
        assert!(began.elapsed() < EXIT_GRACE * 3 && !is_there(life.pid));
    });
}

#[test]
fn a_launcher_that_does_not_come_up_is_reported_with_what_it_said() {
    type Launcher = fn(Fake);
    let bad: [(Launcher, &str); 4] = [
        (Fake::exit, "a word"),
        (drop, "a word"),
        (|fake| fake.say(&FromLauncher::Hello { version: CONTROL_VERSION + 1 }), "version"),
        (|fake| fake.say(&FromLauncher::SetUpDone(Ok(()))), "protocol"),
    ];
    for (launcher, word) in bad {
        run(async {
            let error = begin(launcher).await.unwrap_err();
            assert!(matches!(&error, MachineError::Failed(text) if text.contains(word)), "{error}");
        });
    }
}

#[test]
fn a_set_up_is_refused_with_its_field() {
    run(async {
        let life = begin(|fake| {
            fake.hello();
            let (message, fds) = fake.hear().unwrap();
            assert!(matches!(message, ToLauncher::SetUp(_)) && fds.len() == 2);
            let (field, reason) = ("memory".to_owned(), "odd".to_owned());
            fake.say(&FromLauncher::SetUpDone(Err(Refusal::Config { field, reason })));
            fake.hear();
        });
        let life = life.await.unwrap();
        let set_up = crate::control::MachineSetUp {
            name: "x".to_owned(),
            vcpus: 1,
            memory_mib: 64,
            cmdline: String::new(),
            devices_in_cmdline: true,
            console_device: crate::control::ConsoleDevice::SerialPort,
            initrd_parts: 0,
            console_ring_bytes: 1024,
            console_file: false,
            console_file_limit: 0,
            disks: Vec::new(),
            shares: Vec::new(),
            vsock_cid: 3,
            network: vm_trait::NetworkConfig::None,
            passt: None,
        };
        let files = [File::open("/dev/null").unwrap(), File::open("/dev/zero").unwrap()];
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let error = life.set_up(&ToLauncher::SetUp(Box::new(set_up)), &fds).await.unwrap_err();
        assert!(matches!(error, MachineError::Config { field, .. } if field == "memory"));
        drop(machine_of(life));
    });
}

#[test]
fn dropped_machines_and_runtimes_leave_no_process() {
    for whole_runtime in [false, true] {
        let runtime = runtime();
        let life = runtime.block_on(async {
            let life = begin(|fake| {
                fake.hello();
                while fake.hear().is_some() {}
            });
            life.await.unwrap()
        });
        let (pid, machine) = (life.pid, machine_of(life.clone()));
        assert!(is_there(pid));
        if whole_runtime {
            drop(runtime);
            let other = self::runtime();
            other.block_on(async {
                tokio::time::timeout(SOON, machine.kill()).await.unwrap().unwrap();
            });
        } else {
            drop(machine);
            runtime.block_on(async { tokio::time::timeout(SOON, life.ended()).await.unwrap() });
        }
        assert!(!is_there(pid));
    }
}

#[test]
fn a_beginning_that_is_given_up_leaves_no_process() {
    run(async {
        let (send, pid) = std::sync::mpsc::channel();
        let silent = move |fake: Fake| {
            send.send(fake.pid).unwrap();
            fake.hear();
        };
        let begun = tokio::time::timeout(Duration::from_millis(50), begin(silent)).await;
        assert!(begun.is_err());
        let pid = pid.recv().unwrap();
        while is_there(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}

#[test]
fn connections_carry_bytes_and_lose_none() {
    run(async {
        let life = begin(|fake| {
            fake.hello();
            for _ in 0..3 {
                let (id, request, mut fds) = fake.hear_request().unwrap();
                assert_eq!((request, fds.len()), (Request::Connect, 1));
                let mut stream = StdStream::from(fds.remove(0));
                fake.reply(id, Ok(Answer::Done));
                let mut line = vec![0; b"CONNECT 1024\n".len()];
                stream.read_exact(&mut line).unwrap();
                match &line[..] {
                    b"CONNECT 1024\n" => {
                        stream.write_all(b"OK 1073741824\nfirst words").unwrap();
                        let mut echo = [0; 5];
                        stream.read_exact(&mut echo).unwrap();
                        stream.write_all(&echo).unwrap();
                    }
                    b"CONNECT 1025\n" => drop(stream),
                    _ => stream.write_all(&[b'x'; 100]).unwrap(),
                }
            }
            let (id, _, _) = fake.hear_request().unwrap();
            fake.reply(id, Err(Refusal::State(Status::Fresh)));
            fake.hear_request();
            fake.exit();
        });
        let machine = machine_of(life.await.unwrap());
        let mut link = machine.connect(1024).await.unwrap();
        let mut first = [0; 11];
        link.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"first words");
        link.write_all(b"hello").await.unwrap();
        let mut echo = Vec::new();
        link.read_to_end(&mut echo).await.unwrap();
        assert_eq!(echo, b"hello");
        for port in [1025, 1026, 1027] {
            assert_eq!(machine.connect(port).await.err(), Some(MachineError::NotListening));
        }
        assert_eq!(machine.connect(1028).await.err(), Some(MachineError::Ended));
    });
}

#[test]
fn a_launcher_that_stands_still_can_be_killed() {
    run(async {
        let life = begin(|fake| {
            fake.hello();
            // It takes nothing any more, and is stopped besides.
            let pid = rustix::process::Pid::from_raw(i32::try_from(fake.pid).unwrap()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
            thread::sleep(SOON);
        });
        let life = life.await.unwrap();
        let machine = machine_of(life.clone());
        for _ in 0..2000 {
            let asked = tokio::time::timeout(Duration::from_micros(200), machine.connect(5)).await;
            assert!(asked.is_err());
        }
        assert!(life.lock().waiting.is_empty());
        machine.kill().await.unwrap();
        assert!(!is_there(life.pid));
    });
}

#[test]
fn marks_become_stages() {
    run(async {
        let life = begin(|fake| {
            fake.hello();
            let (id, _, _) = fake.hear_request().unwrap();
            let at = |later: u64| u64::try_from(now().as_nanos()).unwrap() + later * 1_000_000;
            fake.say(&FromLauncher::Mark { mark: 1, at_ns: at(1000) });
            fake.say(&FromLauncher::Mark { mark: 77, at_ns: 3 });
            fake.say(&FromLauncher::Mark { mark: 2, at_ns: at(1500) });
            fake.say(&FromLauncher::Mark { mark: 2, at_ns: at(9000) });
            fake.reply(id, Ok(Answer::Done));
            fake.hear();
        });
        let life = life.await.unwrap();
        let machine = machine_of(life.clone());
        machine.boot().await.unwrap();
        let stages = life.stages();
        let kernel = stages.kernel_to_init.unwrap();
        assert!((1.0..2.0).contains(&kernel.as_secs_f64()), "{kernel:?}");
        let init = stages.init_to_listening.unwrap();
        assert!((0.4..0.6).contains(&init.as_secs_f64()), "{init:?}");
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever a launcher says, every request ends, and so does the launcher once it is killed.
    #[test]
    fn any_bytes_from_a_launcher_end_well(packets in vec(vec(any::<u8>(), 1..40), 0..20)) {
        run(async {
            let life = begin(move |fake| {
                fake.hello();
                for packet in &packets {
                    let null = File::open("/dev/null").unwrap();
                    fake.say_bytes(packet, &[null.as_fd()]);
                }
                if fake.hear_request().is_some() {
                    fake.exit();
                }
            });
            let machine = machine_of(life.await.unwrap());
            let _ = machine.status().await;
            machine.kill().await.unwrap();
            assert_eq!(machine.status().await, Ok(MachineStatus::Ended));
        });
    }
}
