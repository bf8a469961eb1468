//! How virtual processors and the guest's clock stand still.
//!
//! A stopped process (`SIGSTOP`) runs nothing, but the clock that KVM shows its guest goes on. So before the process is
//! stopped, the virtual processors' threads are held in a handler of a signal, and the clock is read; before they are let go,
//! the clock is set to what it was. Libkrun has no say in it, and needs none: its threads see an interrupted call.
#![allow(unsafe_code)]

use super::until::until;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
};
use std::{
    arch::x86_64::_rdtsc,
    fs, io,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    ptr,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

/// What the launcher says to its child.
const HOLD: u8 = b'H';
const RELEASE: u8 = b'R';
const LOOK_AT: u8 = b'L';

/// What the child answers; anything else is why not, as text.
const DONE: &[u8] = b"done";

/// How the threads of libkrun's virtual processors are called.
const VCPU_THREAD: &str = "fc_vcpu";

/// How long threads may take to come to a handler.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often their coming is looked at.
const LOOK: Duration = Duration::from_micros(50);

/// How long is waited for an answer at a time.
const ANSWER_LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// The longest answer.
const ANSWER: usize = 256;

/// Requests of KVM (linux/kvm.h): with their sizes, as ioctl(2) encodes them.
const KVM_SET_CLOCK: libc::c_ulong = 0x4030_ae7b;
const KVM_GET_CLOCK: libc::c_ulong = 0x8030_ae7c;
const KVM_GET_REGS: libc::c_ulong = 0x8090_ae81;
const KVM_KVMCLOCK_CTRL: libc::c_ulong = 0xaead;
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;

/// `struct kvm_regs` as numbers, and where two of them are.
const REGISTERS: usize = 18;
const RIP: usize = 16;
const RFLAGS: usize = 17;

/// The flag of a processor that takes interrupts.
const INTERRUPTS: u64 = 1 << 9;

/// Whether threads are to stay in the handler.
static HELD: AtomicU32 = AtomicU32::new(0);

/// How many are in it.
static INSIDE: AtomicU32 = AtomicU32::new(0);

/// `struct kvm_clock_data`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ClockData {
    clock: u64,
    flags: u32,
    pad0: u32,
    realtime: u64,
    host_tsc: u64,
    pad: [u32; 4],
}

/// `struct kvm_device_attr`; group 0 and attribute 0 of a virtual processor are the offset of its time stamp counter.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct DeviceAttr {
    flags: u32,
    group: u32,
    attr: u64,
    addr: u64,
}

/// The launcher's side: tells the child to hold or release its virtual processors.
#[derive(Debug)]
pub(super) struct Freezer(pub(super) OwnedFd);

