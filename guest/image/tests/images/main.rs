//! Images, kernels, modules and disks, made and looked into.
#![forbid(unsafe_code)]

mod archive;
mod disks;
mod kernels;
mod made_kernel;
mod modules;
mod unpacked;
