//! What a program asks of the kernel.
/// Carries a process's system calls.
#[derive(Debug)]
pub struct Syscalls<'a> { _os: &'a mut super::SimOs }
