//! Kernels and initial file systems for twinvm's real machines, with the static guest agent.
//!
//! A machine boots a [`Kernel`] with an [`Image`], which it shares with all machines that boot the same, and a small
//! part of its own behind it:
//!
//! ```no_run
//! use vm_guest_image::{Image, Kernel, KernelModules, Need};
//! use vm_guest_protocol::boot::BootConfig;
//!
//! let kernel = Kernel::find(None)?;
//! let modules = KernelModules::find(&kernel, None)?;
//! let image = Image::builder().with_modules(&modules).with_directory("/srv/root").build()?;
//! let mut config = BootConfig::default();
//! config.hostname = "one".to_owned();
//! config.modules = image.modules_for(&[Need::Vsock, Need::Entropy]);
//! let part = image.part_for(&config)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod cpio;
mod disk;
mod elf;
mod image;
mod kernel;
mod modules;
mod sealed;
mod tree;
mod unpack;

pub use disk::{DiskError, FileSystem, MAX_DISK_BYTES, MIN_DISK_BYTES, create_disk, identify};
pub use image::{Image, ImageBuilder, ImageError};
pub use kernel::{KERNEL_VARIABLE, Kernel, KernelError, KernelFile, KernelFormat, Searched};
pub use modules::{KernelModules, MODULES_VARIABLE, Need};

/// The guest agent: a static x86-64 Linux program, which is `/init` of every image.
#[must_use]
pub fn agent() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/agent"))
}
