//! [`SimHypervisor`] and its machines.

mod console;
mod guest;
mod image;
mod lines;
mod link;
mod shared;
mod tcp;

use shared::Ports;
pub(crate) use shared::Shared;

use crate::{
    fault::Vms,
    guest::{Address, DiskSetup, OsConfig, ShareSetup, SimOs},
    rng::Purpose,
    world::World,
};
use async_trait::async_trait;
use bytes::Bytes;
use guest::{Boot, BootFate, Guest};
use image::{Generations, HEADER, STATE};
use serde::{Deserialize, Serialize};
use shared::State;
use std::{fmt, sync::Arc, time::Duration};
use vm_core::{
    fault::FaultKind,
    machine::{
        Acceptor, CaptureOrder, Captured, Hypervisor, Link, Machine, MachineError, MachineExit,
        MachineSpec, MachineStats, MachineStatus, Sections,
    },
};
use vm_guest_protocol::AGENT_PORT;
use vm_planted_bugs::{Bug, planted};
use vm_trait::{
    Capabilities, HostLimits, Inspection, MemoryRegion, Mib, NetworkConfig, VcpuInspection,
    VmConfig,
};

/// The version of a machine's state.
const VERSION: u32 = 4;
/// How much longer than the guest's memory its state may be.
const STATE_MARGIN: u64 = 64 << 20;
/// The architecture that the guests have, whatever the host's.
const ARCH: &str = "sim64";
/// The most processes of a guest.
const MAX_PROCESSES: u32 = 4096;
/// A big section is written in pieces of this size.
const PIECE: usize = 1 << 20;

const BOOT: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(120));
const SLOW_BOOT: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(90));
const SLOW_LOAD: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(90));
const CONTROL: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(2));

/// What a saved state says of itself, ahead of the guest.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    version: u32,
    arch: String,
    vcpus: u8,
    memory: Mib,
}

/// Makes simulated machines.
#[derive(Clone, Debug)]
pub struct SimHypervisor {
    world: Arc<World>,
    capabilities: Capabilities,
}

impl SimHypervisor {
    pub(crate) fn new(world: Arc<World>) -> Self {
        let capabilities = *world.faults.capabilities();
        Self { world, capabilities }
    }
}

#[async_trait]
impl Hypervisor for SimHypervisor {
    fn name(&self) -> &str {
        "sim"
    }

