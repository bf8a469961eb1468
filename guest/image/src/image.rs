//! [`Image`]: the first file system of a machine.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use vm_guest_protocol::boot::{BOOT_CONFIG_PATH, BootConfig};

use crate::{
    cpio::{Archive, Metadata, TYPE_CHARACTER_DEVICE, TYPE_DIRECTORY, TYPE_FILE, TYPE_SYMLINK},
    modules::{KernelModules, Need},
    sealed, tree,
};

/// Where modules are in the archive.
const MODULES: &str = "twinvm/modules";

/// Directories that every image has, with their permissions.
const DIRECTORIES: [(&str, u32); 6] = [
    ("dev", 0o755),
    ("proc", 0o555),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("run", 0o755),
    ("bin", 0o755),
];

/// The names under which the agent is a tool.
const TOOLS: [&str; 2] = ["bin/vsock", "bin/tcp"];

/// The part of the initial file system that is equal for all machines of one kernel and one root.
///
/// It is kept in a sealed file in memory that many machines can share. It holds the [agent](crate::agent) as `/init`,
/// `/bin/vsock` and `/bin/tcp` as symbolic links to it, kernel modules in `/twinvm/modules`, `/dev`, `/proc`, `/sys`, `/tmp`, `/run`
/// and whatever [`ImageBuilder::with_directory`] names. The same input makes the same bytes: time stamps are 0.
#[derive(Clone, Debug)]
pub struct Image {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    archive: OwnedFd,
    bytes: u64,
    modules: KernelModules,
    module_paths: Vec<String>,
}

/// Describes an [`Image`] to be built.
#[derive(Clone, Debug, Default)]
pub struct ImageBuilder {
    modules: KernelModules,
    directory: Option<PathBuf>,
}

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A file or directory cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be copied into the archive: it cannot be read, or there is no memory left.
    #[error("{}: cannot be copied into the image: {source}", path.display())]
    Copy {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file changed, was replaced or went away while it was read.
    #[error("{}: changed while the image was built", path.display())]
    Changed {
        /// Which.
        path: PathBuf,
    },
    /// A file is larger than the archive's format can hold, which is 4 GiB less one byte.
    #[error("{}: {bytes} bytes are too many for an initial file system, at most 4294967295", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
    },
    /// A path in the guest, or what a symbolic link points to, is longer than 4095 bytes.
    #[error("{}: too long a name for an initial file system, at most 4095 bytes", path.display())]
    NameTooLong {
        /// Which, on the host.
        path: PathBuf,
    },
    /// The root is not a directory.
    #[error("{}: not a directory", path.display())]
    NotADirectory {
        /// Which.
        path: PathBuf,
    },
    /// Something else is where the guest needs a directory.
    #[error("{}: the guest needs a directory there", path.display())]
    Conflict {
        /// Where, on the host.
        path: PathBuf,
    },
    /// A kernel module cannot be read or unpacked.
    #[error("kernel module {}: {reason}", path.display())]
    Module {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The archive cannot be kept in memory.
    #[error("the image cannot be kept in memory: {0}")]
    Memory(#[source] io::Error),
}

impl Image {
    /// Starts the description of an image with nothing but the agent.
    #[must_use]
    pub fn builder() -> ImageBuilder {
        ImageBuilder::default()
    }

    /// The archive: a sealed file in memory. Its position is shared by all who use it, so read at explicit offsets.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.inner.archive.as_fd()
    }

    /// The archive's length in bytes, a multiple of 512.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "no image is empty")]
    pub fn len(&self) -> u64 {
        self.inner.bytes
    }

    /// The modules that every machine needs, as paths in the guest in the order in which they must be loaded: those
    /// of [`modules_for`](Self::modules_for) with [`Need::Vsock`] alone.
    #[must_use]
    pub fn module_paths(&self) -> &[String] {
        &self.inner.module_paths
    }

    /// The modules that a machine with these needs must load, as paths in the guest in the order in which they must be
    /// loaded. What the kernel has built in is not among them, nor what was not found; see
    /// [`KernelModules::supports`].
    #[must_use]
    pub fn modules_for(&self, needs: &[Need]) -> Vec<String> {
        self.inner
            .modules
            .load_order(needs)
            .map(|module| format!("/{}", archive_path(&module.name)))
            .collect()
    }

    /// The modules that the image was built with.
    #[must_use]
    pub fn modules(&self) -> &KernelModules {
        &self.inner.modules
    }

    /// Makes the part that one machine has for itself, its boot configuration, as a sealed file in memory. It is an
    /// archive too, to be put right behind the image.
    ///
    /// # Errors
    /// [`ImageError::Memory`].
    pub fn part_for(&self, config: &BootConfig) -> Result<OwnedFd, ImageError> {
        let name = BOOT_CONFIG_PATH.trim_start_matches('/').as_bytes();
        let write = || {
            let mut archive = Archive::new(sealed::in_memory("twinvm-boot")?);
            archive.add(name, Metadata::of_root(TYPE_FILE | 0o400), &config.encode())?;
            let (file, _) = archive.finish()?;
            sealed::seal(&file)?;
            Ok(OwnedFd::from(file))
        };
        write().map_err(ImageError::Memory)
    }
}

