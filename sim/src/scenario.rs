//! Runs to measure by: what a user's test does all day, every result checked and the trace on.
//!
//! Each runs in the runtime that is current, which should be a fresh one for each seed.

use crate::{
    FaultPlan, SimBackend, Timeline,
    rng::{scale, stream},
};
use bytes::Bytes;
use rand_chacha::{ChaCha20Rng, rand_core::Rng};
use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};
use vm_core::env::Env;
use vm_trait::{
    ExecRequest, ExecStatus, ForkOptions, RestoreOptions, SnapshotOptions, StopOptions, VmBackend,
    VmConfig, VmError, VmInstance, VmState, WriteOptions,
};

/// Where the scenario keeps its files.
const DIR: &str = "/tmp";
/// The stream of a seed that operations are drawn from.
const DRAWS: u64 = 1 << 40;

/// What a run came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// The hash of everything that happened.
    pub fingerprint: u128,
    /// How many events it is made of.
    pub events: u64,
    /// How often anybody waited for a timer.
    pub timers: u64,
    /// How long it took in virtual time.
    pub virtual_time: Duration,
}

/// A run that did not go as it should.
#[derive(Debug)]
pub struct Mismatch(String);

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Mismatch {}

impl From<VmError> for Mismatch {
    fn from(error: VmError) -> Self {
        Self(error.to_string())
    }
}

/// Draws `operations` operations on a machine, carries them out, and checks each result against a model.
///
/// # Errors
/// [`Mismatch`] where a result was not the model's, or something was left on the host.
pub async fn mixed(seed: u64, operations: u32) -> Result<Outcome, Mismatch> {
    let sim = build(seed)?;
    let vm = sim.create(VmConfig::default()).await?;
    vm.start().await?;
    let rng = stream(seed, DRAWS);
    let mut run = Run { sim: &sim, vm, rng, files: BTreeMap::new() };
    for _ in 0..operations {
        run.operation().await?;
    }
    run.vm.stop(StopOptions::default()).await?;
    drop(run);
    finish(&sim).await
}

/// Keeps a machine for a virtual day in which next to nothing happens.
///
/// # Errors
/// As [`mixed`].
pub async fn idle(seed: u64) -> Result<Outcome, Mismatch> {
    let sim = build(seed)?;
    let vm = sim.create(VmConfig::default()).await?;
    vm.start().await?;
    let sleeper = vm.spawn(ExecRequest::new("sleep").arg("86400")).await?;
    for _ in 0..24 {
        sim.env().sleep(Duration::from_secs(3600)).await;
        vm.ping().await?;
    }
    let status = sleeper.wait().await?;
    check(status == ExecStatus::Exited(0), || format!("the sleeper ended with {status:?}"))?;
    vm.stop(StopOptions::default()).await?;
    drop((sleeper, vm));
    finish(&sim).await
}