    fn arch(&self) -> &str {
        ARCH
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn limits(&self) -> HostLimits {
        HostLimits {
            max_vcpus: self.world.limits.vcpus_per_machine,
            max_memory: self.world.limits.memory_per_machine,
        }
    }

    fn check(&self, config: &VmConfig) -> Result<(), MachineError> {
        self.world.host().check_shares(config)
    }

    async fn create(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, MachineError> {
        self.world.enter().await;
        if self.world.strike(FaultKind::CreateExhausted, Vms::One(spec.vm)).is_some() {
            return Err(MachineError::Exhausted("memory".to_owned()));
        }
        Ok(Arc::new(SimMachine(Shared::create(&self.world, spec.clone(), Ports::Mapped)?)))
    }
}

/// One life of a simulated virtual machine.
struct SimMachine(Arc<Shared>);

impl SimMachine {
    fn world(&self) -> &Arc<World> {
        self.0.world()
    }

    /// Waits as long as the hypervisor takes for a small thing.
    async fn control(&self) {
        self.world().enter().await;
        self.world().delay(Purpose::MachineLatency, CONTROL.0, CONTROL.1).await;
    }

    fn draw_boot(&self) -> Boot {
        let fate = if self.0.strike(FaultKind::BootHang).is_some() {
            BootFate::Hangs
        } else if self.0.strike(FaultKind::BootPanic).is_some() {
            BootFate::Panics
        } else {
            BootFate::Listens
        };
        let mut ready_at = self.world().streams.duration(Purpose::BootLatency, BOOT.0, BOOT.1);
        if let Some(fired) = self.0.strike(FaultKind::BootSlow) {
            ready_at += fired.amount(SLOW_BOOT.0, SLOW_BOOT.1);
        }
        Boot { ready_at, fate }
    }

    /// Builds the guest of a cold boot.
    fn build(&self, state: &mut State) -> Result<Guest, MachineError> {
        let config = &self.0.spec().config;
        let mut seed = [0; 32];
        self.world().streams.fill(Purpose::GuestSeed, &mut seed);
        let disks = self.attach_disks()?;
        state.disks_attached = true;
        let os = OsConfig {
            memory: config.memory.bytes(),
            vcpus: u32::from(config.vcpus),
            hostname: config.hostname.clone(),
            seed,
            max_processes: MAX_PROCESSES,
            disks,
            shares: config
                .mounts
                .iter()
                .map(|mount| ShareSetup { mount: mount.mount.clone() })
                .collect(),
            host_loopback: matches!(config.network, NetworkConfig::Tsi(_)),
        };
        let programs = Arc::clone(&self.world().programs);
        let capacity = self.world().limits.disk_bytes;
        let os = match self.world().host().root_in_hand(config, capacity) {
            Some(root) => SimOs::on_shared_root(os, programs, root),
            None => SimOs::new(os, programs),
        };
        let os = os.map_err(|error| MachineError::Failed(error.to_string()))?;
        state.console.line("Linux version 6.12.0-twinvm (simulated)");
        state.console.line(&format!(
            "{} vCPUs, {} of memory, {} disks",
            config.vcpus,
            config.memory,
            config.disks.len()
        ));
        Ok(Guest::new(os, self.draw_boot()))
    }

    fn attach_disks(&self) -> Result<Vec<DiskSetup>, MachineError> {
        let configs = &self.0.spec().config.disks;
        let mut host = self.world().host();
        let mut setups = Vec::with_capacity(configs.len());
        for (index, config) in configs.iter().enumerate() {
            match host.attach(config) {
                Ok((image, size)) => setups.push(DiskSetup {
                    mount: config.mount.clone(),
                    capacity: size.bytes(),
                    read_only: config.read_only,
                    image,
                }),
                Err(error) => {
                    configs[..index].iter().for_each(|config| host.detach(config, None));
                    return Err(error);
                }
            }
        }
        Ok(setups)
    }

    fn header(&self) -> Header {
        let config = &self.0.spec().config;
        let arch = ARCH.to_owned();
        Header { version: VERSION, arch, vcpus: config.vcpus, memory: config.memory }
    }

    /// Refuses a state that was not made for a machine like this one.
    fn check_header(&self, found: &Header) -> Result<(), MachineError> {
        let wanted = self.header();
        let refuse = |field: &str, found: &dyn fmt::Display, wanted: &dyn fmt::Display| {
            Err(MachineError::Incompatible {
                field: field.to_owned(),
                found: found.to_string(),
                wanted: wanted.to_string(),
            })
        };
        if found.version != wanted.version {
            return refuse("version", &found.version, &wanted.version);
        }
        if self.0.strike(FaultKind::VersionSkew).is_some() {
            return refuse("version", &(found.version + 1), &wanted.version);
        }
        if found.arch != wanted.arch {
            return refuse("arch", &found.arch, &wanted.arch);
        }
        if found.vcpus != wanted.vcpus {
            return refuse("vcpus", &found.vcpus, &wanted.vcpus);
        }
        if found.memory != wanted.memory {
            return refuse("memory", &found.memory, &wanted.memory);
        }
        Ok(())
    }

    /// Gives the state if the machine has this status.
    fn in_status(
        &self,
        wanted: MachineStatus,
    ) -> Result<std::sync::MutexGuard<'_, State>, MachineError> {
        let state = self.0.lock();
        match state.status {
            status if status == wanted => Ok(state),
            MachineStatus::Ended => Err(MachineError::Ended),
            status => Err(MachineError::Failed(format!("the machine is {status:?}"))),
        }
    }

    /// Does not answer for as long as the fault lasts: for ever, unless it says how long.
    async fn stick(&self, fired: crate::fault::Fired) {
        match fired.planned() {
            Some(amount) => self.world().env.timer(amount).await,
            None => std::future::pending().await,
        }
    }

    fn freeze(&self) -> Result<(), MachineError> {
        let mut state = self.in_status(MachineStatus::Running)?;
        let now = self.world().now();
        self.0.catch_up(&mut state, now)?;
        state.status = MachineStatus::Paused;
        if let Some(guest) = &mut state.guest {
            guest.freeze(now);
        }
        drop(state);
        if self.world().faults.may_befall() {
            self.0.wake_driver();
        }
        self.0.note(3, || "vCPUs stand still".to_owned());
        Ok(())
    }

    fn thaw(&self) -> Result<(), MachineError> {
        let mut state = self.in_status(MachineStatus::Paused)?;
        state.status = MachineStatus::Running;
        if let Some(guest) = &mut state.guest {
            guest.thaw(self.world().now());
        }
        drop(state);
        self.0.note(4, || "vCPUs run".to_owned());
        self.0.goes_on();
        self.0.wake_driver();
        Ok(())
    }
}

#[async_trait]
impl Machine for SimMachine {
    async fn boot(&self) -> Result<(), MachineError> {
        self.control().await;
        if self.0.strike(FaultKind::BootFail).is_some() {
            return Err(MachineError::Failed("the vCPU could not enter the kernel".to_owned()));
        }
        let mut state = self.in_status(MachineStatus::Fresh)?;
        let guest = self.build(&mut state)?;
        self.0.install(&mut state, guest, true);
        drop(state);
        self.0.note(5, || "kernel entered".to_owned());
        Ok(())
    }

