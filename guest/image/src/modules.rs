//! [`KernelModules`]: the parts of a kernel that a machine loads.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    image::ImageError,
    kernel::{Kernel, KernelError, Searched},
    unpack,
};

/// Names a directory of modules, as the configuration may.
pub const MODULES_VARIABLE: &str = "TWINVM_MODULES";

/// The largest module, or list of modules, that is read.
const MAX_MODULE_BYTES: u64 = 64 << 20;

/// How many files are looked at where there is no `modules.dep`.
const MAX_FILES: usize = 100_000;

/// Something a machine may need its kernel to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Need {
    /// The stream between host and guest, over virtio-mmio. Every machine needs it.
    Vsock,
    /// Disks.
    Block,
    /// Entropy from the host.
    Entropy,
    /// Ext4 file systems (and ext2, ext3).
    Ext4,
    /// Squashfs file systems.
    Squashfs,
    /// EROFS file systems.
    Erofs,
    /// A writable layer over a file system that is not written to.
    Overlay,
    /// Directories of the host.
    Shares,
    /// A network device.
    Network,
}

impl Need {
    /// All of them, in the order in which they are loaded.
    pub const ALL: [Self; 9] = [
        Self::Vsock,
        Self::Block,
        Self::Entropy,
        Self::Ext4,
        Self::Squashfs,
        Self::Erofs,
        Self::Overlay,
        Self::Shares,
        Self::Network,
    ];

    /// The modules that provide it, dependencies apart.
    fn modules(self) -> &'static [&'static str] {
        match self {
            Self::Vsock => &["virtio_mmio", "vsock", "vmw_vsock_virtio_transport"],
            Self::Block => &["virtio_mmio", "virtio_blk"],
            Self::Entropy => &["virtio_mmio", "virtio_rng"],
            Self::Ext4 => &["ext4"],
            Self::Squashfs => &["squashfs"],
            Self::Erofs => &["erofs"],
            Self::Overlay => &["overlay"],
            Self::Shares => &["virtio_mmio", "fuse", "virtiofs"],
            Self::Network => &["virtio_mmio", "virtio_net"],
        }
    }

    /// Modules that are asked for by name at run time, so no list of dependencies has them; not all kernels do either.
    fn asked_for_at_run_time(self) -> &'static [&'static str] {
        match self {
            Self::Ext4 | Self::Erofs => &["crc32c_generic", "crc32c_cryptoapi"],
            _ => &[],
        }
    }
}

/// The kernel modules that machines need, found on the host.
///
/// The default is none, for a kernel that has everything built in.
#[derive(Clone, Debug, Default)]
pub struct KernelModules {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    directory: Option<PathBuf>,
    /// Each after all that it depends on.
    modules: Vec<Module>,
    missing: BTreeMap<Need, Vec<String>>,
}

/// One module.
#[derive(Clone, Debug)]
pub(crate) struct Module {
    /// Its name as Linux knows it, with `_` for `-`.
    pub(crate) name: String,
    path: PathBuf,
    needs: BTreeSet<Need>,
}

impl KernelModules {
    /// Finds the modules for a kernel.
    ///
    /// Looks only in `explicit` if given, else only in the directory that `TWINVM_MODULES` names if it is set, else,
    /// with the kernel's release, in `lib/modules/RELEASE` and `../lib/modules/RELEASE` beside the kernel file, then in
    /// `/lib/modules/RELEASE` and `/usr/lib/modules/RELEASE`. Dependencies come from `modules.dep`, or from the modules
    /// themselves where that file is absent. A kernel that has the drivers of [`Need::Vsock`] built in needs no
    /// directory.
    ///
    /// # Errors
    /// [`KernelError::NoModules`] if no directory was found, [`KernelError::MissingModules`] if modules that every
    /// machine needs are not in it, [`KernelError::Io`] if it cannot be read.
    pub fn find(kernel: &Kernel, explicit: Option<&Path>) -> Result<Self, KernelError> {
        let from_environment = || {
            std::env::var_os(MODULES_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from)
        };
        let named = explicit.map(Path::to_owned).or_else(from_environment);
        let candidates = match &named {
            Some(directory) => match kernel.release() {
                Some(release) => vec![directory.join(release), directory.clone()],
                None => vec![directory.clone()],
            },
            None => usual_directories(kernel),
        };
        if let Some(directory) = candidates.iter().find(|directory| holds_modules(directory)) {
            return Self::from_directory(directory, kernel);
        }
        if named.is_none() && has_drivers_built_in(kernel)? {
            return Ok(Self::default());
        }
        let searched = candidates
            .into_iter()
            .map(|path| Searched {
                problem: if path.is_dir() { "holds no modules" } else { "no such directory" }
                    .to_owned(),
                path,
            })
            .collect();
        Err(KernelError::NoModules {
            kernel: kernel.path().to_owned(),
            release: kernel.release().map(str::to_owned),
            searched,
        })
    }

