//! The built-in commands, which behave as BusyBox's do.

mod dd;
mod files;
mod filter;
mod listing;
mod options;
mod path;
mod printf;
mod stream_tool;
mod system;
mod test_command;
mod text;

pub(super) use path::look_up;
use printf::unescape;
pub(super) use system::DEFAULT_PATH;
pub(super) use text::errno_text;

use super::{
    program::{Step, WaitFor},
    shell::Shell,
    syscalls::Syscalls,
};
use bytes::{Bytes, BytesMut};
use dd::Copy;
use filter::Filter;
use serde::{Deserialize, Serialize};
use std::{collections::VecDeque, sync::Arc, time::Duration};
use stream_tool::StreamTool;
use vm_guest_agent::os::Errno;

/// Where the built-in commands are.
pub(super) const PATHS: &[&str] = &[
    "/bin/[",
    "/bin/basename",
    "/bin/cat",
    "/bin/chmod",
    "/bin/chown",
    "/bin/cksum",
    "/bin/cp",
    "/bin/date",
    "/bin/dd",
    "/bin/dirname",
    "/bin/echo",
    "/bin/env",
    "/bin/false",
    "/bin/head",
    "/bin/hostname",
    "/bin/id",
    "/bin/kill",
    "/bin/ln",
    "/bin/ls",
    "/bin/mkdir",
    "/bin/mktemp",
    "/bin/mv",
    "/bin/nproc",
    "/bin/printf",
    "/bin/pwd",
    "/bin/readlink",
    "/bin/rm",
    "/bin/rmdir",
    "/bin/seq",
    "/bin/sh",
    "/bin/sleep",
    "/bin/sort",
    "/bin/stat",
    "/bin/stty",
    "/bin/sync",
    "/bin/tail",
    "/bin/tcp",
    "/bin/tee",
    "/bin/test",
    "/bin/touch",
    "/bin/tr",
    "/bin/true",
    "/bin/tty",
    "/bin/uname",
    "/bin/vsock",
    "/bin/wc",
    "/bin/whoami",
    "/bin/yes",
    "/sbin/poweroff",
    "/sbin/reboot",
];

/// A running built-in command.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Applet {
    /// One that has not begun.
    Once {
        name: Arc<str>,
        argv: Vec<String>,
    },
    /// One that has done its work and may have output left.
    Finish {
        out: Out,
        code: u8,
    },
    Sleep(Option<Duration>),
    Yes(Bytes),
    Filter(Box<Filter>),
    Copy(Box<Copy>),
    Shell(Box<Shell>),
    Streams(Box<StreamTool>),
}

/// A command that does its work at once, and gives its exit code.
type Once = fn(&mut Syscalls<'_>, &[String], &mut Out) -> u8;

/// Output that waits to be written, in order.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Out {
    name: String,
    queue: VecDeque<(u32, Bytes)>,
    tail: BytesMut,
    tail_fd: u32,
}

/// How writing output goes.
pub(super) enum Flush {
    Done,
    Wait(WaitFor),
    /// An error, after which the rest is dropped.
    Failed,
}

impl Out {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// Adds bytes for standard output.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.put_to(1, bytes);
    }

    pub(super) fn line(&mut self, text: &str) {
        self.put(text.as_bytes());
        self.put(b"\n");
    }

    /// Adds a message of the command for standard error.
    pub(super) fn error(&mut self, text: &str) {
        let line = format!("{}: {text}\n", self.name);
        self.put_to(2, line.as_bytes());
    }

    pub(super) fn put_to(&mut self, fd: u32, bytes: &[u8]) {
        if self.tail_fd != fd {
            self.settle();
            self.tail_fd = fd;
        }
        self.tail.extend_from_slice(bytes);
    }

    /// Adds bytes without copying them.
    pub(super) fn pass(&mut self, fd: u32, bytes: Bytes) {
        self.settle();
        self.queue.push_back((fd, bytes));
    }

    /// Takes over what another one holds.
    pub(super) fn absorb(&mut self, mut other: Self) {
        self.settle();
        other.settle();
        self.queue.append(&mut other.queue);
        self.name = other.name;
    }

    fn settle(&mut self) {
        if !self.tail.is_empty() {
            self.queue.push_back((self.tail_fd, self.tail.split().freeze()));
        }
    }

    /// Writes what waits.
    pub(super) fn flush(&mut self, sys: &mut Syscalls<'_>) -> Flush {
        self.settle();
        while let Some((fd, bytes)) = self.queue.pop_front() {
            match sys.write(fd, bytes.clone()) {
                Ok(taken) if taken < bytes.len() => {
                    self.queue.push_front((fd, bytes.slice(taken..)));
                }
                Ok(_) => {}
                Err(Errno::AGAIN) => {
                    self.queue.push_front((fd, bytes));
                    return Flush::Wait(WaitFor::writable(fd));
                }
                Err(errno) => {
                    let message = format!("{}: write error: {}\n", self.name, errno_text(errno));
                    self.queue.clear();
                    if fd != 2 {
                        self.queue.push_back((2, message.into()));
                    }
                    return Flush::Failed;
                }
            }
        }
        Flush::Done
    }
}