impl ImageBuilder {
    /// Puts these kernel modules into the image, in place of any named before.
    #[must_use]
    pub fn with_modules(mut self, modules: &KernelModules) -> Self {
        self.modules = modules.clone();
        self
    }

    /// Puts a copy of what is in this directory of the host at the guest's root, in place of any directory named
    /// before.
    ///
    /// All types of files keep their permissions and numeric owners; hard links become copies. Left out are `/init`,
    /// `/bin/vsock`, `/bin/tcp` and all of `/twinvm`, which are the image's own. The copy is made by [`build`](Self::build) and held
    /// in memory, by the host and by each guest, so large roots belong on a disk.
    #[must_use]
    pub fn with_directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Builds the image. Blocks on files.
    ///
    /// # Errors
    /// [`ImageError`], which names the file concerned.
    pub fn build(self) -> Result<Image, ImageError> {
        let mut archive =
            Archive::new(sealed::in_memory("twinvm-image").map_err(ImageError::Memory)?);
        match &self.directory {
            Some(directory) => {
                tree::add_tree(&mut archive, directory, |path| !is_ours(path))?;
            }
            None => archive
                .add(b".", Metadata::of_root(TYPE_DIRECTORY | 0o755), &[])
                .map_err(ImageError::Memory)?,
        }
        for (name, mode) in DIRECTORIES {
            if !is_there(self.directory.as_deref(), name)? {
                let metadata = Metadata::of_root(TYPE_DIRECTORY | mode);
                archive.add(name.as_bytes(), metadata, &[]).map_err(ImageError::Memory)?;
            }
        }
        self.add_own(&mut archive)?;
        let seal = || {
            let (file, bytes) = archive.finish()?;
            sealed::seal(&file)?;
            Ok((file.into(), bytes))
        };
        let (archive, bytes) = seal().map_err(ImageError::Memory)?;
        let inner = Inner { archive, bytes, modules: self.modules, module_paths: Vec::new() };
        let mut image = Image { inner: Arc::new(inner) };
        let module_paths = image.modules_for(&[Need::Vsock]);
        if let Some(inner) = Arc::get_mut(&mut image.inner) {
            inner.module_paths = module_paths;
        }
        Ok(image)
    }

    /// Adds what no user's directory may replace. It comes last: of two entries with one name Linux keeps the later.
    fn add_own(&self, archive: &mut Archive) -> Result<(), ImageError> {
        let mut add = |name: &str, mode: u32, device: (u32, u32), content: &[u8]| {
            let metadata = Metadata { device, ..Metadata::of_root(mode) };
            archive.add(name.as_bytes(), metadata, content).map_err(ImageError::Memory)
        };
        let none = (0, 0);
        add("dev/console", TYPE_CHARACTER_DEVICE | 0o600, (5, 1), &[])?;
        add("dev/null", TYPE_CHARACTER_DEVICE | 0o666, (1, 3), &[])?;
        add("init", TYPE_FILE | 0o755, none, crate::agent())?;
        for tool in TOOLS {
            add(tool, TYPE_SYMLINK | 0o777, none, b"/init")?;
        }
        add("twinvm", TYPE_DIRECTORY | 0o755, none, &[])?;
        add(MODULES, TYPE_DIRECTORY | 0o755, none, &[])?;
        for module in self.modules.all() {
            add(&archive_path(&module.name), TYPE_FILE | 0o644, none, &module.read()?)?;
        }
        Ok(())
    }
}

fn archive_path(module: &str) -> String {
    format!("{MODULES}/{module}.ko")
}

fn is_ours(path: &[u8]) -> bool {
    let own = [b"init".as_slice(), b"twinvm", b"dev/console", b"dev/null"];
    own.contains(&path) || TOOLS.iter().any(|tool| tool.as_bytes() == path)
}

/// Whether the user's directory has this directory; a symbolic link counts where nothing is mounted there.
fn is_there(root: Option<&Path>, name: &str) -> Result<bool, ImageError> {
    let Some(root) = root else { return Ok(false) };
    let path = root.join(OsStr::from_bytes(name.as_bytes()));
    let found = match fs::symlink_metadata(&path) {
        Ok(found) => found.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(ImageError::Io { path, source }),
    };
    let mounted_on = ["dev", "proc", "sys"].contains(&name);
    if found.is_dir() || (found.is_symlink() && !mounted_on) {
        Ok(true)
    } else {
        Err(ImageError::Conflict { path })
    }
}
