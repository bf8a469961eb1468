//! [`Plan`]: what a machine is made of.

use super::{passt::Passt, place::Place, ports::HostPorts, tree::Tree};
use rustix::fs::MemfdFlags;
use std::{
    ffi::CString,
    fs::File,
    io::{self, Seek},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};
use vm_launcher::{
    cmdline,
    control::{ConsoleDevice, MachineSetUp, Refusal},
    inside::{
        console::{Console, check_ring},
        refuse::{config, failed},
    },
};
use vm_trait::NetworkConfig;

/// The longest command line that Linux on x86-64 reads, with its null.
const CMDLINE_BYTES: usize = 2048;

/// A page of the guest's memory.
const PAGE: u64 = 4096;

/// The longest word with which libkrun announces a device, with its space.
const DEVICE_WORD: usize = " virtio_mmio.device=4K@0x123456789:99".len();

/// The devices that libkrun adds beside disks and host directories: balloon, entropy, vsock.
const OWN_DEVICES: usize = 3;

/// How many devices more libkrun has interrupt lines for.
const MOST_OTHERS: usize = 8;

/// How much of a file is copied at a time.
const STEP: usize = 64 << 20;

/// Spaces and dashes that libkrun adds.
const SEPARATORS: usize = 16;

/// What a machine is made of.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) vcpus: u8,
    pub(super) memory_mib: u32,
    pub(super) cmdline: CString,
    pub(super) kernel: OwnedFd,
    pub(super) initrd: File,
    pub(super) disks: Vec<Disk>,
    /// The host directories that the guest sees.
    pub(super) shares: Option<Tree>,
    pub(super) place: Place,
    pub(super) console_device: ConsoleDevice,
    pub(super) network: NetworkConfig,
    /// By what the guest's packets reach the host, where its network is of packets.
    pub(super) passt: Option<Passt>,
    /// Nobody else has them as long as the machine is there.
    _ports: HostPorts,
}

/// A disk of a machine.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) serial: CString,
    pub(super) read_only: bool,
    pub(super) file: OwnedFd,
}

impl Plan {
    /// Takes a description apart, and makes the console.
    ///
    /// # Errors
    /// [`Refusal::Config`] with the field, [`Refusal::Exhausted`] or [`Refusal::Failed`].
    pub(super) fn new(
        set_up: &MachineSetUp,
        fds: Vec<OwnedFd>,
    ) -> Result<(Self, Console), Refusal> {
        // All host directories come by one device; a console that is virtio's is another, and so is a network of packets.
        let beside = [
            !set_up.shares.is_empty(),
            set_up.console_device == ConsoleDevice::Virtio,
            matches!(set_up.network, NetworkConfig::Passt(_)),
        ];
        let beside = beside.into_iter().filter(|is_there| *is_there).count();
        let others = beside + set_up.disks.len();
        if others > MOST_OTHERS {
            let reason = format!(
                "{} disks, libkrun has interrupts for {}",
                set_up.disks.len(),
                MOST_OTHERS - beside
            );
            return Err(config("disks", reason));
        }
        let mut fds = fds.into_iter();
        let mut next = |what: &str| fds.next().ok_or_else(|| config(what, "no descriptor came"));
        let kernel = next("kernel")?;
        let mut parts = Vec::new();
        for _ in 0..set_up.initrd_parts {
            parts.push(File::from(next("initrd")?));
        }
        let ring = File::from(next("console")?);
        check_ring(&ring, set_up.console_ring_bytes)
            .map_err(|error| config("console", error.to_string()))?;
        let log = match set_up.console_file {
            true => Some((File::from(next("console_file")?), set_up.console_file_limit)),
            false => None,
        };
        let mut disks = Vec::new();
        for disk in &set_up.disks {
            let serial = CString::new(disk.serial.as_str())
                .map_err(|error| config("disks", error.to_string()))?;
            disks.push(Disk { serial, read_only: disk.read_only, file: next("disks")? });
        }
        // Before this process may become one of another user namespace.
        let (ports, mut passt) = network_of(set_up)?;
        let place = Place::new();
        let place = place.map_err(|error| failed("a place for the agent's socket", error))?;
        let mut shared = Vec::new();
        for share in &set_up.shares {
            shared.push((share.name.as_str(), share.read_only, next("mounts")?));
        }
        let shares = match shared.is_empty() {
            true => None,
            false => Some(
                Tree::new(&shared).map_err(|error| failed("a tree of host directories", error))?,
            ),
        };
        if fds.next().is_some() {
            return Err(Refusal::Failed("too many descriptors came".to_owned()));
        }
        let initrd = joined(parts).map_err(|error| failed("initial RAM disk", error))?;
        let length = initrd.metadata().map_err(|error| failed("initial RAM disk", error))?.len();
        // Libkrun does not survive one that is larger than memory; what fits beside it is for the kernel to say.
        if length >= u64::from(set_up.memory_mib) << 20 {
            let reason =
                format!("{} MiB do not hold {length} bytes to start from", set_up.memory_mib);
            return Err(config("memory_mib", reason));
        }
        let console = Console::new(ring, set_up.console_ring_bytes, log);
        if let Some(passt) = &mut passt {
            passt.await_ready(set_up.network.ports())?;
        }
        let plan = Self {
            vcpus: set_up.vcpus,
            memory_mib: set_up.memory_mib,
            cmdline: command_line(set_up.console_device, &set_up.cmdline, others)?,
            kernel,
            initrd,
            disks,
            shares,
            place,
            console_device: set_up.console_device,
            network: set_up.network.clone(),
            passt,
            _ports: ports,
        };
        Ok((plan, console))
    }

