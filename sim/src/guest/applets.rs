//! skeleton
use super::{program::Step, syscalls::Syscalls};
use serde::{Deserialize, Serialize};
pub(super) const PATHS: &[&str] = &[];
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Applet { Nothing }
impl Applet {
    pub(super) fn start(_: &str, _: &[String]) -> Option<Self> { None }
    pub(super) fn step(&mut self, _: &mut Syscalls<'_>) -> Step { Step::Exit(0) }
    pub(super) fn signal(&mut self, _: &mut Syscalls<'_>, _: u8) {}
}
