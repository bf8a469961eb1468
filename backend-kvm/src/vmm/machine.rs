//! [`Machine`]: a guest with all it has.

use super::{
    boot::{BootSource, prepare},
    bus::Bus,
    channel::Channel,
    console::{Console, check_ring},
    cpu::{Model, StateKinds, VcpuState, enter_kernel, prepare_all, registers_of, write_tables},
    devices::{DeviceSetUp, Devices, DevicesState, event},
    flush::FlushTimer,
    layout::{IDENTITY_MAP, SERIAL_LINE, TSS},
    memory::{self, GuestMemory},
    ports::{Ports, PortsState},
    refuse::{config, failed, kvm_failed},
    saving,
    threads::prepare_kicks,
    tracking::{Changes, Tracker},
    vcpus::{Outcome, Stopped, Vcpus},
};
use crate::control::{DiskSetUp, End, MachineSetUp, Refusal, Stats, Status};
use crate::snapshot::pieces;
use crate::sync::lock;
use kvm_bindings::{
    KVM_API_VERSION, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    time::Duration,
};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vm_trait::{Inspection, MemoryRegion, VcpuInspection};

/// A guest with all it has.
#[derive(Debug)]
pub(super) struct Machine {
    status: Status,
    vcpus: Vcpus,
    devices: Arc<Devices>,
    console: Arc<Mutex<Console>>,
    flush: Arc<FlushTimer>,
    outcome: Arc<Outcome>,
    /// KVM's clock as it was when the machine was paused.
    clock: kvm_clock_data,
    bus: Arc<Bus>,
    kinds: StateKinds,
    set_up: MachineSetUp,
    /// The disks' files, which the devices have too.
    disks: Vec<File>,
    tracker: Tracker,
    vm: VmFd,
    // After what uses it.
    memory: GuestMemory,
}

/// All of a machine's state but its memory and disks, as plain data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct MachineState {
    vcpus: Vec<VcpuState>,
    pit: kvm_pit_state2,
    irqchips: Vec<kvm_irqchip>,
    /// KVM's clock in nanoseconds, as the guest sees it.
    clock_ns: u64,
    ports: PortsState,
    devices: DevicesState,
}

/// The descriptors of a set-up, taken apart.
#[derive(Debug)]
struct Files {
    kernel: File,
    initrd: Vec<File>,
    outside: Outside,
}

/// The descriptors of a saved machine, taken apart.
#[derive(Debug)]
struct Loaded {
    state: File,
    pieces: File,
    memory: Vec<File>,
    outside: Outside,
}

/// The most bytes that say which part of memory stands where: enough for 1 TiB of which every second page is zero.
const MAX_PIECES: u64 = 4 << 30;

/// The files through which a machine reaches the host.
#[derive(Debug)]
pub(super) struct Outside {
    /// The console's ring.
    pub(super) ring: File,
    /// The file that the console is appended to.
    pub(super) log: Option<File>,
    /// The disks in order.
    pub(super) disks: Vec<File>,
}

