//! The agent's command line, and its life as an ordinary process.

use super::{
    Ended, LinuxOs, Listener, Scope, ServeConfig, init, remove_tree, serve, set_mark,
    stream_tool::{self, Transport},
};
use crate::{core::AgentConfig, os::GuestOs};
use rustix::{
    fs::{Gid, Uid},
    process::Pid,
};
use std::{
    ffi::OsString,
    fmt,
    fs::DirBuilder,
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// How the agent says what is wrong with its command line.
pub const USAGE: &str = "\
usage: vm-guest-agent --listen-unix PATH [options]
  --listen-unix PATH   serve on a Unix socket, as an ordinary process
  --die-with-parent    end, with all that was started, when standard input hangs up
  --user UID:GID       become this user first
  --mark NUMBER        mark all that descends from the agent
  --own-dir PATH       make this directory, with `scratch` in it, for the user; remove it at the end";

const LISTEN_UNIX: &str = "--listen-unix";

/// The name of the directory for the guest's files in the agent's own one.
pub const SCRATCH: &str = "scratch";

/// The exit code of a bad command line.
pub const EXIT_USAGE: u8 = 2;
/// The exit code when the agent could not be set up.
pub const EXIT_SETUP: u8 = 3;
/// The exit code when the owner hung up.
pub const EXIT_OWNER_GONE: u8 = 4;

/// How often the processes that are left at the end are killed again, and how long after.
const LAST_ROUNDS: u32 = 2500;
const LAST_PAUSE: Duration = Duration::from_millis(2);

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where to listen.
    pub listen_unix: PathBuf,
    /// Whether to end when standard input hangs up.
    pub die_with_parent: bool,
    /// User and group to become.
    pub user: Option<(u32, u32)>,
    /// The mark of all that descends from the agent; see [`set_mark`].
    pub mark: Option<u64>,
    /// A directory to make and to remove at the end.
    pub own_dir: Option<PathBuf>,
}

/// What is wrong with a command line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UsageError {
    /// It makes no sense.
    #[error(transparent)]
    Arguments(#[from] lexopt::Error),
    /// A value is not what its option takes.
    #[error("`{value}` is no value for {option}")]
    Value {
        /// The option.
        option: &'static str,
        /// What was given.
        value: String,
    },
    /// It does not say where to listen, which only the first process of a machine may leave out.
    #[error("--listen-unix is missing, and this is not the first process of a machine")]
    NothingToServe,
}

/// Reads a command line, without the program's own name.
///
/// # Errors
/// When it makes no sense.
pub fn parse<I>(arguments: I) -> Result<Options, UsageError>
where
    I: IntoIterator,
    I::Item: Into<OsString>,
{
    use lexopt::prelude::{Long, ValueExt};
    let mut parser = lexopt::Parser::from_args(arguments);
    let mut listen_unix = None;
    let mut options = Options {
        listen_unix: PathBuf::new(),
        die_with_parent: false,
        user: None,
        mark: None,
        own_dir: None,
    };
    while let Some(argument) = parser.next()? {
        match argument {
            Long("listen-unix") => listen_unix = Some(parser.value()?.into()),
            Long("die-with-parent") => options.die_with_parent = true,
            Long("user") => options.user = Some(user_of(&parser.value()?.string()?)?),
            Long("mark") => options.mark = Some(parser.value()?.parse()?),
            Long("own-dir") => options.own_dir = Some(parser.value()?.into()),
            other => return Err(other.unexpected().into()),
        }
    }
    options.listen_unix = listen_unix.ok_or(UsageError::NothingToServe)?;
    Ok(options)
}

