//! Running machines that clauses share, because a real one takes seconds to boot.
//!
//! A clause that [shares its machine](crate::clause::Clause::shares_machine) gets a warm one from
//! [`Context::running`](crate::context::Context::running), and must leave it as it found it: Running, with no program
//! left and nothing but its scratch directory changed. That is checked after each use; a machine that is found otherwise
//! breaks the clause that had it, and is not used again.

use crate::{context::Scratch, template::MachineSource};
use futures_core::future::BoxFuture;
use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::runtime::Handle;
use vm_core::env::Env;
use vm_trait::{Capability, ExecRequest, RemoveOptions, VmInstance, VmResult, VmState};

/// How long programs of a clause that has ended may take to be gone.
const SETTLING: Duration = Duration::from_secs(10);

/// How often a machine is looked at meanwhile.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// Looks for what a clause left in a guest beside the agent's own processes and the scratch directory.
pub type Look = dyn Fn(Arc<dyn VmInstance>) -> BoxFuture<'static, Result<(), String>> + Send + Sync;

/// Running machines of default configuration. Clones share them.
#[derive(Clone)]
pub struct WarmPool {
    shared: Arc<Shared>,
}

struct Shared {
    source: MachineSource,
    env: Arc<dyn Env>,
    scratch: Arc<Scratch>,
    look: Arc<Look>,
    most_ready: usize,
    machines: Mutex<Machines>,
}

#[derive(Default)]
struct Machines {
    ready: VecDeque<Arc<dyn VmInstance>>,
    making: usize,
    closed: bool,
}

impl WarmPool {
    /// Makes a pool of machines from `source`, whose tasks run in `env`; `most_ready` of them wait for the next clauses. The
    /// first are made with the first use.
    #[must_use]
    pub fn new(
        source: MachineSource,
        env: Arc<dyn Env>,
        scratch: Arc<Scratch>,
        look: Arc<Look>,
        most_ready: usize,
    ) -> Self {
        let machines = Mutex::default();
        Self { shared: Arc::new(Shared { source, env, scratch, look, most_ready, machines }) }
    }

    /// Takes a running machine, and makes one where none is ready.
    ///
    /// # Errors
    /// The backend's.
    pub async fn take(&self) -> VmResult<Arc<dyn VmInstance>> {
        let ready = self.shared.lock().ready.pop_front();
        let taken = match ready {
            // One may have died while it waited.
            Some(vm) if vm.state() == VmState::Running => Ok(vm),
            _ => self.shared.source.running().await,
        };
        self.refill();
        taken
    }

    /// Takes a machine back after a clause, if it is as it was.
    ///
    /// # Errors
    /// What the clause left, for people.
    pub async fn give_back(&self, vm: Arc<dyn VmInstance>) -> Result<(), String> {
        self.shared.settled(&vm).await?;
        let mut machines = self.shared.lock();
        if machines.ready.len() < self.shared.most_ready && !machines.closed {
            machines.ready.push_back(vm);
        }
        Ok(())
    }

    /// Ends all machines that wait, and keeps none from now on.
    pub fn close(&self) {
        let mut machines = self.shared.lock();
        machines.closed = true;
        let ended = std::mem::take(&mut machines.ready);
        drop(machines);
        drop(ended);
    }

    /// Makes machines ahead, beside what goes on.
    fn refill(&self) {
        loop {
            let mut machines = self.shared.lock();
            let enough = machines.ready.len() + machines.making >= self.shared.most_ready;
            if machines.closed || enough {
                return;
            }
            machines.making += 1;
            drop(machines);
            let shared = self.shared.clone();
            let make = async move {
                // A machine that does not come up is seen by the clause that then makes one itself.
                let made = shared.source.running().await;
                let mut machines = shared.lock();
                machines.making -= 1;
                if let Ok(vm) = made
                    && !machines.closed
                {
                    machines.ready.push_back(vm);
                }
            };
            self.shared.env.spawn("warm machine", Box::pin(make));
        }
    }
}

impl Shared {
    /// Waits until nothing of a clause is left in the guest, and clears the scratch directory.
    async fn settled(&self, vm: &Arc<dyn VmInstance>) -> Result<(), String> {
        let deadline = self.env.now() + SETTLING;
        loop {
            match self.look_at(vm).await {
                Ok(()) => break,
                Err(left) if self.env.now() >= deadline => return Err(left),
                Err(_) => self.env.sleep(LOOK_PAUSE).await,
            }
        }
        self.clear_scratch(vm).await
    }

