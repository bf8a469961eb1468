//! [`Vcpus`]: the threads that run a guest.

use super::{
    bus::Bus,
    cpu::registers_of,
    exit_detail::internal_error,
    process::name_thread,
    refuse::failed,
    threads::{cpu_time, kick},
};
use crate::control::Refusal;
use crate::sync::lock;
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};
use vmm_sys_util::eventfd::EventFd;

/// How long vCPUs may take to stop.
const PARK_PATIENCE: Duration = Duration::from_secs(3);

/// The stack of a vCPU's thread; little of it is ever touched.
const STACK: usize = 256 << 10;

/// Why a guest stopped by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// It powered off.
    PoweredOff,
    /// It reset the machine.
    Reset,
    /// It cannot go on: why, for people.
    Failed(String),
}

/// Where the first reason to stop is kept, and told to the event loop.
#[derive(Debug)]
pub(super) struct Outcome {
    reason: Mutex<Option<Stopped>>,
    event: EventFd,
}

impl Outcome {
    /// Tells through `event`.
    pub(super) fn new(event: EventFd) -> Self {
        Self { reason: Mutex::new(None), event }
    }

    /// Gives the descriptor that is readable once there is a reason.
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Gives the reason, if there is one.
    pub(super) fn reason(&self) -> Option<Stopped> {
        lock(&self.reason).clone()
    }

    fn report(&self, why: Stopped) {
        lock(&self.reason).get_or_insert(why);
        let _ = self.event.write(1);
    }
}

/// A guest's vCPUs, each with a thread. While they are parked, no thread holds its vCPU's lock.
#[derive(Debug)]
pub(super) struct Vcpus {
    threads: Vec<Thread>,
    gate: Arc<Gate>,
}

#[derive(Debug)]
struct Thread {
    handle: JoinHandle<()>,
    vcpu: Arc<Mutex<VcpuFd>>,
    exits: Arc<Exits>,
}

impl Vcpus {
    /// Makes the threads, parked.
    ///
    /// # Errors
    /// [`Refusal::Exhausted`] where the host has no more threads.
    pub(super) fn new(
        vcpus: Vec<VcpuFd>,
        bus: &Arc<Bus>,
        outcome: &Arc<Outcome>,
    ) -> Result<Self, Refusal> {
        let gate = Arc::new(Gate::new(vcpus.len()));
        let mut threads = Vec::with_capacity(vcpus.len());
        for (id, vcpu) in vcpus.into_iter().enumerate() {
            let vcpu = Arc::new(Mutex::new(vcpu));
            let exits = Arc::new(Exits::default());
            let runner = Runner {
                id,
                vcpu: vcpu.clone(),
                exits: exits.clone(),
                gate: gate.clone(),
                bus: bus.clone(),
                outcome: outcome.clone(),
            };
            let handle = std::thread::Builder::new()
                .stack_size(STACK)
                .spawn(move || runner.run())
                .map_err(|error| failed("vCPU thread", error))?;
            threads.push(Thread { handle, vcpu, exits });
        }
        Ok(Self { threads, gate })
    }

    /// Lets all run, and waits until the first one does.
    pub(super) fn run(&self) {
        let mut state = lock(&self.gate.state);
        state.run = true;
        self.gate.stop.store(false, Ordering::Release);
        self.gate.changed.notify_all();
        let deadline = Instant::now() + PARK_PATIENCE;
        while state.parked[0] && state.run && Instant::now() < deadline {
            state = self.gate.wait(state, Duration::from_millis(100));
        }
    }

    /// Stops all, outside of KVM and with nothing half done.
    ///
    /// # Errors
    /// The numbers of those that did not stop in time.
    pub(super) fn park(&self) -> Result<(), Vec<usize>> {
        let deadline = Instant::now() + PARK_PATIENCE;
        let mut state = lock(&self.gate.state);
        state.run = false;
        self.gate.stop.store(true, Ordering::Release);
        let mut pause = Duration::from_millis(1);
        loop {
            let late: Vec<usize> =
                (0..self.threads.len()).filter(|&id| !state.parked[id]).collect();
            if late.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(late);
            }
            // A signal that comes between the look at the flag and KVM_RUN is lost, so it is repeated.
            for &id in &late {
                kick(&self.threads[id].handle);
            }
            state = self.gate.wait(state, pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// Does something with each vCPU; they must be parked.
    ///
    /// # Errors
    /// The first of `act`'s.
    pub(super) fn each<E>(
        &self,
        mut act: impl FnMut(usize, &mut VcpuFd) -> Result<(), E>,
    ) -> Result<(), E> {
        self.threads
            .iter()
            .enumerate()
            .try_for_each(|(id, thread)| act(id, &mut lock(&thread.vcpu)))
    }

    /// Gives the CPU time of all threads.
    pub(super) fn cpu_time(&self) -> Duration {
        self.threads.iter().map(|thread| cpu_time(&thread.handle)).sum()
    }

    /// Counts how often a vCPU came back from the guest.
    pub(super) fn exits(&self) -> u64 {
        self.threads.iter().map(|thread| thread.exits.all()).sum()
    }

    /// Says why a vCPU last came back, and how often for each reason.
    pub(super) fn exits_of(&self, id: usize) -> (Option<String>, BTreeMap<String, u64>) {
        self.threads.get(id).map_or_else(Default::default, |thread| thread.exits.named())
    }
}

/// Where threads wait while they are parked.
#[derive(Debug)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    /// The opposite of [`GateState::run`], to be looked at without the lock.
    stop: AtomicBool,
}

#[derive(Debug)]
struct GateState {
    run: bool,
    parked: Vec<bool>,
}

impl Gate {
    fn new(threads: usize) -> Self {
        Self {
            state: Mutex::new(GateState { run: false, parked: vec![true; threads] }),
            changed: Condvar::new(),
            stop: AtomicBool::new(true),
        }
    }