/// KVM's interrupt controllers, in the order in which they are restored.
const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl Machine {
    /// Makes a machine with its kernel in memory, ready to be booted.
    ///
    /// # Errors
    /// [`Refusal::Config`] naming what cannot be had, [`Refusal::Exhausted`] or [`Refusal::Failed`].
    pub(super) fn new(
        set_up: &MachineSetUp,
        fds: Vec<OwnedFd>,
        channel: &Arc<Channel>,
    ) -> Result<Self, Refusal> {
        let files = Files::take_apart(set_up, fds)?;
        prepare_kicks().map_err(|error| failed("signal handler", error))?;
        let memory = GuestMemory::empty(set_up.memory_mib)?;
        let machine = Self::assemble(set_up, files.outside, memory, channel)?;
        let source = BootSource {
            kernel: &files.kernel,
            initrd: &files.initrd,
            cmdline: &set_up.cmdline,
            devices_in_cmdline: set_up.devices_in_cmdline,
            devices: &machine.devices.announced(),
            vcpus: set_up.vcpus,
        };
        let entry = prepare(&machine.memory.memory, &source)?;
        write_tables(&machine.memory.memory)?;
        machine.vcpus.each(|id, vcpu| if id == 0 { enter_kernel(vcpu, entry) } else { Ok(()) })?;
        Ok(machine)
    }

    /// Makes a machine that stands still where another one was saved.
    ///
    /// # Errors
    /// As [`new`](Self::new); also [`Refusal::Corrupt`] and [`Refusal::Incompatible`] for what was saved.
    pub(super) fn load(
        set_up: &MachineSetUp,
        memory_files: u8,
        fds: Vec<OwnedFd>,
        channel: &Arc<Channel>,
    ) -> Result<Self, Refusal> {
        let loaded = Loaded::take_apart(set_up, memory_files, fds)?;
        let Loaded { state, pieces, memory, outside } = loaded;
        prepare_kicks().map_err(|error| failed("signal handler", error))?;
        let state = saving::read_state(&state)?;
        let pieces = saving::read_whole(&pieces, MAX_PIECES)?;
        let pieces = pieces::decode(&pieces).map_err(Refusal::Corrupt)?;
        let memory = GuestMemory::saved(set_up.memory_mib, &pieces, &memory)?;
        Self::revive(set_up, outside, memory, &state, channel)
    }

    /// Makes a machine that stands still where another one stood whose state and memory these are.
    ///
    /// # Errors
    /// As [`new`](Self::new); also where the state does not fit.
    pub(super) fn revive(
        set_up: &MachineSetUp,
        outside: Outside,
        memory: GuestMemory,
        state: &MachineState,
        channel: &Arc<Channel>,
    ) -> Result<Self, Refusal> {
        let mut machine = Self::assemble(set_up, outside, memory, channel)?;
        machine.restore(state)?;
        machine.status = Status::Paused;
        Ok(machine)
    }

    fn assemble(
        set_up: &MachineSetUp,
        outside: Outside,
        memory: GuestMemory,
        channel: &Arc<Channel>,
    ) -> Result<Self, Refusal> {
        let kvm = open_kvm()?;
        let model = Model::new(&kvm, set_up.vcpus)?;
        let vm = make_vm(&kvm)?;
        memory::give_to_guest(&vm, &memory.memory, false)?;
        let vcpus = make_vcpus(&kvm, &vm, &model, set_up.vcpus)?;
        let kinds = StateKinds::new(&kvm, &vm)?;

        let log = outside.log.map(|log| (log, set_up.console_file_limit));
        let console = Console::new(outside.ring, set_up.console_ring_bytes, log);
        let console = Arc::new(Mutex::new(console));
        let flush = Arc::new(FlushTimer::new().map_err(|error| failed("timer", error))?);
        let serial_line = event()?;
        vm.register_irqfd(&serial_line, SERIAL_LINE).map_err(kvm_failed("KVM_IRQFD"))?;
        let ports = Ports::new(&serial_line, console.clone(), flush.clone())?;
        let disks = outside.disks.iter().map(File::try_clone).collect::<Result<_, _>>();
        let disks = disks.map_err(|error| failed("disk", error))?;
        let device_set_up = DeviceSetUp {
            vsock_cid: set_up.vsock_cid,
            disks: set_up.disks.iter().cloned().zip(outside.disks).collect(),
        };
        let devices = Arc::new(Devices::new(&vm, &memory.memory, device_set_up, channel)?);
        let outcome = Arc::new(Outcome::new(event()?));
        let bus = Arc::new(Bus::new(ports, devices.clone(), channel.clone()));
        let tracker = Tracker::new(devices.disk_changes().to_vec());
        Ok(Self {
            status: Status::Fresh,
            vcpus: Vcpus::new(vcpus, &bus, &outcome)?,
            devices,
            console,
            flush,
            outcome,
            clock: kvm_clock_data::default(),
            bus,
            kinds,
            set_up: set_up.clone(),
            disks,
            tracker,
            vm,
            memory,
        })
    }

    /// Says what the machine does.
    pub(super) fn status(&self) -> Status {
        self.status
    }

    /// Enters the guest's kernel.
    ///
    /// # Errors
    /// [`Refusal::State`] unless the machine is fresh.
    pub(super) fn boot(&mut self) -> Result<(), Refusal> {
        self.must_be(Status::Fresh)?;
        self.vcpus.run();
        self.status = Status::Running;
        Ok(())
    }

    /// Stops all vCPUs and notes the time. The caller then leaves the devices alone.
    ///
    /// # Errors
    /// [`Refusal::State`] unless the machine runs, [`Refusal::Failed`] for a vCPU that does not stop; then it runs on.
    pub(super) fn pause(&mut self) -> Result<(), Refusal> {
        self.must_be(Status::Running)?;
        if let Err(late) = self.vcpus.park() {
            self.vcpus.run();
            return Err(Refusal::Failed(format!("vCPUs {late:?} do not stop")));
        }
        let clock = self.vm.get_clock().map_err(kvm_failed("KVM_GET_CLOCK"));
        self.clock = clock.inspect_err(|_| self.vcpus.run())?;
        self.status = Status::Paused;
        Ok(())
    }

    /// Lets the machine go on with the time at which it was paused.
    ///
    /// # Errors
    /// [`Refusal::State`] unless the machine is paused, or KVM's.
    pub(super) fn resume(&mut self) -> Result<(), Refusal> {
        self.must_be(Status::Paused)?;
        // Without flags, KVM adds nothing for the time that has gone by.
        let clock = kvm_clock_data { clock: self.clock.clock, ..Default::default() };
        self.vm.set_clock(&clock).map_err(kvm_failed("KVM_SET_CLOCK"))?;
        self.vcpus.each(|_, vcpu| note_pause(vcpu))?;
        self.vcpus.run();
        self.status = Status::Running;
        Ok(())
    }

    /// Gives all of a paused machine's state but its memory and disks: devices first, which may still interrupt, then
    /// the vCPUs, then what they share.
    ///
    /// # Errors
    /// [`Refusal::State`] unless the machine is paused, [`Refusal::Failed`].
    pub(super) fn save(&self) -> Result<MachineState, Refusal> {
        self.must_be(Status::Paused)?;
        let devices = self.devices.save()?;
        let ports = self.bus.ports(|ports| ports.save());
        let mut vcpus = Vec::new();
        self.vcpus.each(|_, vcpu| {
            vcpus.push(VcpuState::save(vcpu, &self.kinds)?);
            Ok::<_, Refusal>(())
        })?;
        let pit = self.vm.get_pit2().map_err(kvm_failed("KVM_GET_PIT2"))?;
        let irqchips = IRQCHIPS.iter().map(|&chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.vm.get_irqchip(&mut chip).map_err(kvm_failed("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        });
        let irqchips = irqchips.collect::<Result<_, Refusal>>()?;
        Ok(MachineState { vcpus, pit, irqchips, clock_ns: self.clock.clock, ports, devices })
    }

    /// Puts a state into a machine that was just made. vCPUs come first, as KVM wants them before what they share, and
    /// the devices last, because they interrupt.
    fn restore(&mut self, state: &MachineState) -> Result<(), Refusal> {
        if state.vcpus.len() != usize::from(self.set_up.vcpus) {
            let reason =
                format!("{} were saved, {} are here", state.vcpus.len(), self.set_up.vcpus);
            return Err(config("vcpus", reason));
        }
        let mut states = state.vcpus.iter();
        self.vcpus.each(|_, vcpu| {
            states.next().map_or(Ok(()), |state| state.restore(vcpu, &self.kinds))
        })?;
        self.vm.set_pit2(&state.pit).map_err(kvm_failed("KVM_SET_PIT2"))?;
        // It is set when the machine goes on.
        self.clock = kvm_clock_data { clock: state.clock_ns, ..Default::default() };
        for chip in &state.irqchips {
            self.vm.set_irqchip(chip).map_err(kvm_failed("KVM_SET_IRQCHIP"))?;
        }
        self.bus.ports(|ports| ports.restore(&state.ports))?;
        self.devices.restore(&state.devices)
    }

    /// Looks at the machine from outside.
    ///
    /// # Errors
    /// [`Refusal::State`] unless the machine is paused, or KVM's.
    pub(super) fn inspect(&self) -> Result<Inspection, Refusal> {
        self.must_be(Status::Paused)?;
        let mut vcpus = Vec::new();
        self.vcpus.each(|id, vcpu| {
            let (last_exit, exits) = self.vcpus.exits_of(id);
            vcpus.push(VcpuInspection::new(registers_of(vcpu)?, last_exit, exits));
            Ok::<_, Refusal>(())
        })?;
        let regions = self.memory.memory.iter();
        let regions = regions
            .map(|region| MemoryRegion { start: region.start_addr().0, bytes: region.len() });
        Ok(Inspection::new(vcpus, regions.collect()))
    }

    /// Keeps track from here on of what changes in this machine, which was just loaded.
    pub(super) fn track_from_loaded(&mut self) {
        self.tracker.loaded();
    }

    /// Says what changed since a moment, if that is asked for, and with `track` notes what changes from here on. The
    /// machine must stand still, and until [`begin_moment`](Self::begin_moment).
    ///
    /// # Errors
    /// [`Refusal::Generation`] for a moment that is not known, and what KVM refuses; no moment is known any more then.
    pub(super) fn changes(
        &mut self,
        since: Option<u64>,
        track: bool,
    ) -> Result<Option<Changes>, Refusal> {
        if since.is_some() || track {
            self.tracker.look(&self.vm, &self.memory.memory, track)?;
        }
        since.map(|moment| self.tracker.since(moment)).transpose()
    }

    /// Makes this moment one since which [`changes`](Self::changes) can be asked for, and gives its number. That was
    /// called with `track` just before.
    pub(super) fn begin_moment(&mut self) -> u64 {
        self.tracker.begin()
    }

    /// Gives the memory, for a copy of this process.
    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Gives what it was made of.
    pub(super) fn set_up(&self) -> &MachineSetUp {
        &self.set_up
    }

    /// Gives each disk's file with what was said of it.
    pub(super) fn disks(&self) -> impl Iterator<Item = (&DiskSetUp, &File)> {
        self.set_up.disks.iter().zip(&self.disks)
    }

    /// Counts.
    pub(super) fn stats(&self) -> Stats {
        Stats {
            vcpu_time_ns: u64::try_from(self.vcpus.cpu_time().as_nanos()).unwrap_or(u64::MAX),
            vm_exits: Some(self.vcpus.exits()),
            guest_resident_bytes: memory::resident_bytes(&self.memory.memory),
        }
    }

    /// Gives the devices.
    pub(super) fn devices(&self) -> &Devices {
        &self.devices
    }

    /// Gives the timer after which the console is to be [shown](Self::show_console).
    pub(super) fn flush_timer(&self) -> &FlushTimer {
        &self.flush
    }

    /// Writes what the guest has printed so far.
    pub(super) fn show_console(&self) {
        lock(&self.console).write_out();
    }

    /// Gives what tells that the guest has stopped by itself.
    pub(super) fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// Stops what still runs, completes the console and says how the machine ended, once it has.
    pub(super) fn end(&mut self) -> Option<End> {
        let reason = self.outcome.reason()?;
        // One that does not stop dies with the process.
        let _ = self.vcpus.park();
        let mut console = lock(&self.console);
        console.write_out();
        let end = match reason {
            Stopped::PoweredOff => End::PoweredOff,
            Stopped::Reset if console.saw_panic() => End::Panicked,
            Stopped::Reset => End::Reset,
            Stopped::Failed(_) if console.saw_panic() => End::Panicked,
            Stopped::Failed(why) => {
                console.say(&format!("twinvm: {why}"));
                End::Failed(why)
            }
        };
        if console.lost() > 0 {
            let lost = console.lost();
            console.say(&format!("twinvm: {lost} bytes could not be written"));
        }
        Some(end)
    }

    fn must_be(&self, wanted: Status) -> Result<(), Refusal> {
        if self.status == wanted { Ok(()) } else { Err(Refusal::State(self.status)) }
    }
}

impl Files {
    /// Takes a set-up's descriptors in their order.
    fn take_apart(set_up: &MachineSetUp, fds: Vec<OwnedFd>) -> Result<Self, Refusal> {
        let mut fds = fds.into_iter().map(File::from);
        let kernel = next(&mut fds)?;
        let initrd = (0..set_up.initrd_parts).map(|_| next(&mut fds)).collect::<Result<_, _>>()?;
        Ok(Self { kernel, initrd, outside: Outside::take_apart(set_up, fds)? })
    }
}

impl Loaded {
    /// Takes the descriptors of a saved machine in their order.
    fn take_apart(
        set_up: &MachineSetUp,
        memory_files: u8,
        fds: Vec<OwnedFd>,
    ) -> Result<Self, Refusal> {
        let mut fds = fds.into_iter().map(File::from);
        let (state, pieces) = (next(&mut fds)?, next(&mut fds)?);
        let memory = (0..memory_files).map(|_| next(&mut fds)).collect::<Result<_, _>>()?;
        Ok(Self { state, pieces, memory, outside: Outside::take_apart(set_up, fds)? })
    }
}

impl Outside {
    /// Takes the last descriptors of a set-up in their order.
    fn take_apart(set_up: &MachineSetUp, fds: impl Iterator<Item = File>) -> Result<Self, Refusal> {
        let fds: Vec<_> = fds.collect();
        let expected = 1 + usize::from(set_up.console_file) + set_up.disks.len();
        if fds.len() != expected {
            let reason = format!("{} came for console and disks, not {expected}", fds.len());
            return Err(config("descriptors", reason));
        }
        let mut fds = fds.into_iter();
        let ring = next(&mut fds)?;
        check_ring(&ring, set_up.console_ring_bytes)
            .map_err(|error| config("console_ring_bytes", error.to_string()))?;
        let log = if set_up.console_file { Some(next(&mut fds)?) } else { None };
        Ok(Self { ring, log, disks: fds.collect() })
    }
}

fn next(fds: &mut impl Iterator<Item = File>) -> Result<File, Refusal> {
    fds.next().ok_or_else(|| config("descriptors", "one is missing"))
}

fn open_kvm() -> Result<Kvm, Refusal> {
    let kvm = Kvm::new().map_err(kvm_failed("/dev/kvm"))?;
    if kvm.get_api_version().cast_unsigned() != KVM_API_VERSION {
        return Err(Refusal::Failed(format!("KVM's version is {}", kvm.get_api_version())));
    }
    for cap in [
        Cap::Irqchip,
        Cap::Ioeventfd,
        Cap::Irqfd,
        Cap::ExtCpuid,
        Cap::UserMemory,
        Cap::SetTssAddr,
        Cap::Pit2,
        Cap::AdjustClock,
        Cap::ImmediateExit,
    ] {
        if !kvm.check_extension(cap) {
            return Err(Refusal::Failed(format!("KVM lacks {cap:?}")));
        }
    }
    Ok(kvm)
}

/// Makes a VM with the parts that must be there before its first vCPU.
fn make_vm(kvm: &Kvm) -> Result<VmFd, Refusal> {
    const TRIES: u32 = 50;
    let mut tries = 0;
    let vm = loop {
        match kvm.create_vm() {
            Ok(vm) => break vm,
            // A signal, or a host under pressure, may interrupt this long call.
            Err(error) if error.errno() == libc::EINTR && tries < TRIES => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(kvm_failed("KVM_CREATE_VM")(error)),
        }
    };
    vm.set_tss_address(TSS).map_err(kvm_failed("KVM_SET_TSS_ADDR"))?;
    vm.set_identity_map_address(IDENTITY_MAP).map_err(kvm_failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.create_irq_chip().map_err(kvm_failed("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(kvm_failed("KVM_CREATE_PIT2"))?;
    Ok(vm)
}

fn make_vcpus(kvm: &Kvm, vm: &VmFd, model: &Model, count: u8) -> Result<Vec<VcpuFd>, Refusal> {
    let run_bytes = kvm.get_vcpu_mmap_size().map_err(kvm_failed("KVM_GET_VCPU_MMAP_SIZE"))?;
    let mut vcpus = Vec::with_capacity(usize::from(count));
    for id in 0..count {
        let mut vcpu = vm.create_vcpu(u64::from(id)).map_err(kvm_failed("KVM_CREATE_VCPU"))?;
        memory::keep_from_copies(&mut vcpu, run_bytes)?;
        vcpu.set_cpuid2(&model.of_vcpu(id)).map_err(kvm_failed("KVM_SET_CPUID2"))?;
        prepare_all(&vcpu)?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// Lets the guest's watchdogs know that it was paused; a guest that does not use KVM's clock cannot be told.
fn note_pause(vcpu: &VcpuFd) -> Result<(), Refusal> {
    match vcpu.kvmclock_ctrl() {
        Err(error) if error.errno() != libc::EINVAL => Err(kvm_failed("KVM_KVMCLOCK_CTRL")(error)),
        _ => Ok(()),
    }
}
