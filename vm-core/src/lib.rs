//! The one [`VmInstance`](vm_trait::VmInstance) implementation behind every twinvm backend.
//!
//! A backend supplies a [`Hypervisor`](machine::Hypervisor), and gets the lifecycle, deadlines, cancellation, the agent
//! client, the snapshot container and fork from here; they are the same code under simulation.
//!
//! # Map of the crate
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`machine`] | the seam to the hypervisor |
//! | [`env`](mod@env) | the seam to clock, tasks and randomness |
//! | [`host_fs`] | the seam to the host's file system |
//! | [`container`] | the snapshot file, and chains of them |
//! | [`image`] | guest memory and disks, as snapshots hold them |
//! | [`shared_root`] | what a host directory must have in it to be a root |
//! | [`observe`] | what the core reports of its work |
//! | [`timeline`] | what was reported, as lines for people |
//! | [`fault`] | the vocabulary of faults |
#![forbid(unsafe_code)]

mod agent;
pub mod backend;
pub mod container;
pub mod env;
mod error;
pub mod fault;
pub mod host_fs;
pub mod image;
pub mod machine;
pub mod observe;
pub mod shared_root;
pub mod timeline;
mod vm;