    fn wait<'a>(
        &self,
        state: std::sync::MutexGuard<'a, GateState>,
        at_most: Duration,
    ) -> std::sync::MutexGuard<'a, GateState> {
        let waited = self.changed.wait_timeout(state, at_most);
        waited.unwrap_or_else(std::sync::PoisonError::into_inner).0
    }

    /// Parks a thread until all are to run.
    fn pass(&self, id: usize) {
        let mut state = lock(&self.state);
        state.parked[id] = true;
        self.changed.notify_all();
        while !state.run {
            state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        state.parked[id] = false;
        self.changed.notify_all();
    }

    /// Counts a thread that has ended among the parked ones.
    fn leave(&self, id: usize) {
        lock(&self.state).parked[id] = true;
        self.changed.notify_all();
    }
}

/// What a vCPU's thread has.
#[derive(Debug)]
struct Runner {
    id: usize,
    vcpu: Arc<Mutex<VcpuFd>>,
    exits: Arc<Exits>,
    gate: Arc<Gate>,
    bus: Arc<Bus>,
    outcome: Arc<Outcome>,
}

/// What a thread does after an exit.
#[derive(Debug)]
enum Next {
    /// It enters the guest again.
    Enter,
    /// It was interrupted and may be parked.
    Interrupted,
    /// The guest has stopped.
    End(Stopped),
}

impl Runner {
    fn run(&self) {
        name_thread(&format!("vcpu{}", self.id));
        loop {
            self.gate.pass(self.id);
            let mut vcpu = lock(&self.vcpu);
            if let Some(why) = self.run_until_stopped(&mut vcpu) {
                drop(vcpu);
                self.gate.leave(self.id);
                self.outcome.report(why);
                return;
            }
        }
    }

    /// Runs the guest until it is to be parked, or until it stops by itself: then why.
    fn run_until_stopped(&self, vcpu: &mut VcpuFd) -> Option<Stopped> {
        loop {
            // With the flag set, KVM completes a port or memory access that is under way, and enters no guest code.
            let stop = self.gate.stop.load(Ordering::Acquire);
            vcpu.set_kvm_immediate_exit(u8::from(stop));
            match self.enter(vcpu) {
                Next::Enter => {}
                Next::Interrupted if stop => return None,
                Next::Interrupted => {}
                Next::End(why) => return Some(why),
            }
        }
    }

    fn enter(&self, vcpu: &mut VcpuFd) -> Next {
        let exit = vcpu.run();
        self.exits.note(exit_number(&exit));
        let failure = match exit {
            Ok(VcpuExit::IoOut(port, data)) => {
                return self.bus.port_written(port, data).map_or(Next::Enter, Next::End);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.bus.read_port(port, data);
                return Next::Enter;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.bus.read_memory(address, data);
                return Next::Enter;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.bus.write_memory(address, data);
                return Next::Enter;
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return Next::Interrupted,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Next::Interrupted;
            }
            Ok(VcpuExit::Shutdown) => "triple fault".to_owned(),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                format!("the processor refuses to enter the guest: {reason:#x}")
            }
            Ok(VcpuExit::InternalError) => internal_error(vcpu),
            Ok(other) => format!("unexpected exit: {other:?}"),
            Err(error) => format!("KVM_RUN: {error}"),
        };
        Next::End(Stopped::Failed(format!("vCPU {}: {failure}{}", self.id, place(vcpu))))
    }
}

/// Why vCPUs come back; the place in this list is the exit's number.
const EXITS: [&str; 7] =
    ["io_out", "io_in", "mmio_write", "mmio_read", "interrupted", "shutdown", "other"];

fn exit_number(exit: &Result<VcpuExit<'_>, kvm_ioctls::Error>) -> usize {
    match exit {
        Ok(VcpuExit::IoOut(..)) => 0,
        Ok(VcpuExit::IoIn(..)) => 1,
        Ok(VcpuExit::MmioWrite(..)) => 2,
        Ok(VcpuExit::MmioRead(..)) => 3,
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) | Err(_) => 4,
        Ok(VcpuExit::Shutdown) => 5,
        Ok(_) => 6,
    }
}

/// How often a vCPU came back, by the exit's number, and the last of them.
#[derive(Debug, Default)]
struct Exits {
    counts: [AtomicU64; EXITS.len()],
    /// The last one's number plus one.
    last: AtomicUsize,
}

impl Exits {
    fn note(&self, number: usize) {
        self.counts[number].fetch_add(1, Ordering::Relaxed);
        self.last.store(number + 1, Ordering::Relaxed);
    }

    fn all(&self) -> u64 {
        self.counts.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    fn named(&self) -> (Option<String>, BTreeMap<String, u64>) {
        let last = self.last.load(Ordering::Relaxed).checked_sub(1);
        let counts = EXITS
            .iter()
            .zip(&self.counts)
            .map(|(name, count)| ((*name).to_owned(), count.load(Ordering::Relaxed)));
        (last.map(|last| EXITS[last].to_owned()), counts.filter(|(_, count)| *count > 0).collect())
    }
}

/// Says where a vCPU is, for people.
fn place(vcpu: &VcpuFd) -> String {
    const SHOWN: [&str; 8] = ["rip", "rsp", "rflags", "cr0", "cr2", "cr3", "cr4", "efer"];
    let Ok(registers) = registers_of(vcpu) else { return String::new() };
    let shown = SHOWN.map(|name| format!(" {name} {:#x}", registers.get(name).unwrap_or(&0)));
    format!(" at{}", shown.concat())
}
