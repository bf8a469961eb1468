//! What twinvm's backends share that run each machine in a launcher process of its own.
//!
//! What a machine is on the host: processes, and nothing else: no file, no socket with a name. What they share with their
//! owner is [`control`]'s socket pair and memory. They end when the owner does, however that comes about.
//!
//! | looking for | look in |
//! | --- | --- |
//! | what both sides say to each other | [`control`], [`packet`] |
//! | the owner's side: which program runs a machine, and which its network | [`program`], [`passt`] |
//! | one launcher's life, and the seam's view of it | [`life`], [`machine`] |
//! | a whole backend of one hypervisor | [`backend`] |
//! | what a machine is made of | [`parcel`], [`images`], [`files`], [`cmdline`] |
//! | its console | [`ring`] |
//! | the launcher's side | [`inside`] |
#![cfg(target_os = "linux")]
#![deny(unsafe_code)]

pub mod backend;
pub mod cmdline;
pub mod control;
pub mod files;
pub mod images;
pub mod inside;
pub mod life;
pub mod machine;
pub mod packet;
pub mod parcel;
pub mod passt;
pub mod program;
mod ready;
pub mod ring;
pub mod sync;
