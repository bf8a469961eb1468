//! What an owner and a launcher say to each other.
//!
//! They share a `SOCK_SEQPACKET` socket pair; the launcher inherits its end as [`CONTROL_FD`]. Every packet is one
//! [`ToLauncher`] or [`FromLauncher`] in postcard, with the descriptors that the message names beside it, in order. A
//! second inherited descriptor, [`LIFELINE_FD`], is the reading end of a pipe to which nobody ever writes: it hangs up
//! when the owner is gone.
//!
//! The launcher speaks first ([`FromLauncher::Hello`]). The owner then sends [`ToLauncher::SetUp`] once, and requests
//! under numbers that count up; each is answered with [`FromLauncher::Reply`] under the same number, in any order.

use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use vm_trait::{Inspection, NetworkConfig};

/// The descriptor on which a launcher finds its control socket.
pub const CONTROL_FD: i32 = 3;

/// The descriptor on which a launcher finds its lifeline.
pub const LIFELINE_FD: i32 = 4;

/// The version of these messages; both sides must have the same.
pub const CONTROL_VERSION: u32 = 10;

/// The largest packet, in bytes.
pub const MAX_PACKET: usize = 64 << 10;

/// The most descriptors beside one packet.
pub const MAX_FDS: usize = 64;

/// What an owner says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToLauncher {
    /// Describes the machine. Descriptors: the kernel; each part of the initial RAM disk in order
    /// ([`MachineSetUp::initrd_parts`]); the console ring; the console file where
    /// [`console_file`](MachineSetUp::console_file) says so; then each of [`disks`](MachineSetUp::disks) and
    /// [`shares`](MachineSetUp::shares).
    SetUp(Box<MachineSetUp>),
    /// Describes a machine that was saved; it is then paused where it was. It comes in place of
    /// [`SetUp`](Self::SetUp) and is answered like it. Descriptors: the state; a file that says which part of memory
    /// stands where; the files in which memory stands; then the same as with `SetUp` from the console ring on.
    ///
    /// A part of memory is said with four little-endian `u64`: its address as the guest knows it, its length, the number
    /// of the file, counted from zero, and the place in that. All but the file's number are multiples of 4096. The
    /// parts are in ascending order and do not overlap; all other memory is zeros. The files must stay as they are for
    /// as long as the launcher lives.
    Load {
        /// The machine, without anything to boot.
        set_up: Box<MachineSetUp>,
        /// In how many files memory stands.
        memory_files: u8,
        /// Whether to keep track of what changes from here on, as generation 0.
        track: bool,
    },
    /// Asks for something.
    Request {
        /// The request's number.
        id: u64,
        /// What is asked for.
        request: Request,
    },
    /// The owner took streams that waited at a listener ([`FromLauncher::Incoming`]), so that there is room for as many
    /// more. It is not answered, and means nothing once another listener has the port.
    Taken {
        /// The listener's port.
        port: u32,
        /// The listener's number.
        listener: u64,
        /// How many.
        streams: u32,
    },
}

/// A machine to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSetUp {
    /// A name for the process and its messages.
    pub name: String,
    /// How many vCPUs, 1 to 8.
    pub vcpus: u8,
    /// How much memory, in MiB, at least 64.
    pub memory_mib: u32,
    /// Words for the kernel's command line, beside the launcher's own.
    pub cmdline: String,
    /// Whether the command line names the virtio devices, for kernels that don't look for them in the tables of ACPI. One
    /// that looks there and is told here too complains about each.
    pub devices_in_cmdline: bool,
    /// Where the kernel prints to. A launcher that has no such device leaves it without a console.
    pub console_device: ConsoleDevice,
    /// How many descriptors make up the initial RAM disk; they are put one after the other, each at a multiple of 4.
    pub initrd_parts: u8,
    /// How many of the last console bytes the ring keeps. The ring's file has this layout: a little-endian `u64`
    /// that counts all bytes ever written, then the ring itself; byte `n` of the console stands at `8 + n % size`.
    pub console_ring_bytes: u32,
    /// Whether there is a file to which all of the console is appended.
    pub console_file: bool,
    /// The most bytes that are appended to the console file.
    pub console_file_limit: u64,
    /// The block devices.
    pub disks: Vec<DiskSetUp>,
    /// The host's directories, whose descriptors come last.
    pub shares: Vec<ShareSetUp>,
    /// The guest's vsock address.
    pub vsock_cid: u32,
    /// The guest's network.
    pub network: NetworkConfig,
    /// The path of passt, for a network by way of it.
    pub passt: Option<OsString>,
}

/// A device that a kernel prints to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleDevice {
    /// A PC's first serial port, `ttyS0`.
    SerialPort,
    /// Virtio's console, `hvc0`.
    Virtio,
}

