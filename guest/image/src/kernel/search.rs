//! Where kernels usually are.

use std::{
    cmp::Ordering,
    env, fs,
    path::{Path, PathBuf},
};

use super::{Kernel, KernelError, Searched};

/// Names a kernel file, as the configuration may.
pub const KERNEL_VARIABLE: &str = "TWINVM_KERNEL";

const OWN: [&str; 2] = ["/usr/local/lib/twinvm/vmlinux", "/usr/lib/twinvm/vmlinux"];

/// Where libkrunfw usually is.
pub(super) const LIBKRUNFW: [&str; 6] = [
    "/usr/local/lib64/libkrunfw.so.5",
    "/usr/local/lib/x86_64-linux-gnu/libkrunfw.so.5",
    "/usr/local/lib/libkrunfw.so.5",
    "/usr/lib64/libkrunfw.so.5",
    "/usr/lib/x86_64-linux-gnu/libkrunfw.so.5",
    "/usr/lib/libkrunfw.so.5",
];

const BOOT: &str = "/boot";
const PREFIX: &str = "vmlinuz-";

/// `before_host` are the places to look at before those of the host's own kernels.
pub(super) fn find(explicit: Option<&Path>, before_host: &[&str]) -> Result<Kernel, KernelError> {
    if let Some(path) = explicit {
        return Kernel::open(path);
    }
    if let Some(path) = env::var_os(KERNEL_VARIABLE).filter(|path| !path.is_empty()) {
        return Kernel::open(Path::new(&path));
    }
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    first_of(usual_places(&release, Path::new(BOOT), before_host))
}

fn first_of(places: Vec<PathBuf>) -> Result<Kernel, KernelError> {
    let mut searched = Vec::new();
    for path in places {
        match Kernel::open(&path) {
            Ok(kernel) => return Ok(kernel),
            Err(error) => searched.push(Searched { problem: problem(&error), path }),
        }
    }
    Err(KernelError::NotFound { searched })
}

/// The error without the path, which stands before it in the list.
fn problem(error: &KernelError) -> String {
    match error {
        KernelError::Io { source, .. } => source.to_string(),
        KernelError::NotAKernel { found, .. } => format!("no x86-64 kernel but {found}"),
        KernelError::Truncated { .. } => "a truncated kernel".to_owned(),
        other => other.to_string(),
    }
}

fn usual_places(release: &str, boot: &Path, before_host: &[&str]) -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> = OWN.iter().chain(before_host).map(PathBuf::from).collect();
    places.push(boot.join(format!("vmlinux-{release}")));
    places.push(boot.join(format!("{PREFIX}{release}")));
    places.push(PathBuf::from(format!("/lib/modules/{release}/vmlinuz")));
    places.push(boot.join("vmlinuz"));
    places.push(PathBuf::from("/vmlinuz"));
    for path in newest_first(boot) {
        if !places.contains(&path) {
            places.push(path);
        }
    }
    places
}

fn newest_first(boot: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(boot) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(PREFIX))
        .collect();
    names.sort_by(|one, other| compare_releases(other, one));
    names.into_iter().map(|name| boot.join(name)).collect()
}

/// Orders names such that runs of digits count as numbers: 6.9 comes before 6.10.
fn compare_releases(one: &str, other: &str) -> Ordering {
    let (mut one, mut other) = (one, other);
    while let (Some(left), Some(right)) = (take_part(&mut one), take_part(&mut other)) {
        let order = match (left.parse::<u64>(), right.parse::<u64>()) {
            (Ok(left), Ok(right)) => left.cmp(&right),
            _ => left.cmp(right),
        };
        if order.is_ne() {
            return order;
        }
    }
    one.len().cmp(&other.len())
}

/// Takes the digits, or what is before the next digit, off the front.
fn take_part<'a>(text: &mut &'a str) -> Option<&'a str> {
    let digits = text.starts_with(|first: char| first.is_ascii_digit());
    let end = text.find(|next: char| next.is_ascii_digit() != digits).unwrap_or(text.len());
    let (part, rest) = text.split_at(end);
    *text = rest;
    (!part.is_empty()).then_some(part)
}
