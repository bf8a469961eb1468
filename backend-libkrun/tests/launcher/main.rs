//! The launcher as a process, as far as it comes without a machine that runs; and networks of machines that do.
#![cfg(any(feature = "vendored", feature = "system"))]

mod network;
mod passt;

use std::{
    fs::File,
    future::Future,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};
use vm_backend_libkrun::{
    LAUNCHER, LauncherProgram,
    control::{ConsoleDevice, MachineSetUp, Request, ToLauncher},
};
use vm_core::machine::{Machine, MachineError, MachineExit, MachineSpec, MachineStatus};
use vm_guest_protocol::AGENT_PORT;
use vm_launcher::{life::Life, machine::LauncherMachine, ring::ConsoleRing};
use vm_trait::VmId;

const SOON: Duration = Duration::from_secs(30);

const RING: u32 = 4096;

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(SOON, test).await.expect("it hangs") });
}

async fn begin() -> (Arc<Life>, OwnedFd) {
    let program = LauncherProgram::at(&LAUNCHER, env!("CARGO_BIN_EXE_vm-krun-launcher")).unwrap();
    let ring = ConsoleRing::new(RING).unwrap();
    let ring_file = ring.file().try_clone_to_owned().unwrap();
    (Life::begin(program.start(&LAUNCHER).unwrap(), ring).await.unwrap(), ring_file)
}

fn set_up(cmdline: &str) -> ToLauncher {
    ToLauncher::SetUp(Box::new(MachineSetUp {
        name: "test".to_owned(),
        vcpus: 1,
        memory_mib: 64,
        cmdline: cmdline.to_owned(),
        devices_in_cmdline: true,
        console_device: ConsoleDevice::SerialPort,
        initrd_parts: 1,
        console_ring_bytes: RING,
        console_file: false,
        console_file_limit: 0,
        disks: Vec::new(),
        shares: Vec::new(),
        vsock_cid: 3,
        network: vm_trait::NetworkConfig::None,
        passt: None,
    }))
}

/// Has a machine made of a kernel that is none.
async fn made() -> LauncherMachine {
    let (life, ring) = begin().await;
    let none = File::open("/etc/passwd").unwrap();
    life.set_up(&set_up("quiet"), &[none.as_fd(), none.as_fd(), ring.as_fd()]).await.unwrap();
    let spec = MachineSpec { vm: VmId(1), life: 1, config: Arc::default(), loads: false };
    LauncherMachine::new(&spec, life, &Arc::default())
}

#[test]
fn what_libkrun_refuses_is_told_by_the_name_of_the_call() {
    run(async {
        let machine = made().await;
        assert_eq!(machine.status().await, Ok(MachineStatus::Fresh));
        // The child may have ended before the answer is read.
        let _ = machine.boot().await;
        let MachineExit::Failed(why) = machine.wait().await else { panic!("it runs") };
        assert!(why.contains("krun_start_enter failed"), "{why}");
        assert_eq!(machine.status().await, Ok(MachineStatus::Ended));
        let console = String::from_utf8_lossy(&machine.console()).into_owned();
        assert!(console.contains("krun_start_enter"), "{console}");
    });
}

#[test]
fn what_it_cannot_do_is_refused_as_unsupported() {
    run(async {
        let machine = made().await;
        let unsupported = |error: MachineError| matches!(error, MachineError::Unsupported(_));
        assert!(machine.connect(5).await.err().is_some_and(unsupported));
        assert!(machine.listen(5).await.err().is_some_and(unsupported));
        assert!(machine.inspect().await.err().is_some_and(unsupported));
        assert_eq!(machine.connect(AGENT_PORT).await.err(), Some(MachineError::NotListening));
        assert!(machine.pause().await.is_err() && machine.resume().await.is_err());
        machine.kill().await.unwrap();
        assert_eq!(machine.wait().await, MachineExit::Killed);
    });
}

#[test]
fn set_ups_that_make_no_sense_are_refused_with_their_field() {
    run(async {
        let file = File::open("/etc/passwd").unwrap();
        for (cmdline, files, field) in [
            ("quiet -- hidden", 2, "cmdline"),
            ("a=\"b", 2, "cmdline"),
            ("quiet", 0, "kernel"),
            ("quiet", 1, "initrd"),
        ] {
            let (life, ring) = begin().await;
            let mut fds = vec![file.as_fd(); files];
            if files == 2 {
                fds.push(ring.as_fd());
            }
            let refused = life.set_up(&set_up(cmdline), &fds).await.unwrap_err();
            let named = matches!(&refused, MachineError::Config { field: of, .. } if of == field);
            assert!(named, "{cmdline:?}, {files}: {refused}");
            life.ended().await;
        }
    });
}

#[test]
fn a_machine_is_described_once_and_before_anything_else() {
    run(async {
        let (life, _ring) = begin().await;
        assert_eq!(life.request(Request::Boot, &[]).await, Err(MachineError::Ended));
        let MachineExit::Failed(why) = life.ended().await else { panic!("it ended well") };
        assert!(why.contains("description"), "{why}");
    });
}
