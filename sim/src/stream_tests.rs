//! Streams to programs of the user's own, and console files on a small host.

use crate::{
    GuestProgram, ProgramRegistry, SimBackend, SimHostLimits,
    guest::{Step, Syscalls, WaitFor},
};
use bytes::Bytes;
use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use std::{future::Future, path::Path};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vm_core::host_fs::HostFs;
use vm_guest_agent::os::Errno;
use vm_trait::{
    ExecRequest, RestoreOptions, SnapshotOptions, VmBackend, VmConfig, VmInstanceExt, VmState,
};

const PORT: u32 = 7_000;

fn in_tokio<F: Future>(run: F) -> F::Output {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true).build().unwrap().block_on(run)
}

/// Adds the bytes that it is sent, and answers with the sum; one connection at a time.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Adder {
    listener: Option<u32>,
    stream: Option<u32>,
    sum: u64,
}

impl GuestProgram for Adder {
    fn step(&mut self, sys: &mut Syscalls<'_>) -> Step {
        let Some(listener) = self.listener else {
            self.listener = sys.vsock_listen(PORT).ok();
            return if self.listener.is_some() { Step::Continue } else { Step::Exit(1) };
        };
        let Some(stream) = self.stream else {
            self.stream = match sys.accept(listener) {
                Ok(stream) => Some(stream),
                Err(Errno::AGAIN) => return Step::Block(WaitFor::readable(listener)),
                Err(_) => return Step::Exit(2),
            };
            return Step::Continue;
        };
        match sys.read(stream, 4096) {
            Ok(bytes) if !bytes.is_empty() => {
                self.sum += bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>();
                let answer = Bytes::copy_from_slice(&self.sum.to_le_bytes());
                if sys.write(stream, answer).is_ok() {
                    return Step::Continue;
                }
            }
            Err(Errno::AGAIN) => return Step::Block(WaitFor::readable(stream)),
            _ => {}
        }
        let _ = sys.close(stream);
        self.stream = None;
        Step::Continue
    }
}

async fn ask(vm: &dyn vm_trait::VmInstance, number: u8) -> u64 {
    let mut stream = vm.connect(PORT).await.unwrap();
    stream.write_all(&[number]).await.unwrap();
    let mut sum = [0; 8];
    stream.read_exact(&mut sum).await.unwrap();
    u64::from_le_bytes(sum)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_program_and_its_listener_survive_a_snapshot(seed in any::<u64>(), one in 1_u8.., two in 1_u8.., three in 1_u8..) {
        let (one_sum, two_sum, three_sum) = in_tokio(async {
            let mut programs = ProgramRegistry::new();
            programs.register("/bin/adder", |_| Adder::default());
            let sim = SimBackend::builder().seed(seed).programs(programs).build().unwrap();
            let vm = sim.create(VmConfig::default()).await.unwrap();
            vm.start().await.unwrap();
            let _adder = vm.spawn(ExecRequest::new("adder")).await.unwrap();
            let first = ask(&*vm, one).await;
            // One that is open when the snapshot is taken is gone in the copy.
            let _open = vm.connect(PORT).await.unwrap();
            let snapshot = vm.snapshot(SnapshotOptions::default()).await.unwrap();
            let twin = sim.restore(&snapshot, RestoreOptions::running()).await.unwrap();
            let second = ask(&*twin, two).await;
            (first, second, ask(&*twin, three).await)
        });
        let (one, two, three) = (u64::from(one), u64::from(two), u64::from(three));
        prop_assert_eq!((one_sum, two_sum, three_sum), (one, one + two, one + two + three));
    }

    #[test]
    fn a_full_host_keeps_the_beginning_of_a_console(seed in any::<u64>(), room in 0_u64..4_000) {
        in_tokio(async {
            let limits = SimHostLimits::default().with_disk_bytes(room);
            let sim = SimBackend::builder().seed(seed).host(limits).build().unwrap();
            let fs = sim.host().fs();
            fs.create_dir_all(Path::new("/logs")).await.unwrap();
            let path = Path::new("/logs/console");
            let config = VmConfig::builder().with_console_file(path).build().unwrap();
            let vm = sim.create(config).await.unwrap();
            vm.start().await.unwrap();
            for _ in 0..20 {
                vm.sh("echo 0123456789012345678901234567890123456789 > /dev/console").await.unwrap();
            }
            assert_eq!(vm.state(), VmState::Running);
            let console = vm.console();
            vm.kill().await.unwrap();
            let file = fs.open(path).await.unwrap();
            let size = usize::try_from(file.size().await.unwrap()).unwrap();
            let kept = file.read_at(0, size).await.unwrap();
            assert_eq!(size, console.len().min(usize::try_from(room).unwrap()));
            assert_eq!(kept, console[..size]);
        });
    }
}
