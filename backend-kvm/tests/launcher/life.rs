//! Launchers that end with their owners and leave nothing.

use crate::{
    Test, launcher,
    owner::{Owner, PATIENCE, Parts, payload::Code},
};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};
use vm_backend_kvm::control::Request;

/// Makes this program an owner that starts a launcher and waits to be killed; the value is `booted` or `waiting`.
pub(crate) const OWNER_VARIABLE: &str = "TWINVM_TEST_LAUNCHER_OWNER";

pub(crate) const WITHOUT_KVM: &[Test] = &[
    ("a_launcher_ends_when_the_owner_hangs_up", ends_when_the_owner_hangs_up),
    ("a_launcher_dies_with_its_lifeline", dies_with_its_lifeline),
    ("a_stopped_launcher_dies_with_its_lifeline", a_stopped_launcher_dies),
    ("a_launcher_whose_owner_is_gone_does_not_begin", an_orphan_does_not_begin),
    ("a_killed_owner_takes_its_launcher_along", || owner_is_killed("waiting", false)),
    ("a_killed_owner_takes_its_stopped_launcher_along", || owner_is_killed("waiting", true)),
    ("a_program_without_an_owner_ends", a_program_without_an_owner_ends),
];

pub(crate) const WITH_KVM: &[Test] = &[
    ("a_killed_owner_takes_its_machine_along", || owner_is_killed("booted", false)),
    ("a_killed_owner_takes_its_stopped_machine_along", || owner_is_killed("booted", true)),
    ("cycles_leave_nothing", cycles_leave_nothing),
];

fn ends_when_the_owner_hangs_up() {
    let owner = Owner::start(&launcher());
    let socket = &owner.socket;
    rustix::net::shutdown(socket, rustix::net::Shutdown::Write).unwrap();
    let mut owner = owner;
    assert!(owner.exited().success());
}

fn dies_with_its_lifeline() {
    let mut owner = Owner::start(&launcher());
    owner.lifeline = None;
    assert_eq!(killed_by(&mut owner), Some(9));
}

fn a_stopped_launcher_dies() {
    let mut owner = Owner::start(&launcher());
    stop(owner.child.id());
    owner.lifeline = None;
    assert_eq!(killed_by(&mut owner), Some(9));
}

fn an_orphan_does_not_begin() {
    let (hung_up, writer) = std::io::pipe().unwrap();
    drop(writer);
    let mut owner = Owner::spawn(&launcher(), Some(hung_up.into())).unwrap();
    let status = owner.exited();
    assert_eq!(status.code(), Some(1), "{status}");
    assert!(owner.hear().is_none());
}

fn a_program_without_an_owner_ends() {
    let run = Command::new(launcher()).stdin(Stdio::null()).output().unwrap();
    assert_eq!(run.status.code(), Some(1));
    assert!(!run.stderr.is_empty());
}

fn killed_by(owner: &mut Owner) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(&owner.exited())
}

fn stop(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !state_is(pid.as_raw_nonzero().get().cast_unsigned(), "T") {
        assert!(Instant::now() < deadline, "it does not stop");
        sleep(Duration::from_millis(1));
    }
}

/// Says whether a process has one of these states; one that is gone has none.
fn state_is(pid: u32, states: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| states.contains(state))
}

fn owner_is_killed(kind: &str, stopped: bool) {
    let mut owner = Command::new(env::current_exe().unwrap())
        .env(OWNER_VARIABLE, kind)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(owner.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let launcher: u32 = line.trim().parse().unwrap();
    assert!(state_is(launcher, "RS"), "{launcher} does not run");
    if stopped {
        stop(launcher);
    }
    owner.kill().unwrap();
    owner.wait().unwrap();
    let deadline = Instant::now() + PATIENCE;
    // Whoever adopts it may leave a zombie for a while.
    while state_is(launcher, "RSDT") {
        assert!(Instant::now() < deadline, "the launcher lives on");
        sleep(Duration::from_millis(1));
    }
}

/// What the program is when [`OWNER_VARIABLE`] is set.
#[allow(clippy::print_stdout)]
pub(crate) fn own_until_killed() {
    let mut owner = Owner::start(&launcher());
    if env::var(OWNER_VARIABLE).as_deref() == Ok("booted") {
        let parts = Parts::new(&Code::default().spin().elf());
        owner.set_up(&parts).unwrap();
        owner.ask(Request::Boot).unwrap();
    }
    println!("{}", owner.child.id());
    std::io::stdout().flush().unwrap();
    sleep(PATIENCE);
}

/// Machines that are made, booted and ended in every way, until one thousand are done or time is over. A process that
/// is gone has no descriptor and no mapping.
fn cycles_leave_nothing() {
    const CYCLES: u32 = 1000;
    const TIME: Duration = Duration::from_secs(30);
    let parts = Parts::new(&Code::default().print("x\n").spin().elf());
    let start = Instant::now();
    let mut done = 0;
    while done < CYCLES && start.elapsed() < TIME {
        let mut owner = Owner::start(&launcher());
        let pid = owner.child.id();
        if done % 5 != 1 {
            owner.set_up(&parts).unwrap();
        }
        if done % 5 > 1 {
            owner.ask(Request::Boot).unwrap();
        }
        match done % 5 {
            2 => {
                owner.ask(Request::Pause).unwrap();
            }
            3 => owner.lifeline = None,
            _ => {}
        }
        if done % 5 != 3 {
            owner.child.kill().unwrap();
        }
        owner.exited();
        assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
        done += 1;
    }
    assert!(done > 20, "only {done} cycles in {:?}", start.elapsed());
}
