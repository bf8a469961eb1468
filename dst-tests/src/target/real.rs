//! Faults that are made to happen for real, on machines that are processes of this host.
//!
//! [`RealFaults`] keeps the orders. [`FaultyHypervisor`] stands between the core and a hypervisor, and lets orders happen
//! at their occasions: it stops and kills launchers, cuts and delays real links, and spoils real boots.

use async_trait::async_trait;
use bytes::Bytes;
use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};
use vm_core::{
    env::Env,
    fault::{FaultControl, FaultKind, FaultOrder, FaultRefused},
    machine::{
        Acceptor, CaptureOrder, Captured, Hypervisor, Link, Machine, MachineError, MachineExit,
        MachineSpec, MachineStats, MachineStatus, Sections,
    },
};
use vm_guest_protocol::AGENT_PORT;
use vm_trait::{
    Capabilities, ExecRequest, HostLimits, Inspection, RootConfig, VmConfig, VmId, VmInstance,
    VmState,
};

mod link;
mod run_dir;

use link::FaultyLink;
pub(super) use run_dir::{FillingFs, RunDir};

/// What the kernel is told so that it panics for want of a first process.
const NO_INIT: &str = "rdinit=/there/is/none init=/there/is/none root=";

/// How long a slow boot is held up where the order does not say.
const SLOW_BOOT: Duration = Duration::from_secs(3);

/// How often, and how many times, the console of a boot that is to hang is looked at.
const LOOK_PAUSE: Duration = Duration::from_millis(10);
const FIRST_WORD_LOOKS: u32 = 500;

/// Finds the process that runs a VM's machine.
pub(super) type FindPid = dyn Fn(VmId) -> Option<u32> + Send + Sync;

/// Orders, and what came of them. Clones share everything; see [`for_run`](Self::for_run) for what runs share.
#[derive(Clone)]
pub(super) struct RealFaults {
    kinds: &'static [FaultKind],
    /// Its snapshots are on a disk that can be full.
    fills_disk: bool,
    env: Arc<dyn Env>,
    find_pid: Arc<FindPid>,
    state: Arc<Mutex<State>>,
    account: Arc<Account>,
}

#[derive(Default)]
struct State {
    pending: Vec<(FaultOrder, Arc<Account>)>,
    instances: BTreeMap<VmId, Weak<dyn VmInstance>>,
}

/// What happened of one run's orders.
#[derive(Default)]
struct Account(Mutex<BTreeMap<FaultKind, u64>>);

impl Account {
    fn count(&self, kind: FaultKind) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(kind).or_default() += 1;
    }
}

