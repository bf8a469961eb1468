//! [`Images`]: kernels and initial file systems, prepared once for all machines of a hypervisor.

use crate::sync::lock;
use std::{
    collections::BTreeMap,
    fs::{self, Metadata},
    hash::{DefaultHasher, Hash, Hasher},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use vm_core::machine::MachineError;
use vm_guest_image::{Image, Kernel, KernelError, KernelFile, KernelModules, Need};
use vm_trait::NetworkConfig;

/// How many initial file systems are kept. Those used least lately are given up; machines that have them keep them.
const KEPT: usize = 8;

/// How long ago a file must have changed for its times to tell whether it changed again.
const SETTLED: Duration = Duration::from_secs(2);

/// Prepares kernels and initial file systems, and keeps them for the next machine.
///
/// A kernel is read again when its file changes. A root directory is looked through for every machine, file by file, and
/// read again when anything in it has another name, inode, size, mode, owner or time than when it was read; one in
/// which something changed within the last two seconds is read again always, because the times of files are coarse.
#[derive(Debug, Default)]
pub struct Images {
    kernel: Option<PathBuf>,
    modules: Option<PathBuf>,
    with_libkrunfw: bool,
    shelf: Mutex<Shelf>,
}

/// What is known of a kernel by its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelTraits {
    /// Whether it finds virtio devices in the tables of ACPI.
    pub finds_devices_by_acpi: bool,
    /// Whether it prints to a serial port; else virtio's console is what it may have.
    pub drives_serial_port: bool,
    /// Whether it can have the host's sockets in place of its own.
    pub has_tsi: bool,
    /// Whether it drives virtio's network device, by itself or by a module.
    pub drives_virtio_net: bool,
}

/// A kernel and an initial file system with its modules.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The kernel as an ELF file.
    pub kernel: KernelFile,
    /// The initial file system.
    pub image: Image,
    /// What is known of the kernel.
    pub traits: KernelTraits,
}

#[derive(Debug, Default)]
struct Shelf {
    uses: u64,
    kernels: BTreeMap<Option<PathBuf>, KnownKernel>,
    images: BTreeMap<ImageKey, Arc<Slot>>,
}

#[derive(Clone, Debug)]
struct KnownKernel {
    stamp: u64,
    kernel: Kernel,
    modules: KernelModules,
    traits: KernelTraits,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ImageKey {
    kernel: PathBuf,
    root: Option<PathBuf>,
}

/// The place for one initial file system. It is locked while that is made, so that others wait for it.
#[derive(Debug, Default)]
struct Slot {
    used: Mutex<u64>,
    made: Mutex<Option<(u64, Image)>>,
}

impl Images {
    /// Uses this kernel and these modules where a configuration names no kernel.
    #[must_use]
    pub fn new(kernel: Option<PathBuf>, modules: Option<PathBuf>) -> Self {
        Self { kernel, modules, with_libkrunfw: false, shelf: Mutex::default() }
    }

    /// Takes the kernel of an installed libkrunfw before the host's own, where none is named.
    #[must_use]
    pub fn with_libkrunfw(mut self) -> Self {
        self.with_libkrunfw = true;
        self
    }

    /// Checks that there is a kernel at `path`, or by default, and that its modules are there.
    ///
    /// # Errors
    /// [`MachineError::Config`] for `kernel.path`.
    pub fn check_kernel(&self, path: Option<&Path>) -> Result<KernelTraits, MachineError> {
        Ok(self.kernel(path)?.traits)
    }

    fn kernel(&self, path: Option<&Path>) -> Result<KnownKernel, MachineError> {
        let key = path.map(Path::to_owned);
        if let Some(known) = lock(&self.shelf).kernels.get(&key)
            && fs::metadata(known.kernel.path()).is_ok_and(|now| stamp_of(&now) == known.stamp)
        {
            return Ok(known.clone());
        }
        let found = match path {
            Some(path) => Kernel::open(path),
            None if self.with_libkrunfw => Kernel::find_with_libkrunfw(self.kernel.as_deref()),
            None => Kernel::find(self.kernel.as_deref()),
        };
        let fail = |error| config("kernel.path", &error);
        let kernel = found.map_err(fail)?;
        let modules = KernelModules::find(&kernel, self.modules.as_deref()).map_err(fail)?;
        let traits = KernelTraits::of(&kernel, &modules).map_err(fail)?;
        let stamp = fs::metadata(kernel.path()).map_err(|error| config("kernel.path", &error))?;
        let known = KnownKernel { stamp: stamp_of(&stamp), kernel, modules, traits };
        let mut shelf = lock(&self.shelf);
        if shelf.kernels.len() >= KEPT {
            shelf.kernels.clear();
        }
        shelf.kernels.insert(key, known.clone());
        Ok(known)
    }