/// Waits for as many timers as a scenario did, with four tasks and nothing else: what the scenario is compared to.
#[cfg(madsim)]
pub async fn bare_madsim(timers: u64) {
    const TASKS: u64 = 4;
    let wait = |count: u64| async move {
        for _ in 0..count {
            madsim::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let tasks: Vec<_> = (1..TASKS).map(|_| madsim::task::spawn(wait(timers / TASKS))).collect();
    wait(timers - timers / TASKS * (TASKS - 1)).await;
    for task in tasks {
        let _ = task.await;
    }
}

struct Run<'a> {
    sim: &'a SimBackend,
    vm: Arc<dyn VmInstance>,
    rng: ChaCha20Rng,
    /// What the guest's files hold.
    files: BTreeMap<String, Bytes>,
}

impl Run<'_> {
    async fn operation(&mut self) -> Result<(), Mismatch> {
        match self.below(50) {
            0..14 => self.exec().await,
            14..23 => self.write().await,
            23..32 => self.read().await,
            32..37 => self.vm.ping().await.map(drop).map_err(Into::into),
            37..41 => self.stat().await,
            41..44 => self.list().await,
            44..46 => self.pause().await,
            46..48 => self.stream().await,
            48 if self.below(2) == 0 => self.restart().await,
            48 => self.fork().await,
            _ => self.snapshot().await,
        }
    }

    async fn exec(&mut self) -> Result<(), Mismatch> {
        let word = format!("{:x}", self.rng.next_u64());
        let output = self.vm.exec(ExecRequest::new("echo").arg(word.clone())).await?;
        check(output.status.success() && output.stdout == format!("{word}\n"), || {
            format!("echo {word} gave {output:?}")
        })
    }

    async fn write(&mut self) -> Result<(), Mismatch> {
        let path = self.path();
        let content = self.bytes();
        self.vm.write_file(&path, content.clone(), WriteOptions::default()).await?;
        self.files.insert(path, content);
        Ok(())
    }

    async fn read(&mut self) -> Result<(), Mismatch> {
        let path = self.path();
        let got = self.vm.read_file(&path).await.ok();
        check(got.as_ref() == self.files.get(&path), || format!("{path} holds {got:?}"))
    }

    async fn stat(&mut self) -> Result<(), Mismatch> {
        let path = self.path();
        let got = self.vm.stat(&path).await.ok().map(|stat| stat.size);
        let wanted = self.files.get(&path).map(|content| content.len() as u64);
        check(got == wanted, || format!("{path} has {got:?} bytes, wanted {wanted:?}"))
    }

    async fn list(&mut self) -> Result<(), Mismatch> {
        let listed = self.vm.list_dir(DIR).await?;
        let names = listed.iter().map(|entry| format!("{DIR}/{}", entry.name));
        check(names.eq(self.files.keys().cloned()), || format!("{DIR} holds {listed:?}"))
    }

    async fn pause(&mut self) -> Result<(), Mismatch> {
        self.vm.pause().await?;
        let refused = self.vm.ping().await.is_err();
        check(refused && self.vm.state() == VmState::Paused, || "a paused VM answered".to_owned())?;
        Ok(self.vm.resume().await?)
    }

    /// Sends bytes through a program and reads them back while it runs.
    async fn stream(&mut self) -> Result<(), Mismatch> {
        let process = self.vm.spawn(ExecRequest::new("cat").open_stdin()).await?;
        let sent = self.bytes();
        process.write_stdin(sent.clone()).await?;
        process.close_stdin().await?;
        let mut got = Vec::new();
        while let Some(bytes) = process.read_stdout().await? {
            got.extend_from_slice(&bytes);
        }
        let status = process.wait().await?;
        check(got == sent && status.success(), || format!("cat gave {got:?}, {status:?}"))
    }

    async fn restart(&mut self) -> Result<(), Mismatch> {
        self.vm.stop(StopOptions::default()).await?;
        check(self.vm.state() == VmState::Stopped, || "stop did not stop".to_owned())?;
        self.files.clear();
        Ok(self.vm.start().await?)
    }

    /// Takes a child's place in half of the cases.
    async fn fork(&mut self) -> Result<(), Mismatch> {
        let children = self.vm.fork(ForkOptions::new(2)).await?;
        for child in children {
            let child = child?;
            child
                .write_file("/tmp/own", Bytes::from_static(b"child"), WriteOptions::default())
                .await?;
            let seen = self.vm.stat("/tmp/own").await.is_ok();
            check(!seen, || "a child's write is seen in its source".to_owned())?;
            child.kill().await?;
        }
        Ok(())
    }

    /// Goes on in a machine made from a snapshot.
    async fn snapshot(&mut self) -> Result<(), Mismatch> {
        let snapshot = self.vm.snapshot(SnapshotOptions::default()).await?;
        let twin = self.sim.restore(&snapshot, RestoreOptions::running()).await?;
        self.sim.delete_snapshot(&snapshot).await?;
        self.vm.kill().await?;
        self.vm = twin;
        Ok(())
    }

    fn below(&mut self, bound: u64) -> u64 {
        scale(self.rng.next_u64(), bound)
    }

    fn path(&mut self) -> String {
        format!("{DIR}/{}", self.below(4))
    }

    fn bytes(&mut self) -> Bytes {
        let length = usize::try_from(self.below(512)).unwrap_or(0);
        let mut bytes = vec![0; length];
        self.rng.fill_bytes(&mut bytes);
        bytes.into()
    }
}

fn build(seed: u64) -> Result<SimBackend, Mismatch> {
    let builder = SimBackend::builder().seed(seed).faults(FaultPlan::none());
    builder.timeline(Timeline::Off).build().map_err(|error| Mismatch(error.to_string()))
}

/// Checks that nothing is left, and gives what the run came to.
async fn finish(sim: &SimBackend) -> Result<Outcome, Mismatch> {
    let virtual_time = sim.env().now();
    for _ in 0..10 {
        if sim.ledger().is_clear() {
            break;
        }
        sim.env().sleep(Duration::from_millis(1)).await;
    }
    let ledger = sim.ledger();
    check(ledger.is_clear(), || format!("left on the host: {ledger}"))?;
    Ok(Outcome {
        fingerprint: sim.fingerprint(),
        events: sim.events(),
        timers: sim.env().timers_begun(),
        virtual_time,
    })
}

fn check(holds: bool, what: impl FnOnce() -> String) -> Result<(), Mismatch> {
    if holds { Ok(()) } else { Err(Mismatch(what())) }
}