/// A block device to be made; its file comes as a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSetUp {
    /// The serial string that the guest finds it by, at most 20 bytes.
    pub serial: String,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// A directory of the host that the guest sees; it comes as a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareSetUp {
    /// The name that the guest finds it by, a single part of a path.
    pub name: String,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// What a launcher is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Enter the guest's kernel; answered once a vCPU runs.
    Boot,
    /// Stop all vCPUs and devices; answered once they stand still.
    Pause,
    /// Let them run.
    Resume,
    /// Say what the machine does.
    Status,
    /// Count.
    Stats,
    /// Look at the paused machine.
    Inspect,
    /// Take the descriptor beside this as a host's hybrid vsock connection: it says `CONNECT port\n`, and gets
    /// `OK hostport\n`, or a hang-up where nothing in the guest listens; then bytes flow. While the machine is paused,
    /// that takes until it goes on. A launcher that has the stream by other means answers with
    /// [`Answer::Connected`] instead, and the descriptor is of no use.
    Connect,
    /// From now on, hand over what the guest connects to this port of the host ([`FromLauncher::Incoming`]), and refuse
    /// it while as many streams as the backlog wait to be [taken](ToLauncher::Taken). What listened on the port before
    /// does so no more.
    Listen {
        /// The port.
        port: u32,
        /// A number that no other listener of this machine has.
        listener: u64,
        /// The most streams that wait.
        backlog: u32,
    },
    /// Refuse what the guest connects to this port from now on.
    Unlisten {
        /// The port.
        port: u32,
    },
    /// Save this paused machine as it is now. Once this is answered, the machine may go on; what it was comes through the
    /// pipe, whose writing end is the first descriptor. The others are an empty file for each writable disk.
    Capture {
        /// Of memory and disks, only what changed since this generation.
        since: Option<u64>,
        /// Whether to keep track of what changes from here on.
        track: bool,
    },
    /// Make a copy of this paused machine, as it is now, in a process of its own that shares memory until either side
    /// writes. Descriptors: the copy's control socket; its lifeline; a file for its standard error; its console ring,
    /// with what is to stand in it; the console file where the set-up said so; and for each writable disk an empty
    /// file, which becomes the copy's own. The copy says [`FromLauncher::Hello`] and [`FromLauncher::SetUpDone`] on its
    /// own control socket, unasked, and is then paused, without any of the connections of this one. Descriptor beside
    /// the answer: the copy's process (pidfd_open(2)); nobody has to reap it.
    Fork {
        /// A name for the copy's process and its messages.
        name: String,
    },
}

/// What a launcher says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromLauncher {
    /// It runs.
    Hello {
        /// Its [`CONTROL_VERSION`].
        version: u32,
    },
    /// The answer to [`ToLauncher::SetUp`].
    SetUpDone(Result<(), Refusal>),
    /// The answer to a request.
    Reply {
        /// The request's number.
        id: u64,
        /// What came of it.
        result: Result<Answer, Refusal>,
    },
    /// The guest connected to a port that is listened on. Descriptor: the stream.
    Incoming {
        /// The port.
        port: u32,
        /// The number of the listener that it waits at.
        listener: u64,
    },
    /// The agent marked how far it has come.
    Mark {
        /// A [`BootMark`](vm_guest_protocol::boot::BootMark) as a number.
        mark: u8,
        /// When, in nanoseconds of the host's monotonic clock.
        at_ns: u64,
    },
    /// Descriptor: another process that belongs to the machine (pidfd_open(2)), and ends with the launcher. The machine
    /// has not ended before it has.
    Companion,
    /// The machine has ended by itself; nothing follows, and the launcher exits.
    Ended(End),
}

/// What a launcher answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done.
    Done,
    /// The descriptor beside this is the stream, which ends at once where nothing in the guest listens.
    Connected,
    /// What the machine does.
    Status(Status),
    /// What it counts.
    Stats(Stats),
    /// What it looks like.
    Inspection(Box<Inspection>),
    /// The capture has begun.
    Captured {
        /// The generation that begins with it, where changes are kept track of.
        generation: Option<u64>,
    },
    /// The copy was made.
    Forked {
        /// The number of its process.
        pid: u32,
    },
}

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// It is made and was not booted.
    Fresh,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs and devices stand still.
    Paused,
}

/// What a machine counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// CPU time of all vCPU threads, in nanoseconds.
    pub vcpu_time_ns: u64,
    /// How often a vCPU came back to the VMM, where that is counted.
    pub vm_exits: Option<u64>,
    /// How much of the guest's memory is resident, in bytes.
    pub guest_resident_bytes: u64,
}

/// Why a launcher could not do something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// A field of the set-up cannot be had.
    #[error("{field}: {reason}")]
    Config {
        /// The field.
        field: String,
        /// Why not.
        reason: String,
    },
    /// The host ran out of something.
    #[error("out of {0}")]
    Exhausted(String),
    /// What was saved is of another kind of machine.
    #[error("{field} is {found}, wanted {wanted}")]
    Incompatible {
        /// What differs.
        field: String,
        /// What was saved.
        found: String,
        /// What is needed.
        wanted: String,
    },
    /// What was saved makes no sense.
    #[error("damaged state: {0}")]
    Corrupt(String),
    /// What changed since this generation is not known.
    #[error("nobody knows what changed since generation {0}")]
    Generation(u64),
    /// The machine is not in a state for it.
    #[error("the machine is {0:?}")]
    State(Status),
    /// Machines of this kind cannot do it.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// Nothing in the guest listens there.
    #[error("nothing in the guest listens on the port")]
    NotListening,
    /// Somebody has this port of the host.
    #[error("port {0} of the host is taken")]
    PortInUse(u32),
    /// A system call, KVM or the VMM's library failed.
    #[error("{0}")]
    Failed(String),
}

/// How a machine ended by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The guest powered off.
    PoweredOff,
    /// The guest reset the machine without a panic.
    Reset,
    /// The guest's kernel panicked, or its first process died.
    Panicked,
    /// The VMM or the guest did what cannot be gone on from: what it was, for people.
    Failed(String),
}
