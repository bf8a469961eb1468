//! What the agent sees: processes, streams, terminals, signals, faults.

use super::{Ran, boot, drain, finish, later, run, sh, spec};
use crate::guest::{
    ChildSpec, GuestProgram, OsConfig, OsEvent, OsFault, OsFaults, ProgramRegistry, SimOs, Step,
    SysCall, Syscalls, WaitFor,
};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use vm_guest_agent::os::{ChildExit, Errno, GuestOs, Output, ReadOutcome, SpawnSpec};
use vm_guest_protocol::TermSize;

fn ran(stdout: &str, stderr: &str, status: i32) -> Ran {
    Ran { stdout: stdout.to_owned(), stderr: stderr.to_owned(), status }
}

#[test]
fn messages_are_those_of_busybox() {
    for (script, expected) in [
        ("cat x", ran("", "cat: can't open 'x': No such file or directory\n", 1)),
        ("cat /tmp", ran("", "cat: read error: Is a directory\n", 1)),
        ("ls x", ran("", "ls: x: No such file or directory\n", 1)),
        ("nosuch", ran("", "sh: nosuch: not found\n", 127)),
        ("/etc/passwd", ran("", "sh: /etc/passwd: Permission denied\n", 126)),
        ("/tmp", ran("", "sh: /tmp: Permission denied\n", 126)),
        ("mkdir /tmp", ran("", "mkdir: can't create directory '/tmp': File exists\n", 1)),
        ("rm x", ran("", "rm: can't remove 'x': No such file or directory\n", 1)),
        ("rmdir /etc", ran("", "rmdir: '/etc': Directory not empty\n", 1)),
        ("cp x y", ran("", "cp: can't stat 'x': No such file or directory\n", 1)),
        ("mv x y", ran("", "mv: can't rename 'x': No such file or directory\n", 1)),
        ("sleep x", ran("", "sleep: invalid number 'x'\n", 1)),
        ("echo $((1/0))", ran("", "sh: divide by zero\n", 2)),
        (")", ran("", "sh: syntax error: unexpected \")\"\n", 2)),
        ("select x in a; do :; done", ran("", "sh: syntax error: unexpected \"do\"\n", 2)),
        ("echo ${x/a/b}", ran("", "sh: bad substitution\n", 2)),
        ("kill 12345", ran("", "kill: can't kill pid 12345: No such process\n", 1)),
        ("echo x > /nodir/f", ran("", "sh: can't create /nodir/f: nonexistent directory\n", 1)),
        ("kill -9 $$", ran("", "", -9)),
        ("sh -c 'kill -9 $$'; echo $?", ran("137\n", "Killed\n", 0)),
        ("echo x > /dev/full", ran("", "echo: write error: No space left on device\n", 1)),
        ("id; id -un; whoami", ran("uid=0(root) gid=0(root) groups=0(root)\nroot\nroot\n", "", 0)),
        ("hostname; nproc; pwd; uname", ran("guest\n2\n/\nLinux\n", "", 0)),
        ("exit 300", ran("", "", 44)),
        ("date +%s; date -u", ran("0\nThu Jan  1 00:00:00 UTC 1970\n", "", 0)),
    ] {
        assert_eq!(sh(&mut boot(), script), expected, "{script}");
    }
}

#[test]
fn errors_of_starting_are_told_at_once() {
    let mut os = boot();
    for (path, cwd, ids, expected) in [
        ("/bin/nosuch", "/", None, Errno::NOENT),
        ("/tmp", "/", None, Errno::ACCES),
        ("/etc/passwd", "/", None, Errno::ACCES),
        ("/bin/true/x", "/", None, Errno::NOTDIR),
        ("/bin/true", "/nowhere", None, Errno::NOENT),
        ("/bin/true", "/etc/passwd", None, Errno::NOTDIR),
        ("/bin/true", "/root", Some((1000, 1000)), Errno::ACCES),
    ] {
        let wrong = SpawnSpec { path: path.into(), cwd: cwd.into(), ids, ..spec(&["true"]) };
        assert_eq!(os.spawn(&wrong).unwrap_err(), expected, "{path} in {cwd}");
        assert!(!os.has_processes());
    }
}