/// Does what a command line asks for, and gives the code to exit with.
///
/// Called by the name of a [`stream_tool`] it is that tool. As the first process of a machine, where the command line
/// is what the kernel could not use of its own, it sets the machine up and serves, unless `--listen-unix` is there.
///
/// It must be called on the only thread of the process.
pub fn main<I>(arguments: I) -> u8
where
    I: IntoIterator,
    I::Item: Into<OsString>,
{
    let arguments: Vec<OsString> = arguments.into_iter().map(Into::into).collect();
    if let Some(transport) = Transport::ALL.into_iter().find(|it| called_as(it.tool())) {
        return stream_tool::main(transport, &arguments);
    }
    if rustix::process::getpid() == Pid::INIT && !arguments.iter().any(asks_to_listen) {
        return init::run();
    }
    let options = match parse(arguments) {
        Ok(options) => options,
        Err(error) => {
            say(&format_args!("{error}\n{USAGE}"));
            return EXIT_USAGE;
        }
    };
    match run(&options) {
        Ok(Ended::PoweredOff) => 0,
        Ok(Ended::OwnerGone) => EXIT_OWNER_GONE,
        // As shells say it.
        Ok(Ended::Signaled(signal)) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        Err(error) => {
            say(&error);
            EXIT_SETUP
        }
    }
}

fn asks_to_listen(argument: &OsString) -> bool {
    argument.to_str().is_some_and(|text| text.starts_with(LISTEN_UNIX))
}

/// Says whether this program was started under a name.
fn called_as(name: &str) -> bool {
    std::env::args_os().next().is_some_and(|own| Path::new(&own).file_name() == Some(name.as_ref()))
}

fn run(options: &Options) -> io::Result<Ended> {
    // Signals to the owner's terminal and group are not ours. It fails for a group's leader, who needs it less.
    let _ = rustix::process::setsid();
    if let Some(dir) = &options.own_dir {
        make_own_dir(dir, options.user)?;
    }
    let served = set_up(options).and_then(|listener| {
        let lifeline = match options.die_with_parent {
            true => Some(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?),
            false => None,
        };
        let scope = Scope::Descendants;
        serve(&listener, ServeConfig { agent: AgentConfig::default(), scope, lifeline })
    });
    let ended = end_descendants();
    let removed = options.own_dir.as_deref().map_or(Ok(()), remove_tree);
    served.and_then(|served| ended.and(removed).map(|()| served))
}

/// Makes a directory that stands nowhere yet, private to the user.
fn make_own_dir(dir: &Path, user: Option<(u32, u32)>) -> io::Result<()> {
    let make = |dir: &Path| {
        DirBuilder::new().mode(0o700).create(dir)?;
        match user {
            Some((uid, gid)) => std::os::unix::fs::chown(dir, Some(uid), Some(gid)),
            None => Ok(()),
        }
    };
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", dir.display()));
    make(dir).map_err(named)?;
    make(&dir.join(SCRATCH)).and_then(|()| std::env::set_current_dir(dir)).map_err(|error| {
        let _ = remove_tree(dir);
        named(error)
    })
}

/// Makes this process fit to be an agent, and listens.
fn set_up(options: &Options) -> io::Result<Listener> {
    if let Some((uid, gid)) = options.user {
        become_user(uid, gid)?;
    }
    rustix::thread::set_no_new_privs(true)?;
    if let Some(mark) = options.mark {
        set_mark(mark)?;
    }
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    Listener::unix(&options.listen_unix)
}

/// Becomes another user for good, if we are not that user already.
fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    if rustix::process::getuid().as_raw() == uid && rustix::process::getgid().as_raw() == gid {
        return Ok(());
    }
    // The calls below change one thread only.
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("an agent that changes its user must have one thread"));
    }
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

/// Kills and reaps all that descends from this process.
fn end_descendants() -> io::Result<()> {
    let mut os = LinuxOs::new(Scope::Descendants);
    for _ in 0..LAST_ROUNDS {
        os.signal_all(9);
        os.reap();
        if !os.has_processes() {
            // Those that ended since they were last looked for would be left to somebody else.
            os.reap();
            return Ok(());
        }
        thread::sleep(LAST_PAUSE);
    }
    Err(io::Error::other("processes are left that cannot be killed"))
}

fn user_of(value: &str) -> Result<(u32, u32), UsageError> {
    value
        .split_once(':')
        .and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)))
        .ok_or_else(|| UsageError::Value { option: "--user", value: value.to_owned() })
}

fn say(what: &dyn fmt::Display) {
    // With standard error gone there is nobody to tell.
    let _ = writeln!(io::stderr(), "vm-guest-agent: {what}");
}
