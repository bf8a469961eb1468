//! Tests of the whole operating system.

mod boundary;
mod files;
mod scripts;
mod shares;
mod state;
mod timing;

use super::{DiskSetup, OsConfig, ProgramRegistry, SimOs};
use std::{sync::Arc, time::Duration};
use vm_guest_agent::os::{Child, ChildExit, GuestOs, Output, ReadOutcome, SpawnSpec, SysResult};

pub(super) fn config() -> OsConfig {
    OsConfig {
        memory: 128 << 20,
        vcpus: 2,
        hostname: "guest".to_owned(),
        seed: [7; 32],
        max_processes: 256,
        disks: Vec::new(),
        shares: Vec::new(),
        host_loopback: false,
    }
}

pub(super) fn boot() -> SimOs {
    boot_with(Vec::new())
}

pub(super) fn boot_with(disks: Vec<DiskSetup>) -> SimOs {
    let config = OsConfig { disks, ..config() };
    SimOs::new(config, Arc::new(ProgramRegistry::new())).unwrap()
}

pub(super) fn spec(argv: &[&str]) -> SpawnSpec {
    SpawnSpec {
        path: format!("/bin/{}", argv[0]),
        argv: argv.iter().map(ToString::to_string).collect(),
        env: vec![("PATH".to_owned(), "/bin:/usr/bin:/sbin".to_owned())],
        cwd: "/".to_owned(),
        ids: None,
        tty: None,
        stdin: false,
        limits: Vec::new(),
    }
}

/// What a program left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ran {
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) status: i32,
}

pub(super) fn drain(os: &mut SimOs, child: Child, output: Output) -> Vec<u8> {
    let mut all = Vec::new();
    while let Ok(ReadOutcome::Data(bytes)) = os.read_output(child, output, 64 << 10) {
        all.extend_from_slice(&bytes);
    }
    all
}

/// Runs a started program to its end, the clock jumping to whatever it waits for.
pub(super) fn finish(os: &mut SimOs, child: Child) -> Ran {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    for _ in 0..100_000 {
        let report = os.run(1000);
        stdout.extend(drain(os, child, Output::Stdout));
        stderr.extend(drain(os, child, Output::Stderr));
        if let Some(exit) = os.try_wait(child) {
            os.release(child);
            let status = match exit {
                ChildExit::Exited(code) => i32::from(code),
                ChildExit::Signaled(signal) => -i32::from(signal),
            };
            let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
            return Ran { stdout: text(stdout), stderr: text(stderr), status };
        }
        if report.steps == 0 {
            let next = os.next_wakeup().expect("the program waits for nothing that can come");
            os.set_monotonic(next);
        }
    }
    panic!("the program does not end");
}

pub(super) fn run(os: &mut SimOs, spec: &SpawnSpec) -> SysResult<Ran> {
    let spawned = os.spawn(spec)?;
    Ok(finish(os, spawned.child))
}

pub(super) fn sh(os: &mut SimOs, script: &str) -> Ran {
    run(os, &spec(&["sh", "-c", script])).unwrap()
}

pub(super) fn later(os: &mut SimOs, time: Duration) {
    let now = os.monotonic();
    os.set_monotonic(now + time);
}