#[test]
fn a_terminal_has_lines_a_size_and_an_end() {
    let mut os = boot();
    let size = TermSize { rows: 24, cols: 80 };
    let script = "trap 'stty size' WINCH; stty size; read x; echo got $x; cat; echo end";
    let tty = SpawnSpec { tty: Some(size), ..spec(&["sh", "-c", script]) };
    let child = os.spawn(&tty).unwrap().child;
    os.run(1000);
    assert_eq!(drain(&mut os, child, Output::Stdout), b"24 80\r\n");
    os.resize(child, TermSize { rows: 50, cols: 100 }).unwrap();
    os.run(1000);
    assert_eq!(drain(&mut os, child, Output::Stdout), b"50 100\r\n");
    assert_eq!(os.write_stdin(child, b"word\n"), Ok(5));
    os.run(1000);
    assert_eq!(drain(&mut os, child, Output::Stdout), b"word\r\ngot word\r\n");
    os.close_stdin(child);
    let end = finish(&mut os, child);
    assert_eq!((end.stdout.as_str(), end.status), ("end\r\n", 0));
    let cat = SpawnSpec { tty: Some(size), ..spec(&["cat"]) };
    let child = os.spawn(&cat).unwrap().child;
    os.run(1000);
    os.write_stdin(child, &[3]).unwrap();
    assert_eq!(finish(&mut os, child).status, -2);
    let child = os.spawn(&spec(&["cat"])).unwrap().child;
    assert_eq!(os.resize(child, size), Err(Errno::NOTTY));
}

#[test]
fn signals_reach_the_whole_group() {
    let mut os = boot();
    let child =
        os.spawn(&spec(&["sh", "-c", "sleep 100 & sleep 100 | sleep 100; echo no"])).unwrap();
    os.run(1000);
    assert_eq!(os.process_count(), 4);
    os.signal_group(child.child, 19).unwrap();
    later(&mut os, Duration::from_secs(200));
    assert_eq!(os.run(1000).steps, 0, "a stopped group does not run");
    os.signal_group(child.child, 18).unwrap();
    os.signal_group(child.child, 15).unwrap();
    assert_eq!(os.try_wait(child.child), Some(ChildExit::Signaled(15)));
    assert!(!os.has_processes());
    assert_eq!(os.signal_group(child.child, 15), Err(Errno::SRCH));
}

#[test]
fn orphans_live_on_and_are_reaped() {
    let mut os = boot();
    let child = os.spawn(&spec(&["sh", "-c", "sleep 5 & exit 3"])).unwrap().child;
    os.run(1000);
    assert_eq!(os.try_wait(child), Some(ChildExit::Exited(3)));
    assert_eq!(os.read_output(child, Output::Stdout, 10), Ok(ReadOutcome::WouldBlock));
    os.release(child);
    assert!(os.has_processes());
    later(&mut os, Duration::from_secs(5));
    os.run(1000);
    assert!(!os.has_processes() && os.kernel.processes.is_empty());
    assert!(os.kernel.files.is_empty() && os.kernel.pipes.is_empty(), "nothing is left open");
}

#[test]
fn the_machine_ends_as_it_is_told() {
    let end = |script: &str, ids| {
        let mut os = boot();
        os.spawn(&SpawnSpec { ids, ..spec(&["sh", "-c", script]) }).unwrap();
        os.run(1000);
        (os.is_halted(), os.take_events())
    };
    let (halted, events) = end("echo c > /proc/sysrq-trigger", None);
    assert!(halted && events.contains(&OsEvent::Panic("sysrq triggered crash".into())));
    assert!(matches!(&events[0], OsEvent::Console(line) if line.contains("Kernel panic")));
    assert!(end("poweroff -f; sleep 1", None).1.contains(&OsEvent::PowerOff));
    assert!(end("reboot -f", None).1.contains(&OsEvent::Reboot));
    for refused in ["echo c > /proc/sysrq-trigger", "poweroff -f", "kill -9 1", "kill -9 -1"] {
        assert_eq!(end(refused, Some((1000, 1000))), (false, Vec::new()), "{refused}");
    }
    assert!(!end("kill -9 1", None).0, "no signal reaches the agent");
}