    async fn pause(&self) -> Result<(), MachineError> {
        self.control().await;
        drop(self.in_status(MachineStatus::Running)?);
        if self.0.strike(FaultKind::PauseFail).is_some() {
            return Err(MachineError::Failed("a vCPU could not be stopped".to_owned()));
        }
        if let Some(fired) = self.0.strike(FaultKind::PauseStuck) {
            // The vCPUs may stand still though nobody says so.
            if fired.random.is_multiple_of(2) {
                self.freeze()?;
                self.stick(fired).await;
                return Ok(());
            }
            self.stick(fired).await;
        }
        self.freeze()
    }

    async fn resume(&self) -> Result<(), MachineError> {
        self.control().await;
        drop(self.in_status(MachineStatus::Paused)?);
        if self.0.strike(FaultKind::ResumeFail).is_some() {
            return Err(MachineError::Failed("a vCPU could not be started".to_owned()));
        }
        if let Some(fired) = self.0.strike(FaultKind::ResumeStuck) {
            if fired.random.is_multiple_of(2) {
                self.thaw()?;
                self.stick(fired).await;
                return Ok(());
            }
            self.stick(fired).await;
        }
        self.thaw()
    }

    async fn kill(&self) -> Result<(), MachineError> {
        self.world().enter().await;
        self.0.end(MachineExit::Killed);
        Ok(())
    }

    async fn wait(&self) -> MachineExit {
        self.0.wait().await
    }

    async fn status(&self) -> Result<MachineStatus, MachineError> {
        self.world().enter().await;
        Ok(self.0.lock().status)
    }

    async fn connect(&self, port: u32) -> Result<Box<dyn Link>, MachineError> {
        if port != AGENT_PORT {
            return Ok(Box::new(self.0.dial(Address::Vsock(port)).await?));
        }
        self.world().enter().await;
        Ok(Box::new(self.0.connect()?))
    }

    async fn listen(&self, port: u32) -> Result<Box<dyn Acceptor>, MachineError> {
        self.world().enter().await;
        Ok(Box::new(self.0.listen(port)?))
    }

    async fn capture(&self, order: CaptureOrder) -> Result<Box<dyn Captured>, MachineError> {
        self.control().await;
        drop(self.in_status(MachineStatus::Paused)?);
        if self.0.strike(FaultKind::SaveFail).is_some() {
            return Err(MachineError::Failed("the device state could not be read".to_owned()));
        }
        let corrupt = |error: postcard::Error| MachineError::Failed(error.to_string());
        let header = postcard::to_allocvec(&self.header()).map_err(corrupt)?;
        let mut state = self.in_status(MachineStatus::Paused)?;
        let guest = state.guest.as_ref().ok_or(MachineError::Ended)?.save().map_err(corrupt)?;
        Ok(Box::new(state.generations.capture(order, header.into(), guest.into())?))
    }