impl RealFaults {
    /// Every kind that machines in launcher processes can have for real.
    pub(super) const KINDS: &'static [FaultKind] = &[
        FaultKind::BootSlow,
        FaultKind::BootHang,
        FaultKind::BootPanic,
        FaultKind::GuestPanic,
        FaultKind::VmmKilled,
        FaultKind::LinkDisconnect,
        FaultKind::LinkStall,
        FaultKind::LinkShort,
        FaultKind::LinkDelayedAccept,
        FaultKind::PauseStuck,
        FaultKind::ResumeStuck,
    ];

    pub(super) fn new(
        kinds: &'static [FaultKind],
        env: Arc<dyn Env>,
        find_pid: Arc<FindPid>,
    ) -> Self {
        let (fills_disk, state, account) = (false, Arc::default(), Arc::default());
        Self { kinds, fills_disk, env, find_pid, state, account }
    }

    /// Sets whether snapshots are on a disk that can be full.
    pub(super) fn with_disk_to_fill(mut self, fills_disk: bool) -> Self {
        self.fills_disk = fills_disk;
        self
    }

    /// Gives a run an account of its own of faults on the same machines.
    pub(super) fn for_run(&self) -> Self {
        Self { account: Arc::default(), ..self.clone() }
    }

    /// Takes back the orders of this run that have not happened.
    pub(super) fn forget_pending(&self) {
        self.lock().pending.retain(|(_, account)| !Arc::ptr_eq(account, &self.account));
    }

    /// Remembers a machine, for faults that its guest has to be asked for.
    pub(super) fn know(&self, vm: &Arc<dyn VmInstance>) {
        let mut state = self.lock();
        state.instances.retain(|_, vm| vm.strong_count() > 0);
        state.instances.insert(vm.id(), Arc::downgrade(vm));
    }

    /// Lets an order happen at an occasion, if there is one for it and it has let enough of them pass.
    /// An occasion without a VM concerns each of them.
    fn strike(&self, kind: FaultKind, vm: impl Into<Option<VmId>>) -> Option<FaultOrder> {
        let vm = vm.into();
        let mut state = self.lock();
        let for_it = |(order, _): &(FaultOrder, Arc<Account>)| {
            order.kind == kind && order.vm.is_none_or(|of| vm.is_none_or(|vm| of == vm))
        };
        let index = state.pending.iter().position(for_it)?;
        let (order, _) = &mut state.pending[index];
        if order.skip > 0 {
            order.skip -= 1;
            return None;
        }
        let (order, account) = state.pending.remove(index);
        account.count(kind);
        Some(order)
    }

    fn signal(&self, vm: VmId, signal: rustix::process::Signal) -> bool {
        let pid = (self.find_pid)(vm).and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.and_then(rustix::process::Pid::from_raw);
        pid.is_some_and(|pid| rustix::process::kill_process(pid, signal).is_ok())
    }

    /// Makes a fault of a running machine happen. Says whether it could.
    fn happen(&self, kind: FaultKind, vm: VmId) -> bool {
        match kind {
            FaultKind::VmmKilled => self.signal(vm, rustix::process::Signal::KILL),
            FaultKind::GuestPanic => self.panic_guest(vm),
            _ => false,
        }
    }

    fn panic_guest(&self, vm: VmId) -> bool {
        let Some(vm) = self.lock().instances.get(&vm).and_then(Weak::upgrade) else { return false };
        if vm.state() != VmState::Running {
            return false;
        }
        let panic = async move {
            // It has no end that could be told.
            let _ =
                vm.exec(ExecRequest::new("sh").args(["-c", "echo c >/proc/sysrq-trigger"])).await;
        };
        self.env.spawn("fault", Box::pin(panic));
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FaultControl for RealFaults {
    fn can(&self, kind: FaultKind) -> bool {
        self.kinds.contains(&kind) || (kind == FaultKind::HostDiskFull && self.fills_disk)
    }

    fn order(&self, order: FaultOrder) -> Result<(), FaultRefused> {
        let refused =
            |reason: &str| Err(FaultRefused { kind: order.kind, reason: reason.to_owned() });
        if !self.can(order.kind) {
            return refused("this target does not make it happen");
        }
        if !matches!(order.kind, FaultKind::VmmKilled | FaultKind::GuestPanic) {
            self.lock().pending.push((order, self.account.clone()));
            return Ok(());
        }
        let Some(vm) = order.vm else { return refused("the order must name the VM") };
        if order.skip > 0 {
            return refused("it has no occasions to let pass");
        }
        let Some(delay) = order.amount.filter(|delay| !delay.is_zero()) else {
            if !self.happen(order.kind, vm) {
                return refused("the VM has no machine that it could happen to");
            }
            self.account.count(order.kind);
            return Ok(());
        };
        self.lock().pending.push((order.clone(), self.account.clone()));
        let (faults, slept) = (self.clone(), self.env.sleep(delay));
        let task = async move {
            slept.await;
            if faults.happen(order.kind, vm) {
                faults.account.count(order.kind);
                faults.lock().pending.retain(|(other, _)| *other != order);
            }
        };
        self.env.spawn("fault", Box::pin(task));
        Ok(())
    }

    fn meet(&self, vm: &Arc<dyn VmInstance>) {
        self.know(vm);
    }

    fn fired(&self) -> BTreeMap<FaultKind, u64> {
        self.account.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn pending(&self) -> Vec<FaultOrder> {
        let mine = |(order, account): &(FaultOrder, Arc<Account>)| {
            Arc::ptr_eq(account, &self.account).then(|| order.clone())
        };
        self.lock().pending.iter().filter_map(mine).collect()
    }
}

impl fmt::Debug for RealFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RealFaults").field("kinds", &self.kinds).finish_non_exhaustive()
    }
}

/// A hypervisor with faults, whose machines have `root` where their configuration names none.
#[derive(Debug)]
pub(super) struct FaultyHypervisor {
    pub(super) inner: Arc<dyn Hypervisor>,
    pub(super) faults: RealFaults,
    pub(super) root: Option<PathBuf>,
}

#[async_trait]
impl Hypervisor for FaultyHypervisor {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn arch(&self) -> &str {
        self.inner.arch()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn limits(&self) -> HostLimits {
        self.inner.limits()
    }

    fn check(&self, config: &VmConfig) -> Result<(), MachineError> {
        self.inner.check(config)
    }