type Fired = Arc<Mutex<Vec<OsFault>>>;

struct Once {
    fault: Option<OsFault>,
    fired: Fired,
}

impl OsFaults for Once {
    fn on_syscall(&mut self, call: &SysCall<'_>) -> Option<OsFault> {
        self.fault.filter(|fault| fault.applies_to(call))
    }

    fn fired(&mut self, _: &SysCall<'_>, fault: OsFault) {
        self.fault = None;
        self.fired.lock().unwrap().push(fault);
    }
}

fn with_fault(fault: OsFault) -> (SimOs, Fired) {
    let (mut os, fired) = (boot(), Fired::default());
    os.set_faults(Some(Box::new(Once { fault: Some(fault), fired: Arc::clone(&fired) })));
    (os, fired)
}

#[test]
fn faults_take_effect_where_they_belong_and_are_told() {
    for fault in [
        OsFault::Fail(Errno::AGAIN),
        OsFault::Kill(11),
        OsFault::OomKill,
        OsFault::CutOutput(2),
        OsFault::Hang,
    ] {
        let (mut os, fired) = with_fault(fault);
        let started = os.spawn(&spec(&["sh", "-c", "echo hello; exit 5"]));
        match fault {
            OsFault::Fail(errno) => assert_eq!(started.unwrap_err(), errno),
            OsFault::Hang => {
                let child = started.unwrap().child;
                assert_eq!(os.run(100).steps, 0);
                os.signal_group(child, 9).unwrap();
                assert_eq!(os.try_wait(child), Some(ChildExit::Signaled(9)));
            }
            fault => {
                let end = finish(&mut os, started.unwrap().child);
                let expected = match fault {
                    OsFault::Kill(signal) => ("", -i32::from(signal)),
                    OsFault::OomKill => ("", -9),
                    _ => ("he", 5),
                };
                assert_eq!((end.stdout.as_str(), end.status), expected);
            }
        }
        assert_eq!(*fired.lock().unwrap(), [fault]);
    }
    let (mut os, fired) = with_fault(OsFault::Slow(Duration::from_secs(3)));
    assert_eq!(sh(&mut os, "cat /etc/group > /dev/null; echo x"), ran("x\n", "", 0));
    assert_eq!(os.take_agent_delay(), Duration::from_secs(3));
    assert_eq!(fired.lock().unwrap().len(), 1);
}

/// A program that answers each line with its number, and allocates and forks on request.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Counter {
    lines: u32,
    hog: u64,
}

impl GuestProgram for Counter {
    fn step(&mut self, sys: &mut Syscalls<'_>) -> Step {
        if self.hog > 0 {
            let _ = sys.set_memory(self.hog);
            return Step::Exit(7);
        }
        match sys.read(0, 100) {
            Err(Errno::AGAIN) => Step::Block(WaitFor::readable(0).or_child()),
            Ok(bytes) if bytes.is_empty() => {
                let child = ChildSpec::new("/bin/echo", vec!["echo".into(), "bye".into()]);
                if sys.spawn(child).is_err() { Step::Exit(1) } else { Step::Exit(0) }
            }
            Ok(bytes) => {
                self.lines += bytes.iter().map(|byte| u32::from(*byte == b'\n')).sum::<u32>();
                match sys.write(1, format!("{}\n", self.lines)) {
                    Ok(_) => Step::Continue,
                    Err(_) => Step::Exit(1),
                }
            }
            Err(_) => Step::Exit(1),
        }
    }
}