    /// Lists all its descriptors.
    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let mut fds = vec![self.kernel.as_fd(), self.initrd.as_fd(), self.place.as_fd()];
        fds.extend(self.disks.iter().map(|disk| disk.file.as_fd()));
        fds.extend(self.shares.as_ref().map(AsFd::as_fd));
        fds.extend(self.passt.as_ref().and_then(Passt::packets));
        fds
    }
}

/// Takes the ports of a machine, and starts passt where its network needs it.
fn network_of(set_up: &MachineSetUp) -> Result<(HostPorts, Option<Passt>), Refusal> {
    let mapped = set_up.network.ports();
    let mut ports = HostPorts::reserve(mapped)?;
    let passt = match (&set_up.network, &set_up.passt) {
        (NetworkConfig::Passt(_), Some(program)) => {
            ports.leave();
            Some(Passt::start(program, mapped)?)
        }
        (NetworkConfig::Passt(_), None) => return Err(config("network", "no passt was named")),
        _ => None,
    };
    Ok((ports, passt))
}

/// Puts the command line together, without what libkrun adds at its end.
fn command_line(console: ConsoleDevice, user: &str, others: usize) -> Result<CString, Refusal> {
    // What comes after either is no word for the kernel, and libkrun has some to add.
    if user.split_whitespace().any(|word| word == "--") {
        return Err(config("cmdline", "`--` would hide the devices from the kernel"));
    }
    if !user.matches('"').count().is_multiple_of(2) {
        return Err(config("cmdline", "a quotation mark is not closed"));
    }
    let line = cmdline::line(console, user, []);
    let added = SEPARATORS + DEVICE_WORD * (OWN_DEVICES + others);
    cmdline::check(user, &line, CMDLINE_BYTES.saturating_sub(added))?;
    CString::new(line).map_err(|error| config("cmdline", error.to_string()))
}

/// Puts the parts of an initial RAM disk one after the other into a file in memory, each at a multiple of 4.
fn joined(parts: Vec<File>) -> io::Result<File> {
    let whole = rustix::fs::memfd_create("twinvm-initrd", MemfdFlags::CLOEXEC)?;
    let mut whole = File::from(whole);
    for part in parts {
        let at = whole.stream_position()?.next_multiple_of(4);
        whole.set_len(at)?;
        whole.seek(io::SeekFrom::Start(at))?;
        // Other launchers have the same file open, and its position with it, so that is left alone.
        let mut at = 0;
        while rustix::fs::sendfile(&whole, &part, Some(&mut at), STEP)? > 0 {}
    }
    // Libkrun lets it end where memory does, and it has to begin with a page.
    let length = whole.stream_position()?.next_multiple_of(PAGE);
    whole.set_len(length)?;
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Write, os::unix::fs::FileExt};

    fn file(content: &[u8]) -> File {
        let mut file = File::from(rustix::fs::memfd_create("part", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn parts_are_joined_at_multiples_of_four() {
        let whole = joined(vec![file(b"abcde"), file(b""), file(b"fg")]).unwrap();
        let mut bytes = [1; 10];
        whole.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"abcde\0\0\0fg");
        assert_eq!(whole.metadata().unwrap().len(), PAGE);
    }

    #[test]
    fn parts_that_others_copy_too_are_whole() {
        let content: Vec<u8> = (0..4_000_000_u32).flat_map(|at| u8::try_from(at % 251)).collect();
        let part = file(&content);
        let copies: Vec<_> = (0..4)
            .map(|_| {
                let shared = part.try_clone().unwrap();
                std::thread::spawn(move || {
                    for _ in 0..10 {
                        let whole = joined(vec![shared.try_clone().unwrap()]).unwrap();
                        let mut bytes = vec![0; 4_000_000];
                        whole.read_exact_at(&mut bytes, 0).unwrap();
                        let whole = bytes
                            .iter()
                            .zip(0_u32..)
                            .all(|(byte, at)| u32::from(*byte) == at % 251);
                        assert!(whole);
                    }
                })
            })
            .collect();
        for copy in copies {
            copy.join().unwrap();
        }
    }

    #[test]
    fn words_that_would_hide_devices_are_refused() {
        let line = |user| command_line(ConsoleDevice::Virtio, user, 2);
        assert!(line("quiet a=\"b c\"").is_ok());
        for user in ["quiet -- x", "--", "a=\"b", &"x".repeat(2000), "ä"] {
            assert!(matches!(line(user), Err(Refusal::Config { .. })), "{user}");
        }
    }
}