impl Applet {
    /// Begins a command, or gives `None` where there is no such one.
    pub(super) fn start(key: &str, argv: &[String]) -> Option<Self> {
        PATHS.contains(&key).then_some(())?;
        let name = key.rsplit('/').next().unwrap_or(key);
        Some(match name {
            "sh" => Self::Shell(Box::new(Shell::start(argv))),
            name => Self::Once { name: name.into(), argv: argv.to_vec() },
        })
    }

    pub(super) fn step(&mut self, sys: &mut Syscalls<'_>) -> Step {
        match self {
            Self::Once { name, argv } => {
                let (name, argv) = (Arc::clone(name), std::mem::take(argv));
                self.begin(sys, &name, &argv)
            }
            Self::Finish { out, code } => match out.flush(sys) {
                Flush::Done => Step::Exit(*code),
                Flush::Wait(wait) => Step::Block(wait),
                Flush::Failed => {
                    *code = (*code).max(1);
                    Step::Continue
                }
            },
            Self::Sleep(until) => match until {
                Some(until) if *until <= sys.monotonic() => Step::Exit(0),
                Some(until) => Step::Block(WaitFor::until(*until)),
                None => Step::Block(WaitFor::signal()),
            },
            Self::Yes(block) => match sys.write(1, block.clone()) {
                Ok(_) => Step::Continue,
                Err(Errno::AGAIN) => Step::Block(WaitFor::writable(1)),
                Err(errno) => {
                    let mut out = Out::new("yes");
                    out.error(&format!("write error: {}", errno_text(errno)));
                    *self = Self::Finish { out, code: 1 };
                    Step::Continue
                }
            },
            Self::Filter(filter) => filter.step(sys),
            Self::Copy(copy) => copy.step(sys),
            Self::Shell(shell) => shell.step(sys),
            Self::Streams(tool) => match tool.step(sys) {
                Ok(step) => step,
                Err(out) => {
                    *self = Self::Finish { out, code: 1 };
                    Step::Continue
                }
            },
        }
    }

    pub(super) fn signal(&mut self, sys: &mut Syscalls<'_>, signal: u8) {
        if let Self::Shell(shell) = self {
            shell.signal(sys, signal);
        }
    }

    fn begin(&mut self, sys: &mut Syscalls<'_>, name: &str, argv: &[String]) -> Step {
        let mut out = Out::new(name);
        let code = match name {
            "sleep" => match text::sleep_time(argv, &mut out) {
                Some(time) => {
                    *self = Self::Sleep(sys.monotonic().checked_add(time));
                    return Step::Continue;
                }
                None => 1,
            },
            "yes" => {
                *self = Self::Yes(text::yes_block(argv));
                return Step::Continue;
            }
            "dd" => match Copy::start(sys, argv, &mut out) {
                Some(copy) => {
                    *self = Self::Copy(Box::new(copy));
                    return Step::Continue;
                }
                None => 1,
            },
            "env" => match system::env(sys, argv, &mut out) {
                Some(code) => code,
                None => return Step::Continue,
            },
            "tcp" | "vsock" => match StreamTool::start(sys, name, argv, &mut out) {
                Ok(tool) => {
                    *self = Self::Streams(Box::new(tool));
                    return Step::Continue;
                }
                Err(code) => code,
            },
            name if filter::NAMES.contains(&name) => {
                match Filter::start(sys, name, argv, &mut out) {
                    Ok(filter) => {
                        *self = Self::Filter(Box::new(filter));
                        return Step::Continue;
                    }
                    Err(code) => code,
                }
            }
            name => match once(name) {
                Some(command) => command(sys, argv, &mut out),
                None => 127,
            },
        };
        *self = Self::Finish { out, code };
        self.step(sys)
    }
}

/// Gives a command that does its work at once.
pub(super) fn once(name: &str) -> Option<Once> {
    Some(match name {
        "[" | "test" => test_command::test,
        "basename" => path::basename,
        "chmod" => files::chmod,
        "chown" => files::chown,
        "cp" => files::cp,
        "date" => system::date,
        "dirname" => path::dirname,
        "echo" => text::echo,
        "false" => |_, _, _| 1,
        "hostname" => system::hostname,
        "id" => system::id,
        "kill" => system::kill,
        "ln" => files::ln,
        "ls" => listing::ls,
        "mkdir" => files::mkdir,
        "mktemp" => files::mktemp,
        "mv" => files::mv,
        "nproc" => system::nproc,
        "poweroff" | "reboot" => system::halt,
        "printf" => printf::printf,
        "pwd" => system::pwd,
        "readlink" => listing::readlink,
        "rm" => files::rm,
        "rmdir" => files::rmdir,
        "seq" => text::seq,
        "stat" => listing::stat,
        "stty" => system::stty,
        "sync" => system::sync,
        "touch" => files::touch,
        "true" => |_, _, _| 0,
        "tty" => system::tty,
        "uname" => system::uname,
        "whoami" => system::whoami,
        _ => return None,
    })
}