    async fn load(&self, sections: &Sections, track: bool) -> Result<(), MachineError> {
        self.control().await;
        drop(self.in_status(MachineStatus::Fresh)?);
        if let Some(fired) = self.0.strike(FaultKind::LoadSlow) {
            self.world().env.timer(fired.amount(SLOW_LOAD.0, SLOW_LOAD.1)).await;
        }
        if self.0.strike(FaultKind::LoadFail).is_some() {
            return Err(MachineError::Failed("the device state could not be set".to_owned()));
        }
        let (header, _) = postcard::take_from_bytes::<Header>(sections.get(HEADER)?)
            .map_err(|error| MachineError::Corrupt(error.to_string()))?;
        self.check_header(&header)?;
        let most = header.memory.bytes() + STATE_MARGIN;
        let bytes = sections.image(STATE)?.content(most).await?;
        let guest = Guest::load(&bytes, Arc::clone(&self.world().programs))
            .map_err(MachineError::Corrupt)?;
        let mut state = self.in_status(MachineStatus::Fresh)?;
        if track {
            state.generations = Generations::of_loaded(&bytes);
        }
        self.0.install(&mut state, guest, false);
        drop(state);
        self.0.note(6, || "state loaded".to_owned());
        Ok(())
    }

    async fn fork(&self, specs: &[MachineSpec]) -> Vec<Result<Arc<dyn Machine>, MachineError>> {
        let mut children = Vec::with_capacity(specs.len());
        for spec in specs {
            self.world().enter().await;
            children.push(self.fork_child(spec));
        }
        children
    }

    async fn inspect(&self) -> Result<Inspection, MachineError> {
        self.world().enter().await;
        let state = self.in_status(MachineStatus::Paused)?;
        let guest = state.guest.as_ref().ok_or(MachineError::Ended)?;
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // All vCPUs of a simulated guest share the work of one.
        let registers =
            [("clock", guest.clock(self.world().now())), ("cycles", guest.os.cpu_time())];
        let registers = registers.map(|(name, time)| (name.to_owned(), nanos(time)));
        let last_exit = (state.halts > 0).then(|| "halt".to_owned());
        let exits = last_exit.iter().map(|name| (name.clone(), state.halts)).collect();
        let vcpu = VcpuInspection::new(registers.into(), last_exit, exits);
        let config = &self.0.spec().config;
        let memory = MemoryRegion { start: 0, bytes: config.memory.bytes() };
        Ok(Inspection::new(vec![vcpu; usize::from(config.vcpus)], vec![memory]))
    }

    async fn stats(&self) -> Result<MachineStats, MachineError> {
        self.world().enter().await;
        let state = self.0.lock();
        let guest = state.guest.as_ref();
        Ok(MachineStats {
            cpu_time: guest.map(|guest| guest.os.cpu_time()),
            memory_used_bytes: guest.map(|guest| guest.os.memory_used()),
            vm_exits: None,
        })
    }

    fn console(&self) -> Bytes {
        self.0.console()
    }
}

impl SimMachine {
    fn fork_child(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, MachineError> {
        let world = self.world();
        if world.strike(FaultKind::ForkChildFail, Vms::One(self.0.vm())).is_some() {
            return Err(MachineError::Exhausted("memory".to_owned()));
        }
        let guest = {
            let state = self.in_status(MachineStatus::Paused)?;
            state.guest.as_ref().ok_or(MachineError::Ended)?.copy()
        };
        let ports = if planted(Bug::ChildrenTakePorts) { Ports::TakenOver } else { Ports::None };
        let child = Shared::create(world, spec.clone(), ports)?;
        let machine = SimMachine(child);
        let mut state = machine.0.lock();
        state.disks_attached = planted(Bug::ChildSharesDisk);
        machine.0.install(&mut state, guest, false);
        drop(state);
        Ok(Arc::new(machine))
    }
}

impl Drop for SimMachine {
    fn drop(&mut self) {
        self.0.end(MachineExit::Killed);
    }
}

impl fmt::Debug for SimMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimMachine").field("vm", &self.0.vm()).finish_non_exhaustive()
    }
}