    /// Prepares a kernel and an initial file system that holds the files of `root`, if there is one. It blocks.
    ///
    /// # Errors
    /// [`MachineError::Config`] for `kernel.path` or `root.source`.
    pub fn prepare(
        &self,
        kernel: Option<&Path>,
        root: Option<&Path>,
    ) -> Result<Prepared, MachineError> {
        let KnownKernel { kernel, modules, traits, .. } = self.kernel(kernel)?;
        let file = kernel.elf().map_err(|error| config("kernel.path", &error))?;
        let image = self.image(&kernel, &modules, root)?;
        Ok(Prepared { image, kernel: file, traits })
    }

    fn image(
        &self,
        kernel: &Kernel,
        modules: &KernelModules,
        root: Option<&Path>,
    ) -> Result<Image, MachineError> {
        let stamp = fs::metadata(kernel.path()).map_err(|error| config("kernel.path", &error))?;
        let mut sum = DefaultHasher::new();
        stamp_of(&stamp).hash(&mut sum);
        let mut newest = Duration::ZERO;
        if let Some(root) = root {
            let looked = look_through(root, &mut sum, &mut newest);
            looked.map_err(|(path, error)| {
                config("root.source", &format!("{}: {error}", path.display()))
            })?;
        }
        let sum = sum.finish();
        let slot = self.slot(kernel, root);
        let mut made = lock(&slot.made);
        if let Some((of, image)) = &*made
            && *of == sum
        {
            return Ok(image.clone());
        }
        *made = None;
        let mut builder = Image::builder().with_modules(modules);
        if let Some(root) = root {
            builder = builder.with_directory(root);
        }
        let image = builder.build().map_err(|error| config("root.source", &error))?;
        if is_settled(newest) {
            *made = Some((sum, image.clone()));
        }
        Ok(image)
    }

    fn slot(&self, kernel: &Kernel, root: Option<&Path>) -> Arc<Slot> {
        let key = ImageKey { kernel: kernel.path().to_owned(), root: root.map(Path::to_owned) };
        let mut shelf = lock(&self.shelf);
        shelf.uses += 1;
        let now = shelf.uses;
        let slot = shelf.images.entry(key).or_default().clone();
        *lock(&slot.used) = now;
        if shelf.images.len() > KEPT {
            let oldest = shelf.images.iter().min_by_key(|(_, slot)| *lock(&slot.used));
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                shelf.images.remove(&oldest);
            }
        }
        slot
    }
}

impl KernelTraits {
    /// Reads a kernel for them, which has these modules.
    ///
    /// # Errors
    /// As [`Kernel::elf`].
    pub fn of(kernel: &Kernel, modules: &KernelModules) -> Result<Self, KernelError> {
        // Without modules nothing is known of what the kernel has but by its bytes.
        let by_module = modules.directory().is_some() && modules.supports(Need::Network);
        Ok(Self {
            finds_devices_by_acpi: kernel.finds_virtio_by_acpi()?,
            drives_serial_port: kernel.drives_serial_port()?,
            has_tsi: kernel.has_tsi()?,
            drives_virtio_net: by_module || kernel.drives_virtio_net()?,
        })
    }
}

/// Checks that a kernel has what a network needs.
///
/// # Errors
/// [`MachineError::Config`] for `network`.
pub fn check_network(kernel: KernelTraits, network: &NetworkConfig) -> Result<(), MachineError> {
    if matches!(network, NetworkConfig::Tsi(_)) && !kernel.has_tsi {
        let reason =
            "TSI needs a kernel that can do it: name a libkrunfw (`libkrunfw.so.5`) as the kernel";
        return Err(config("network", &reason));
    }
    if matches!(network, NetworkConfig::Passt(_)) && !kernel.drives_virtio_net {
        let reason = "passt needs a kernel with a driver for virtio's network device (virtio_net), built in or among its modules";
        return Err(config("network", &reason));
    }
    Ok(())
}