#[test]
fn registered_programs_run_are_saved_and_must_be_known() {
    let mut registry = ProgramRegistry::new();
    registry.register("/opt/counter", |argv| Counter {
        lines: 0,
        hog: argv.get(1).and_then(|text| text.parse().ok()).unwrap_or(0),
    });
    let registry = Arc::new(registry);
    let mut os = SimOs::new(super::config(), Arc::clone(&registry)).unwrap();
    let counter = SpawnSpec { path: "/opt/counter".into(), stdin: true, ..spec(&["counter"]) };
    let child = os.spawn(&counter).unwrap().child;
    os.write_stdin(child, b"a\nb\n").unwrap();
    os.run(100);
    let mut again = SimOs::load(&os.save().unwrap(), registry.clone()).unwrap();
    for os in [&mut os, &mut again] {
        os.write_stdin(child, b"c\n").unwrap();
        os.close_stdin(child);
        assert_eq!(finish(os, child), ran("2\n3\nbye\n", "", 0));
    }
    let bytes = os.save().unwrap();
    let unknown = SimOs::load(&bytes, Arc::new(ProgramRegistry::new()));
    assert!(
        matches!(unknown, Err(crate::guest::LoadError::UnknownProgram(path)) if path == "/opt/counter")
    );
    let hog = SpawnSpec { path: "/opt/counter".into(), ..spec(&["counter", "999999999999"]) };
    assert_eq!(run(&mut os, &hog).unwrap().status, -9);
    assert!(
        os.take_events()
            .iter()
            .any(|it| matches!(it, OsEvent::Console(line) if line.contains("Out of memory")))
    );
}

#[test]
fn processes_are_limited() {
    let config = OsConfig { max_processes: 3, ..super::config() };
    let mut os = SimOs::new(config, Arc::new(ProgramRegistry::new())).unwrap();
    let sleep = spec(&["sleep", "9"]);
    let first = os.spawn(&sleep).unwrap();
    for _ in 0..2 {
        os.spawn(&sleep).unwrap();
    }
    assert_eq!(os.spawn(&sleep).unwrap_err(), Errno::AGAIN);
    os.signal_group(first.child, 9).unwrap();
    os.try_wait(first.child);
    os.spawn(&sleep).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn bytes_go_through_a_pipeline_whole(
        bytes in proptest::collection::vec(any::<u8>(), 0..300_000),
        piece in 1_usize..70_000,
        budget in 1_u32..200,
        stages in 1_usize..4,
    ) {
        let mut os = boot();
        let script = vec!["cat"; stages].join(" | ");
        let child =
            os.spawn(&SpawnSpec { stdin: true, ..spec(&["sh", "-c", &script]) }).unwrap().child;
        let (mut sent, mut got) = (0, Vec::new());
        loop {
            let end = bytes.len().min(sent + piece);
            if sent < end {
                sent += os.write_stdin(child, &bytes[sent..end]).unwrap();
            }
            if sent == bytes.len() {
                os.close_stdin(child);
            }
            os.run(budget);
            match os.read_output(child, Output::Stdout, piece).unwrap() {
                ReadOutcome::Data(bytes) => got.extend_from_slice(&bytes),
                ReadOutcome::WouldBlock => {}
                ReadOutcome::Eof => break,
            }
        }
        prop_assert!(got == bytes);
    }

    #[test]
    fn no_script_breaks_the_shell(script in "([a-z]{1,3}|[ ;|&<>(){}$'\"`\\\\*?!#=\n0-9-]|if|then|fi|do|done|while|case|esac|for|in|\\$\\(\\(|\\$\\{){0,24}") {
        let mut os = boot();
        if let Ok(started) = os.spawn(&spec(&["sh", "-c", &script])) {
            os.run(2000);
            os.signal_group(started.child, 9).ok();
            os.signal_all(9);
            prop_assert!(!os.has_processes());
        }
    }
}