impl Freezer {
    /// Has the virtual processors stand still, with the guest's clock.
    ///
    /// # Errors
    /// Why they do not; then they run.
    pub(super) fn hold(&self, patience: Duration) -> io::Result<()> {
        self.say(HOLD, patience)
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// When the child does not answer.
    pub(super) fn release(&self, patience: Duration) -> io::Result<()> {
        self.say(RELEASE, patience)
    }

    /// Looks whether all virtual processors stand where they stood when this was last asked, deaf to interrupts.
    ///
    /// # Errors
    /// When they do not, or the child does not answer.
    pub(super) fn stands(&self, patience: Duration) -> io::Result<()> {
        self.say(LOOK_AT, patience)
    }

    fn say(&self, order: u8, patience: Duration) -> io::Result<()> {
        send(&self.0, &[order], SendFlags::NOSIGNAL)?;
        let answered = until(patience, Duration::ZERO, || {
            let mut readable = [PollFd::new(&self.0, PollFlags::IN)];
            match poll(&mut readable, Some(&ANSWER_LOOK)) {
                Ok(0) | Err(Errno::INTR) => None,
                Ok(1..) => Some(Ok(())),
                Err(error) => Some(Err(error)),
            }
        });
        let late = || io::Error::new(io::ErrorKind::TimedOut, "the child does not answer");
        answered.ok_or_else(late)??;
        let mut answer = [0; ANSWER];
        let (length, _) = recv(&self.0, &mut answer, RecvFlags::DONTWAIT)?;
        match &answer[..length] {
            DONE => Ok(()),
            [] => Err(io::Error::other("the child has ended")),
            why => Err(io::Error::other(String::from_utf8_lossy(why).into_owned())),
        }
    }
}

/// The child's side: starts the thread that holds and releases.
///
/// # Errors
/// When there is no thread, or the signal cannot be handled.
pub(super) fn start_keeper(orders: OwnedFd, vcpus: u8) -> io::Result<()> {
    handle_signal()?;
    let keeper = move || {
        let mut keeper = Keeper { vcpus: usize::from(vcpus), found: None, still: None };
        let mut order = [0];
        while let Ok((1, _)) = recv(&orders, &mut order, RecvFlags::empty()) {
            let done = match order[0] {
                HOLD => keeper.hold(),
                LOOK_AT => keeper.look(),
                _ => keeper.release(),
            };
            let sent = match done {
                Ok(()) => send(&orders, DONE, SendFlags::NOSIGNAL),
                Err(error) => {
                    let text = error.to_string();
                    let kept = &text.as_bytes()[..text.len().min(ANSWER)];
                    send(&orders, kept, SendFlags::NOSIGNAL)
                }
            };
            if sent.is_err() {
                return;
            }
        }
    };
    thread::Builder::new().name("twinvm keeper".to_owned()).spawn(keeper).map(drop)
}

/// Holds and releases the virtual processors of this process.
struct Keeper {
    vcpus: usize,
    found: Option<Found>,
    still: Option<Still>,
}

/// What KVM and libkrun made of the machine.
struct Found {
    threads: Vec<libc::pid_t>,
    vm: libc::c_int,
    vcpus: Vec<libc::c_int>,
    offsets: Vec<u64>,
    /// Where each stood when that was last looked at.
    places: Vec<u64>,
}

/// When it was that they stopped.
#[derive(Clone, Copy)]
struct Still {
    clock: ClockData,
    host_counter: u64,
    has_offsets: bool,
}

impl Keeper {
    /// While threads are held, one of them may have a lock of the allocator's: nothing is allocated then.
    fn hold(&mut self) -> io::Result<()> {
        if self.found.is_none() {
            self.found = Some(Found::of_this_process(self.vcpus)?);
        }
        let Some(found) = &mut self.found else { return Ok(()) };
        HELD.store(1, Ordering::SeqCst);
        for thread in &found.threads {
            signal_thread(*thread);
        }
        let wanted = u32::try_from(found.threads.len()).unwrap_or(u32::MAX);
        if !wait_for_inside(wanted) {
            let_go();
            return Err(io::Error::other("a virtual processor does not stop"));
        }
        let mut clock = ClockData::default();
        if ioctl(found.vm, KVM_GET_CLOCK, &mut clock) < 0 {
            let error = io::Error::last_os_error();
            let_go();
            return Err(error);
        }
        // SAFETY: the instruction only reads a counter.
        let host_counter = unsafe { _rdtsc() };
        let mut has_offsets = true;
        for (vcpu, offset) in found.vcpus.iter().zip(&mut found.offsets) {
            let mut attr = attr_of(offset);
            has_offsets &= ioctl(*vcpu, KVM_GET_DEVICE_ATTR, &mut attr) == 0;
        }
        self.still = Some(Still { clock, host_counter, has_offsets });
        Ok(())
    }

    /// Holds for a moment and looks where the virtual processors are.
    fn look(&mut self) -> io::Result<()> {
        self.hold()?;
        let mut stands = true;
        if let Some(found) = &mut self.found {
            for (vcpu, place) in found.vcpus.iter().zip(&mut found.places) {
                let mut registers = [0_u64; REGISTERS];
                stands &= ioctl(*vcpu, KVM_GET_REGS, &mut registers) == 0;
                stands &= registers[RFLAGS] & INTERRUPTS == 0 && registers[RIP] == *place;
                *place = registers[RIP];
            }
        }
        self.release()?;
        if stands { Ok(()) } else { Err(io::Error::other("it runs")) }
    }