    /// The directory they were found in; `None` if the kernel has everything built in.
    #[must_use]
    pub fn directory(&self) -> Option<&Path> {
        self.inner.directory.as_deref()
    }

    /// Whether the kernel has what is needed for this, built in or as modules found.
    #[must_use]
    pub fn supports(&self, need: Need) -> bool {
        !self.inner.missing.contains_key(&need)
    }

    /// All modules found, each after those it depends on.
    pub(crate) fn all(&self) -> &[Module] {
        &self.inner.modules
    }

    /// The modules for these needs, each after those it depends on.
    pub(crate) fn load_order(&self, needs: &[Need]) -> impl Iterator<Item = &Module> {
        self.all().iter().filter(move |module| needs.iter().any(|need| module.needs.contains(need)))
    }

    fn from_directory(directory: &Path, kernel: &Kernel) -> Result<Self, KernelError> {
        let index = Index::read(directory)?;
        let mut plan = Plan { index: &index, modules: Vec::new(), position: BTreeMap::new() };
        let mut missing: BTreeMap<Need, Vec<String>> = BTreeMap::new();
        for need in Need::ALL {
            for name in need.asked_for_at_run_time() {
                let _ = plan.add(name, need, &mut BTreeSet::new());
            }
            let mut absent = BTreeSet::new();
            for name in need.modules() {
                plan.add(name, need, &mut absent)?;
            }
            if !absent.is_empty() {
                missing.insert(need, absent.into_iter().collect());
            }
        }
        if let Some(names) = missing.get(&Need::Vsock)
            && !has_drivers_built_in(kernel)?
        {
            return Err(KernelError::MissingModules {
                directory: directory.to_owned(),
                names: names.clone(),
            });
        }
        missing.remove(&Need::Vsock);
        let modules = plan.modules;
        Ok(Self {
            inner: Arc::new(Inner { directory: Some(directory.to_owned()), modules, missing }),
        })
    }
}

impl Module {
    /// Its content, unpacked.
    pub(crate) fn read(&self) -> Result<Vec<u8>, ImageError> {
        read_module(&self.path).map_err(|error| ImageError::Module {
            path: self.path.clone(),
            reason: error.to_string(),
        })
    }
}

/// Modules by name: where each is, and the names of what it depends on if that is known.
type ModuleFiles = BTreeMap<String, (PathBuf, Option<Vec<String>>)>;

/// What a directory of modules holds.
struct Index {
    modules: ModuleFiles,
    built_in: BTreeSet<String>,
}

impl Index {
    fn read(directory: &Path) -> Result<Self, KernelError> {
        let built_in = read_list(&directory.join("modules.builtin"))?.unwrap_or_default();
        let built_in = built_in.lines().filter_map(module_name).collect();
        let modules = match read_list(&directory.join("modules.dep"))? {
            Some(list) => listed(directory, &list),
            None => found(directory)?,
        };
        Ok(Self { modules, built_in })
    }

    fn dependencies(&self, name: &str) -> Result<Option<(&Path, Vec<String>)>, KernelError> {
        let Some((path, known)) = self.modules.get(name) else { return Ok(None) };
        let dependencies = match known {
            Some(known) => known.clone(),
            None => stated_dependencies(path)
                .map_err(|source| KernelError::Io { path: path.clone(), source })?,
        };
        Ok(Some((path, dependencies)))
    }
}

/// The order of loading, as it grows.
struct Plan<'a> {
    index: &'a Index,
    modules: Vec<Module>,
    position: BTreeMap<String, usize>,
}

impl Plan<'_> {
    /// Adds a module and before it what it depends on, or marks them as needed for one thing more. Names that are
    /// neither modules nor built in go to `absent`.
    fn add(
        &mut self,
        name: &str,
        need: Need,
        absent: &mut BTreeSet<String>,
    ) -> Result<(), KernelError> {
        // Two steps for each module, on a stack of our own: the list may be as deep as its author likes.
        let mut stack = vec![(name.to_owned(), false)];
        let mut seen = BTreeSet::new();
        while let Some((name, dependencies_done)) = stack.pop() {
            if dependencies_done {
                self.place(&name, need);
                continue;
            }
            if self.index.built_in.contains(&name) || !seen.insert(name.clone()) {
                continue;
            }
            let Some((_, dependencies)) = self.index.dependencies(&name)? else {
                absent.insert(name);
                continue;
            };
            stack.push((name, true));
            stack.extend(dependencies.into_iter().rev().map(|name| (name, false)));
        }
        Ok(())
    }

    fn place(&mut self, name: &str, need: Need) {
        if let Some(position) = self.position.get(name) {
            self.modules[*position].needs.insert(need);
        } else if let Some((path, _)) = self.index.modules.get(name) {
            self.position.insert(name.to_owned(), self.modules.len());
            self.modules.push(Module {
                name: name.to_owned(),
                path: path.clone(),
                needs: BTreeSet::from([need]),
            });
        }
    }
}