/// Looks at every file of a tree, in a fixed order and without following symbolic links.
fn look_through(
    root: &Path,
    sum: &mut DefaultHasher,
    newest: &mut Duration,
) -> Result<(), (PathBuf, io::Error)> {
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let fail = |error| (path.clone(), error);
        // The root itself may be a link to a directory.
        let looked = if path == root { fs::metadata(&path) } else { fs::symlink_metadata(&path) };
        let metadata = looked.map_err(fail)?;
        path.hash(sum);
        stamp_of(&metadata).hash(sum);
        *newest = (*newest).max(changed_at(&metadata));
        if metadata.is_dir() {
            let first = left.len();
            for entry in fs::read_dir(&path).map_err(fail)? {
                left.push(entry.map_err(fail)?.path());
            }
            left[first..].sort();
        }
    }
    Ok(())
}

fn stamp_of(metadata: &Metadata) -> u64 {
    let mut sum = DefaultHasher::new();
    (metadata.dev(), metadata.ino(), metadata.size(), metadata.rdev()).hash(&mut sum);
    (metadata.mode(), metadata.nlink(), metadata.uid(), metadata.gid()).hash(&mut sum);
    (metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec())
        .hash(&mut sum);
    sum.finish()
}

fn changed_at(metadata: &Metadata) -> Duration {
    Duration::from_secs(u64::try_from(metadata.ctime()).unwrap_or(0))
}

fn is_settled(newest: Duration) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(newest) > SETTLED
}

fn config(field: &str, error: &dyn std::fmt::Display) -> MachineError {
    MachineError::Config { field: field.to_owned(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use tempfile::TempDir;

    fn sum(root: &Path) -> u64 {
        let mut sum = DefaultHasher::new();
        look_through(root, &mut sum, &mut Duration::default()).unwrap();
        sum.finish()
    }

    #[test]
    fn networks_need_what_kernels_may_lack() {
        for (has_tsi, drives_virtio_net) in
            [(false, false), (false, true), (true, false), (true, true)]
        {
            let kernel = KernelTraits {
                finds_devices_by_acpi: true,
                drives_serial_port: true,
                has_tsi,
                drives_virtio_net,
            };
            let is_there = |network| match check_network(kernel, &network) {
                Ok(()) => true,
                Err(MachineError::Config { field, .. }) if field == "network" => false,
                Err(other) => panic!("{other}"),
            };
            assert!(is_there(NetworkConfig::None));
            assert_eq!(is_there(NetworkConfig::tsi()), has_tsi);
            assert_eq!(is_there(NetworkConfig::passt()), drives_virtio_net);
        }
    }

    #[test]
    fn every_change_of_a_tree_is_seen() {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("d")).unwrap();
        fs::write(at("d/file"), "one").unwrap();
        symlink("nowhere", at("link")).unwrap();
        let mut known = vec![sum(dir.path())];
        assert_eq!(sum(dir.path()), known[0]);
        let changes: [&dyn Fn(); 6] = [
            &|| fs::write(at("d/file"), "two, longer").unwrap(),
            &|| fs::write(at("new"), "").unwrap(),
            &|| fs::set_permissions(at("new"), fs::Permissions::from_mode(0o4755)).unwrap(),
            &|| fs::rename(at("new"), at("newer")).unwrap(),
            &|| fs::remove_file(at("link")).unwrap(),
            &|| symlink("elsewhere", at("link")).unwrap(),
        ];
        for change in changes {
            // The times of files are coarse.
            std::thread::sleep(Duration::from_millis(20));
            change();
            let now = sum(dir.path());
            assert!(!known.contains(&now));
            known.push(now);
        }
        assert!(!is_settled(changed_at(&fs::metadata(at("newer")).unwrap())));
        assert!(is_settled(Duration::from_secs(1)));
    }
}