    fn release(&mut self) -> io::Result<()> {
        let (Some(found), Some(still)) = (&mut self.found, self.still.take()) else {
            return Err(io::Error::other("nothing is held"));
        };
        // SAFETY: the instruction only reads a counter.
        let passed = unsafe { _rdtsc() }.wrapping_sub(still.host_counter);
        if still.has_offsets {
            for (vcpu, offset) in found.vcpus.iter().zip(&mut found.offsets) {
                *offset = offset.wrapping_sub(passed);
                ioctl(*vcpu, KVM_SET_DEVICE_ATTR, &mut attr_of(offset));
            }
        }
        let mut clock = ClockData { clock: still.clock.clock, ..ClockData::default() };
        let set = ioctl(found.vm, KVM_SET_CLOCK, &mut clock);
        let error = io::Error::last_os_error();
        for vcpu in &found.vcpus {
            // It tells the guest's watchdogs; a guest without that clock has nothing to be told.
            // SAFETY: this request takes no argument.
            unsafe { libc::ioctl(*vcpu, KVM_KVMCLOCK_CTRL, 0) };
        }
        let_go();
        wait_for_inside(0);
        if set < 0 { Err(error) } else { Ok(()) }
    }
}

impl Found {
    /// Looks for the threads and descriptors of the machine, which are there once libkrun has started it.
    fn of_this_process(vcpus: usize) -> io::Result<Self> {
        let mut threads = Vec::new();
        for entry in fs::read_dir("/proc/self/task")? {
            let entry = entry?;
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            if name.starts_with(VCPU_THREAD)
                && let Some(thread) = entry.file_name().to_str().and_then(|id| id.parse().ok())
            {
                threads.push(thread);
            }
        }
        let (mut vm, mut of_vcpus) = (None, Vec::new());
        for entry in fs::read_dir("/proc/self/fd")? {
            let entry = entry?;
            let Some(fd) = entry.file_name().to_str().and_then(|fd| fd.parse().ok()) else {
                continue;
            };
            let target = fs::read_link(entry.path()).unwrap_or_default();
            if target == Path::new("anon_inode:kvm-vm") {
                vm = Some(fd);
            } else if target.to_string_lossy().starts_with("anon_inode:kvm-vcpu") {
                of_vcpus.push(fd);
            }
        }
        match vm {
            Some(vm) if threads.len() == vcpus && of_vcpus.len() == vcpus => {
                let (offsets, places) = (vec![0; vcpus], vec![0; vcpus]);
                Ok(Self { threads, vm, vcpus: of_vcpus, offsets, places })
            }
            _ => Err(io::Error::other("the machine has not begun to run")),
        }
    }
}

fn attr_of(offset: &mut u64) -> DeviceAttr {
    DeviceAttr { addr: ptr::from_mut(offset).expose_provenance() as u64, ..DeviceAttr::default() }
}

fn ioctl<T>(fd: libc::c_int, request: libc::c_ulong, argument: &mut T) -> libc::c_int {
    // SAFETY: callers pair each request with the structure that it reads or writes, which is borrowed for the call; what
    // that points to in turn is borrowed from a value that the caller has.
    unsafe { libc::ioctl(fd, request, ptr::from_mut(argument)) }
}

/// Waits until so many threads are in the handler, and says whether they are.
fn wait_for_inside(wanted: u32) -> bool {
    until(PATIENCE, LOOK, || (INSIDE.load(Ordering::SeqCst) == wanted).then_some(())).is_some()
}

fn let_go() {
    HELD.store(0, Ordering::SeqCst);
    // SAFETY: the address is a static's; waking touches no memory.
    unsafe {
        libc::syscall(libc::SYS_futex, HELD.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
    }
}

/// The signal that holds a thread; libkrun has the one before.
fn signal_number() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

fn signal_thread(thread: libc::pid_t) {
    let process = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the call takes numbers alone. A thread that has ended is no thread of this process any more.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal_number()) };
}

fn handle_signal() -> io::Result<()> {
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = hold_thread as extern "C" fn(libc::c_int) as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler only does what a handler may: atomics and a system call.
    if unsafe { libc::sigaction(signal_number(), &raw const action, ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Keeps the thread until it is released.
extern "C" fn hold_thread(_: libc::c_int) {
    // SAFETY: the function has no conditions.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: the location is this thread's own and always there.
    let errno = unsafe { *place };
    INSIDE.fetch_add(1, Ordering::SeqCst);
    while HELD.load(Ordering::SeqCst) == 1 {
        // SAFETY: the address is a static's; without a time the call waits until it is woken.
        unsafe {
            let forever = ptr::null::<libc::timespec>();
            libc::syscall(libc::SYS_futex, HELD.as_ptr(), libc::FUTEX_WAIT, 1, forever);
        }
    }
    INSIDE.fetch_sub(1, Ordering::SeqCst);
    // SAFETY: as above.
    unsafe { *place = errno };
}

impl AsFd for Freezer {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
