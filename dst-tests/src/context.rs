//! What a check has at hand.

use crate::{
    clause::{Broken, Verdict},
    history::Assignment,
    host_network::{HostListener, HostNetwork},
    pool::WarmPool,
    target::Run,
    template::Template,
};
use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use std::{
    collections::BTreeSet,
    fmt,
    future::Future,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::oneshot;
use vm_core::{
    env::{Env, timeout},
    fault::{FaultControl, FaultKind, FaultOrder},
    host_fs::HostFs,
    machine::Link,
};
use vm_trait::{Capabilities, Capability, VmBackend, VmConfig, VmInstance, VmResult};

/// A backend, opened for one run of one clause.
#[derive(Clone)]
pub struct Setup {
    /// The backend.
    pub backend: Arc<dyn VmBackend>,
    /// Its clock, tasks and randomness.
    pub env: Arc<dyn Env>,
    /// How faults are made to happen, where they can be.
    pub faults: Option<Arc<dyn FaultControl>>,
    /// Gives a directory of the guest that a check may write in, without a slash at its end.
    pub scratch: Arc<Scratch>,
    /// A directory of the host that exists, for snapshots and disks that a check names itself. What it holds at the end
    /// is no leftover.
    pub host_dir: PathBuf,
    /// The file system in which that directory is.
    pub host_fs: Arc<dyn HostFs>,
    /// Fills a directory of that host, which is not there yet, with the root files of a guest.
    pub guest_root: Arc<GuestRoot>,
    /// The loopback ports of that host.
    pub host_network: Arc<dyn HostNetwork>,
    /// Lists what is left on the host once every handle is dropped; empty where nothing is. It is asked again for a
    /// while before what it says is held against the backend.
    pub leftovers: Arc<dyn Fn() -> Vec<String> + Send + Sync>,
    /// Running machines to share, where the clause [may](crate::clause::Clause::shares_machine).
    pub warm: Option<WarmPool>,
    /// What running machines of default configuration are forked from, where that is quicker than booting them.
    pub template: Option<Template>,
}

/// Gives a directory of a guest.
pub type Scratch = dyn Fn(&dyn VmInstance) -> String + Send + Sync;

/// Makes a directory of the host that a guest can have as its root.
pub type GuestRoot = dyn Fn(PathBuf) -> BoxFuture<'static, io::Result<()>> + Send + Sync;

/// What a check has at hand: the backend, generated inputs, time and faults.
pub struct Context {
    setup: Setup,
    run: Run,
    rng: Mutex<ChaCha8Rng>,
    borrowed: Mutex<Vec<Arc<dyn VmInstance>>>,
    /// The ports of the host that this run was given.
    ports: Mutex<BTreeSet<u16>>,
}

impl Context {
    /// Makes the context of one run. Inputs are drawn from `seed` and the clause's id.
    #[must_use]
    pub fn new(setup: Setup, run: Run) -> Self {
        // FNV-1a: the same stream on every machine and in every version of Rust.
        let salt = run.clause.id.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let rng = ChaCha8Rng::seed_from_u64(run.seed ^ salt);
        Self {
            setup,
            run,
            rng: Mutex::new(rng),
            borrowed: Mutex::default(),
            ports: Mutex::default(),
        }
    }

    /// Gives the backend.
    #[must_use]
    pub fn backend(&self) -> &dyn VmBackend {
        &*self.setup.backend
    }

    /// Gives the environment.
    #[must_use]
    pub fn env(&self) -> &Arc<dyn Env> {
        &self.setup.env
    }

    /// Gives the seed.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.run.seed
    }

    /// Gives the script that is to be carried out, where one was given.
    #[must_use]
    pub fn assignment(&self) -> Option<&Arc<Assignment>> {
        self.run.assignment.as_ref()
    }

    /// Gives what the backend can do.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.setup.backend.capabilities()
    }

    /// Says whether the backend can do this.
    #[must_use]
    pub fn has(&self, capability: Capability) -> bool {
        self.capabilities().has(capability)
    }

    /// Makes a machine of default configuration, in Created.
    ///
    /// # Errors
    /// The backend's.
    pub async fn created(&self) -> VmResult<Arc<dyn VmInstance>> {
        self.setup.backend.create(VmConfig::default()).await
    }

    /// Makes a machine of default configuration and starts it, or forks one that runs, or takes a warm one that other
    /// clauses had before.
    ///
    /// # Errors
    /// The backend's.
    pub async fn running(&self) -> VmResult<Arc<dyn VmInstance>> {
        if let Some(pool) = &self.setup.warm {
            let vm = pool.take().await?;
            self.borrowed.lock().unwrap_or_else(PoisonError::into_inner).push(vm.clone());
            return Ok(vm);
        }
        self.running_alone().await
    }

    /// Makes a machine of default configuration and starts it, or forks one that runs; no other clause ever has it.
    ///
    /// # Errors
    /// The backend's.
    pub async fn running_alone(&self) -> VmResult<Arc<dyn VmInstance>> {
        if let Some(template) = &self.setup.template {
            return template.running().await;
        }
        let vm = self.created().await?;
        vm.start().await?;
        Ok(vm)
    }

    /// Gives a directory of the guest to write in, without a slash at its end.
    #[must_use]
    pub fn scratch(&self, vm: &dyn VmInstance) -> String {
        (self.setup.scratch)(vm)
    }

    /// Gives a path of the host that no other run uses, for a disk or a snapshot.
    #[must_use]
    pub fn host_path(&self, name: &str) -> PathBuf {
        let unique = self.draw(0, u64::MAX);
        self.setup.host_dir.join(format!("{unique:016x}-{name}"))
    }

    /// Makes a directory of the host, and what it stands in. It is no leftover where
    /// [`host_path`](Self::host_path) named it.
    ///
    /// # Errors
    /// The file system's.
    pub async fn make_host_dir(&self, path: &Path) -> io::Result<()> {
        self.setup.host_fs.create_dir_all(path).await
    }

    /// Makes a directory of the host with the root files of a guest, a shell among them. It is no leftover where
    /// [`host_path`](Self::host_path) named it.
    ///
    /// # Errors
    /// The file system's, and where this host has no such files.
    pub async fn make_guest_root(&self, path: &Path) -> io::Result<()> {
        (self.setup.guest_root)(path.to_path_buf()).await
    }

    /// Reads a whole file of the host.
    ///
    /// # Errors
    /// The file system's.
    pub async fn read_host_file(&self, path: &Path) -> io::Result<Bytes> {
        let file = self.setup.host_fs.open(path).await?;
        let size = file.size().await?;
        let size =
            usize::try_from(size).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        file.read_at(0, size).await
    }

    /// Makes a file of the host that was not there before. It is no leftover where
    /// [`host_path`](Self::host_path) named it.
    ///
    /// # Errors
    /// The file system's.
    pub async fn write_host_file(&self, path: &Path, bytes: Bytes) -> io::Result<()> {
        let aside = path.with_extension("aside");
        let mut file = self.setup.host_fs.create_new(&aside).await?;
        file.write_all(bytes).await?;
        drop(file);
        self.setup.host_fs.rename(&aside, path).await
    }

    /// Finds a loopback port of the host that nobody has, another one each time, and keeps it from other checks of this
    /// program.
    ///
    /// # Errors
    /// [`Broken`] where none can be found.
    pub async fn host_port(&self) -> Result<u16, Broken> {
        const TRIES: u32 = 1_000;
        // Below those that hosts give to their own connections.
        let (low, high) = (10_000, 29_999);
        let network = &self.setup.host_network;
        for _ in 0..TRIES {
            let port = u16::try_from(self.draw(low, high)).unwrap_or(u16::MAX);
            let fresh = self.ports.lock().unwrap_or_else(PoisonError::into_inner).insert(port);
            if fresh && network.reserve(port) && network.listen(port).await.is_ok() {
                return Ok(port);
            }
        }
        Err(Broken::new("no port of the host is free"))
    }

    /// Connects to a loopback port of the host.
    ///
    /// # Errors
    /// The host's.
    pub async fn host_connect(&self, port: u16) -> io::Result<Box<dyn Link>> {
        self.setup.host_network.connect(port).await
    }

    /// Listens on a loopback port of the host, until what it gives is dropped.
    ///
    /// # Errors
    /// The host's.
    pub async fn host_listen(&self, port: u16) -> io::Result<Box<dyn HostListener>> {
        self.setup.host_network.listen(port).await
    }

    /// Draws a number of `low..=high`.
    #[must_use]
    pub fn draw(&self, low: u64, high: u64) -> u64 {
        let span = high.saturating_sub(low).saturating_add(1);
        let number = self.with_rng(Rng::next_u64);
        if span == 0 { number } else { low + number % span }
    }

    /// Draws an index below `length`.
    ///
    /// # Panics
    /// When `length` is 0.
    #[must_use]
    pub fn index(&self, length: usize) -> usize {
        let last = u64::try_from(length).expect("a length").checked_sub(1).expect("not empty");
        usize::try_from(self.draw(0, last)).expect("below a length")
    }

    /// Draws one of `choices`.
    ///
    /// # Panics
    /// When there are none.
    #[must_use]
    pub fn pick<T: Clone>(&self, choices: &[T]) -> T {
        choices[self.index(choices.len())].clone()
    }

    /// Draws true once in `n` times.
    #[must_use]
    pub fn one_in(&self, n: u64) -> bool {
        self.draw(1, n) == 1
    }

    /// Says whether a costly variant is to be checked: once in `n` runs of a simulated host, where runs are many, and
    /// always on a real one, where they are few.
    #[must_use]
    pub fn heavy(&self, n: u64) -> bool {
        !self.is_simulated() || self.one_in(n)
    }

    /// Says whether the host is a simulated one, where booting a machine takes no time: only such a host can be lost on
    /// order.
    #[must_use]
    pub fn is_simulated(&self) -> bool {
        self.can_fault(FaultKind::HostLost)
    }

    /// Gives a span for programs to get something done in: so long where time is simulated, and three times as long on a
    /// real host, which may be slow and has other things to do.
    pub(crate) fn time_to_work(&self, span: Duration) -> Duration {
        if self.is_simulated() { span } else { span * 3 }
    }

    /// Draws `length` bytes.
    #[must_use]
    pub fn bytes(&self, length: usize) -> Bytes {
        let mut bytes = vec![0; length];
        self.with_rng(|rng| rng.fill_bytes(&mut bytes));
        bytes.into()
    }

    /// Draws text of at most `most` characters, of every kind but NUL: spaces, newlines, quotes, other alphabets.
    #[must_use]
    pub fn text(&self, most: u64) -> String {
        const ODD: &[char] = &[
            ' ',
            '\n',
            '\t',
            '\'',
            '"',
            '\\',
            '$',
            '`',
            '*',
            '%',
            ';',
            '&',
            '|',
            '\u{e9}',
            '\u{4e2d}',
            '\u{1f980}',
            '\u{7f}',
            '-',
            '=',
        ];
        let length = self.draw(0, most);
        (0..length)
            .map(|_| if self.one_in(3) { self.pick(ODD) } else { self.pick(&['a', 'B', '7', '_']) })
            .collect()
    }

    /// Gives the time on the backend's clock.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.setup.env.now()
    }

    /// Waits on the backend's clock.
    pub async fn sleep(&self, duration: Duration) {
        self.setup.env.sleep(duration).await;
    }

    /// Waits for `future`, and calls the promise broken if that takes longer than `limit`.
    ///
    /// # Errors
    /// [`Broken`] naming `what`.
    pub async fn within<F: Future>(
        &self,
        limit: Duration,
        what: &str,
        future: F,
    ) -> Result<F::Output, Broken> {
        timeout(&*self.setup.env, limit, future)
            .await
            .map_err(|_| Broken::new(format!("{what} took longer than {limit:?}")))
    }

    /// Runs a task beside the check, and gives a handle to wait for its output.
    pub fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        let (send, receive) = oneshot::channel();
        let task = task.map(|output| {
            let _ = send.send(output);
        });
        self.setup.env.spawn("clause", Box::pin(task));
        Task(receive)
    }

    /// Says whether this kind of fault can be made to happen.
    #[must_use]
    pub fn can_fault(&self, kind: FaultKind) -> bool {
        self.setup.faults.as_ref().is_some_and(|faults| faults.can(kind))
    }

    /// Orders a fault, and calls the promise broken where that is refused.
    ///
    /// # Errors
    /// [`Broken`] with the reason.
    pub fn fault(&self, order: FaultOrder) -> Verdict {
        match &self.setup.faults {
            Some(faults) => faults.order(order).map_err(|refused| Broken::new(refused.to_string())),
            None => Err(Broken::new("this target cannot make faults happen")),
        }
    }

    /// Makes a fork's child known to the target, so that any fault can befall it.
    pub fn meet(&self, child: &Arc<dyn VmInstance>) {
        if let Some(faults) = &self.setup.faults {
            faults.meet(child);
        }
    }

    /// Counts how often a fault has happened.
    #[must_use]
    pub fn fired(&self, kind: FaultKind) -> u64 {
        let faults = self.setup.faults.as_ref();
        faults.and_then(|faults| faults.fired().get(&kind).copied()).unwrap_or(0)
    }

    /// Lists what is left on the host.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        (self.setup.leftovers)()
    }

    /// Gives the warm machines back, where the check kept its promise to leave them as they were.
    pub(crate) async fn give_back(&self) -> Verdict {
        let machines = {
            let mut borrowed = self.borrowed.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *borrowed)
        };
        let Some(pool) = &self.setup.warm else { return Ok(()) };
        for vm in machines {
            pool.give_back(vm).await.map_err(|left| {
                Broken::new(format!("the clause did not leave its machine as it was: {left}"))
            })?;
        }
        Ok(())
    }

    fn with_rng<T>(&self, draw: impl FnOnce(&mut ChaCha8Rng) -> T) -> T {
        draw(&mut self.rng.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A task that runs beside a check.
#[derive(Debug)]
pub struct Task<T>(oneshot::Receiver<T>);

impl<T> Task<T> {
    /// Waits for the task's output.
    ///
    /// # Errors
    /// [`Broken`] where the task panicked.
    pub async fn join(self) -> Result<T, Broken> {
        self.0.await.map_err(|_| Broken::new("a task of the check panicked"))
    }
}

impl fmt::Debug for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Setup").field("backend", &self.backend).finish_non_exhaustive()
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("seed", &self.run.seed).finish_non_exhaustive()
    }
}
