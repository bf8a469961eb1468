//! The agent core against a small kernel and a strict host.

mod exec;
mod fake_os;
mod files;
mod host;
mod hostile;
mod process;
mod session;
mod speed;