fn usual_directories(kernel: &Kernel) -> Vec<PathBuf> {
    let Some(release) = kernel.release() else { return Vec::new() };
    let beside = kernel.path().parent().map(Path::to_owned).unwrap_or_default();
    [
        beside.join("lib/modules"),
        beside.join("../lib/modules"),
        "/lib/modules".into(),
        "/usr/lib/modules".into(),
    ]
    .into_iter()
    .map(|directory| directory.join(release))
    .collect()
}

fn holds_modules(directory: &Path) -> bool {
    ["modules.dep", "modules.builtin", "modules.order", "kernel"]
        .iter()
        .any(|name| directory.join(name).exists())
}

/// Whether the kernel holds the names of the drivers, which it does only where they are built in.
fn has_drivers_built_in(kernel: &Kernel) -> Result<bool, KernelError> {
    kernel.contains(&[b"\0vmw_vsock_virtio_transport\0", b"\0virtio-mmio\0"])
}

/// The name of the module in a file, as Linux knows it.
fn module_name(path: &str) -> Option<String> {
    let file = path.trim().rsplit('/').next()?;
    let (name, suffix) = file.split_once(".ko")?;
    let plain = ["", ".xz", ".gz", ".zst"].contains(&suffix);
    (plain && !name.is_empty() && name != "." && name != "..").then(|| name.replace('-', "_"))
}

/// Reads `modules.dep`: a line for each module with all it depends on, directly or not.
fn listed(directory: &Path, list: &str) -> ModuleFiles {
    let mut modules = BTreeMap::new();
    for line in list.lines() {
        let Some((path, dependencies)) = line.split_once(':') else { continue };
        let Some(name) = module_name(path) else { continue };
        let dependencies = dependencies.split_whitespace().filter_map(module_name).collect();
        modules.insert(name, (directory.join(path.trim()), Some(dependencies)));
    }
    modules
}

/// Looks for modules where nobody ran `depmod`.
fn found(directory: &Path) -> Result<ModuleFiles, KernelError> {
    let mut modules = BTreeMap::new();
    let mut directories = vec![directory.to_owned()];
    let mut looked_at = 0;
    while let Some(directory) = directories.pop() {
        let failed = |source| KernelError::Io { path: directory.clone(), source };
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            looked_at += 1;
            if looked_at > MAX_FILES {
                return Err(failed(io::Error::other(
                    "too many files for a directory of kernel modules",
                )));
            }
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_dir() {
                directories.push(entry.path());
            } else if kind.is_file()
                && let Some(name) = entry.file_name().to_str().and_then(module_name)
            {
                modules.insert(name, (entry.path(), None));
            }
        }
    }
    Ok(modules)
}

/// What a module says it depends on directly: `depends=a,b` among the strings of its section `.modinfo`.
fn stated_dependencies(path: &Path) -> io::Result<Vec<String>> {
    let module = read_module(path)?;
    let marker = b"\0depends=";
    let Some(start) = memchr::memmem::find(&module, marker) else { return Ok(Vec::new()) };
    let rest = &module[start + marker.len()..];
    let end = memchr::memchr(0, rest).unwrap_or(rest.len());
    let names = String::from_utf8_lossy(&rest[..end]);
    Ok(names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect())
}

fn read_module(path: &Path) -> io::Result<Vec<u8>> {
    let bytes = read_bounded(path)?;
    let Some(method) = unpack::Method::of(&bytes) else {
        return if bytes.starts_with(b"\x7fELF") {
            Ok(bytes)
        } else {
            Err(io::Error::other("not a kernel module"))
        };
    };
    let mut module = Vec::new();
    unpack::unpack(method, &bytes, &mut module, MAX_MODULE_BYTES).map_err(io::Error::other)?;
    if module.starts_with(b"\x7fELF") {
        Ok(module)
    } else {
        Err(io::Error::other("holds no kernel module"))
    }
}

fn read_list(path: &Path) -> Result<Option<String>, KernelError> {
    match read_bounded(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(KernelError::Io { path: path.to_owned(), source }),
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_MODULE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_MODULE_BYTES {
        Err(io::Error::other("too large"))
    } else {
        Ok(bytes)
    }
}