    async fn create(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, MachineError> {
        let mut config = VmConfig::clone(&spec.config);
        if let Some(root) = &self.root
            && config.root == RootConfig::default()
        {
            config.root = RootConfig::directory(root);
        }
        if !spec.loads && self.faults.strike(FaultKind::BootPanic, spec.vm).is_some() {
            config.kernel.cmdline = format!("{} {NO_INIT}", config.kernel.cmdline);
        }
        let spec = MachineSpec { config: Arc::new(config), ..spec.clone() };
        let inner = self.inner.create(&spec).await?;
        Ok(Arc::new(FaultyMachine { inner, vm: spec.vm, faults: self.faults.clone() }))
    }
}

#[derive(Debug)]
struct FaultyMachine {
    inner: Arc<dyn Machine>,
    vm: VmId,
    faults: RealFaults,
}

impl FaultyMachine {
    /// Stops the launcher once its guest has said something, as long as it can be expected to.
    async fn freeze_amid_boot(&self) {
        for _ in 0..FIRST_WORD_LOOKS {
            if !self.inner.console().is_empty() {
                break;
            }
            self.faults.env.sleep(LOOK_PAUSE).await;
        }
        self.freeze();
    }

    fn freeze(&self) {
        self.faults.signal(self.vm, rustix::process::Signal::STOP);
    }
}

#[async_trait]
impl Machine for FaultyMachine {
    async fn boot(&self) -> Result<(), MachineError> {
        self.inner.boot().await?;
        if self.faults.strike(FaultKind::BootHang, self.vm).is_some() {
            self.freeze_amid_boot().await;
        } else if let Some(order) = self.faults.strike(FaultKind::BootSlow, self.vm) {
            self.freeze();
            let (faults, vm) = (self.faults.clone(), self.vm);
            let over = faults.env.sleep(order.amount.unwrap_or(SLOW_BOOT));
            let thaw = async move {
                over.await;
                faults.signal(vm, rustix::process::Signal::CONT);
            };
            self.faults.env.spawn("fault", Box::pin(thaw));
        }
        Ok(())
    }

    async fn pause(&self) -> Result<(), MachineError> {
        if self.faults.strike(FaultKind::PauseStuck, self.vm).is_some() {
            self.freeze();
        }
        self.inner.pause().await
    }

    async fn resume(&self) -> Result<(), MachineError> {
        if self.faults.strike(FaultKind::ResumeStuck, self.vm).is_some() {
            self.freeze();
        }
        self.inner.resume().await
    }

    async fn kill(&self) -> Result<(), MachineError> {
        self.inner.kill().await
    }

    async fn wait(&self) -> MachineExit {
        self.inner.wait().await
    }

    async fn status(&self) -> Result<MachineStatus, MachineError> {
        self.inner.status().await
    }

    async fn connect(&self, port: u32) -> Result<Box<dyn Link>, MachineError> {
        let link = self.inner.connect(port).await?;
        if port != AGENT_PORT {
            return Ok(link);
        }
        if let Some(order) = self.faults.strike(FaultKind::LinkDelayedAccept, self.vm) {
            self.faults.env.sleep(order.amount.unwrap_or(Duration::from_secs(1))).await;
        }
        Ok(Box::new(FaultyLink::new(link, self.vm, self.faults.clone())))
    }

    async fn listen(&self, port: u32) -> Result<Box<dyn Acceptor>, MachineError> {
        self.inner.listen(port).await
    }

    async fn capture(&self, order: CaptureOrder) -> Result<Box<dyn Captured>, MachineError> {
        self.inner.capture(order).await
    }

    async fn load(&self, sections: &Sections, track: bool) -> Result<(), MachineError> {
        self.inner.load(sections, track).await
    }

    async fn fork(&self, specs: &[MachineSpec]) -> Vec<Result<Arc<dyn Machine>, MachineError>> {
        let children = self.inner.fork(specs).await;
        let wrap = |(child, spec): (Result<Arc<dyn Machine>, MachineError>, &MachineSpec)| {
            let faults = self.faults.clone();
            child.map(|inner| Arc::new(Self { inner, vm: spec.vm, faults }) as Arc<dyn Machine>)
        };
        children.into_iter().zip(specs).map(wrap).collect()
    }

    async fn inspect(&self) -> Result<Inspection, MachineError> {
        self.inner.inspect().await
    }

    async fn stats(&self) -> Result<MachineStats, MachineError> {
        self.inner.stats().await
    }

    fn console(&self) -> Bytes {
        self.inner.console()
    }
}