    async fn look_at(&self, vm: &Arc<dyn VmInstance>) -> Result<(), String> {
        match vm.state() {
            VmState::Running => {}
            state => return Err(format!("it is {state}")),
        }
        let processes = vm.processes().await.map_err(|error| error.to_string())?;
        let running: Vec<_> = processes.iter().filter(|process| process.status.is_none()).collect();
        if !running.is_empty() {
            return Err(format!("programs run on: {running:?}"));
        }
        (self.look)(vm.clone()).await
    }

    async fn clear_scratch(&self, vm: &Arc<dyn VmInstance>) -> Result<(), String> {
        if !vm.capabilities().has(Capability::Files) {
            return Ok(());
        }
        let scratch = (self.scratch)(&**vm);
        let left = vm.list_dir(&scratch).await.map_err(|error| error.to_string())?;
        let mut stubborn = false;
        for entry in left {
            let path = format!("{scratch}/{}", entry.name);
            stubborn |= vm.remove(&path, RemoveOptions { recursive: true }).await.is_err();
        }
        if !stubborn {
            return Ok(());
        }
        // Names that are not UTF-8 can only be removed by programs.
        let script = "cd \"$1\" && rm -rf -- * .[!.]* ..?*";
        let request = ExecRequest::new("sh").args(["-c", script, "sh", &scratch]);
        vm.exec(request).await.map_err(|error| error.to_string())?;
        let left = vm.list_dir(&scratch).await.map_err(|error| error.to_string())?;
        if left.is_empty() { Ok(()) } else { Err(format!("{scratch} cannot be cleared: {left:?}")) }
    }

    fn lock(&self) -> MutexGuard<'_, Machines> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for WarmPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machines = self.shared.lock();
        f.debug_struct("WarmPool")
            .field("ready", &machines.ready.len())
            .field("making", &machines.making)
            .finish_non_exhaustive()
    }
}

/// An environment whose tasks and timers belong to one runtime, wherever they are asked for.
#[derive(Debug)]
pub struct HandleEnv {
    inner: Arc<dyn Env>,
    handle: Handle,
}

impl HandleEnv {
    /// Puts `inner` into the runtime of `handle`.
    #[must_use]
    pub fn new(inner: Arc<dyn Env>, handle: Handle) -> Self {
        Self { inner, handle }
    }
}

impl Env for HandleEnv {
    fn now(&self) -> Duration {
        self.inner.now()
    }

    fn wall_clock(&self) -> Duration {
        self.inner.wall_clock()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let _inside = self.handle.enter();
        self.inner.sleep(duration)
    }

    fn spawn(&self, name: &'static str, task: BoxFuture<'static, ()>) {
        let _inside = self.handle.enter();
        self.inner.spawn(name, task);
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        self.inner.fill_random(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_sim::SimBackend;
    use vm_trait::{VmInstanceExt, WriteOptions};

    fn pool() -> (WarmPool, SimBackend) {
        let backend = SimBackend::builder().seed(7).build().unwrap();
        let pool = WarmPool::new(
            MachineSource::Boot(Arc::new(backend.clone())),
            backend.env(),
            Arc::new(|_| "/tmp".to_owned()),
            Arc::new(|_| Box::pin(async { Ok(()) })),
            2,
        );
        (pool, backend)
    }

    #[tokio::test(start_paused = true)]
    async fn machines_are_ready_cleared_and_used_again() {
        let (pool, backend) = pool();
        let vm = pool.take().await.unwrap();
        vm.write_file("/tmp/left", "x".into(), WriteOptions::default()).await.unwrap();
        vm.sh("mkdir -p /tmp/a/b; echo x >/tmp/a/b/c").await.unwrap();
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(pool.shared.lock().ready.len(), 2, "booted ahead");
        let (id, other) = (vm.id(), pool.take().await.unwrap());
        pool.give_back(vm).await.unwrap();
        let mut again = Vec::new();
        for _ in 0..2 {
            again.push(pool.take().await.unwrap());
        }
        let again = again.into_iter().find(|vm| vm.id() == id).expect("it is used again");
        assert!(again.list_dir("/tmp").await.unwrap().is_empty());
        drop((other, again));
        pool.close();
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(backend.ledger().leftovers().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn unclean_machines_are_refused() {
        let (pool, _backend) = pool();
        let paused = pool.take().await.unwrap();
        paused.pause().await.unwrap();
        assert!(pool.give_back(paused).await.unwrap_err().contains("paused"));
        let busy = pool.take().await.unwrap();
        let program = busy.spawn(ExecRequest::new("sleep").arg("1000")).await.unwrap();
        assert!(pool.give_back(busy.clone()).await.unwrap_err().contains("sleep"));
        drop(program);
        pool.give_back(busy).await.unwrap();
        let dead = pool.take().await.unwrap();
        dead.kill().await.unwrap();
        assert!(pool.give_back(dead).await.is_err());
    }
}
