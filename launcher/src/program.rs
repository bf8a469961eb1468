//! [`LauncherProgram`]: which program runs a machine, and how it is started.

use crate::control::{CONTROL_FD, LIFELINE_FD};
use command_fds::{CommandFdExt, FdMapping};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::MemfdFlags,
    net::{AddressFamily, SocketFlags, SocketType},
    process::{Pid, PidfdFlags, Signal},
};
use std::{
    env,
    ffi::{OsStr, OsString},
    fmt,
    fs::{self, File},
    io::{self, PipeReader, PipeWriter},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileExt, PermissionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant, SystemTime},
};

/// How much of what a launcher says on its standard error goes into an error.
const MESSAGE_BYTES: u64 = 4 << 10;

/// The launcher of one backend.
#[derive(Debug)]
pub struct LauncherKind {
    /// The name of its binary.
    pub binary: &'static str,
    /// The variable that names the binary's place.
    pub variable: &'static str,
    /// The variable that makes [`run_if_asked`](Self::run_if_asked) run it.
    pub run_variable: &'static str,
    can_be_this_program: AtomicBool,
}

impl LauncherKind {
    /// Names a backend's launcher.
    #[must_use]
    pub const fn new(
        binary: &'static str,
        variable: &'static str,
        run_variable: &'static str,
    ) -> Self {
        Self { binary, variable, run_variable, can_be_this_program: AtomicBool::new(false) }
    }

    /// Becomes the launcher, which is `main`, where this process was started for that, and then does not return.
    ///
    /// It must be the first thing that a program does, before there are other threads. A program that calls it needs no
    /// other binary to run machines; see [`LauncherProgram::find`] for when it is used.
    pub fn run_if_asked(&self, main: impl FnOnce() -> ExitCode) {
        if env::var_os(self.run_variable).is_some() {
            std::process::exit(match main() {
                code if code == ExitCode::SUCCESS => 0,
                _ => 1,
            });
        }
        self.can_be_this_program.store(true, Ordering::Relaxed);
    }
}

/// Which program runs a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LauncherProgram {
    /// This program, run once more; its `main` must call [`LauncherKind::run_if_asked`] first.
    ThisProgram,
    /// A binary.
    Binary(PathBuf),
}

/// There is no launcher to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoLauncher {
    /// The name of its binary.
    pub binary: &'static str,
    /// Where it was looked for, and what was wrong there.
    pub searched: Vec<String>,
}

impl LauncherProgram {
    /// Finds a launcher. In this order:
    ///
    /// 1. what the [variable](LauncherKind::variable) names, and nothing else where it is set;
    /// 2. the [binary](LauncherKind::binary) beside this program or in the directory above, as for a test or an example; one that is
    ///    older than this program is passed over where this program can be the launcher itself, because it is then most
    ///    likely left from an earlier build;
    /// 3. this program, if its `main` called [`LauncherKind::run_if_asked`];
    /// 4. the binary in the directories of `PATH`.
    ///
    /// # Errors
    /// [`NoLauncher`] with every place that was searched.
    pub fn find(kind: &LauncherKind) -> Result<Self, NoLauncher> {
        let this = env::current_exe().ok();
        let itself = kind.can_be_this_program.load(Ordering::Relaxed);
        let named = env::var_os(kind.variable);
        Self::find_in(kind, named, this.as_deref(), itself, env::var_os("PATH"))
    }

    /// Takes a binary.
    ///
    /// # Errors
    /// [`NoLauncher`] where it is no file that can be executed.
    pub fn at(kind: &LauncherKind, path: impl Into<PathBuf>) -> Result<Self, NoLauncher> {
        let path = path.into();
        match flaw(&path) {
            None => Ok(Self::Binary(path)),
            Some(flaw) => {
                let searched = vec![format!("{}: {flaw}", path.display())];
                Err(NoLauncher { binary: kind.binary, searched })
            }
        }
    }

    fn find_in(
        kind: &LauncherKind,
        variable: Option<OsString>,
        this: Option<&Path>,
        itself: bool,
        path: Option<OsString>,
    ) -> Result<Self, NoLauncher> {
        if let Some(named) = variable {
            return Self::at(kind, PathBuf::from(named)).map_err(|mut error| {
                for place in &mut error.searched {
                    place.insert_str(0, &format!("{}=", kind.variable));
                }
                error
            });
        }
        let mut searched = vec![format!("{}: not set", kind.variable)];
        let near = this.into_iter().flat_map(|this| this.ancestors().skip(1).take(2));
        for place in near.map(|dir| dir.join(kind.binary)) {
            match flaw(&place) {
                None if itself && this.is_some_and(|this| is_older(&place, this)) => {}
                None => return Ok(Self::Binary(place)),
                Some(flaw) => searched.push(format!("{}: {flaw}", place.display())),
            }
        }
        if itself {
            return Ok(Self::ThisProgram);
        }
        searched.push(
            "this program: its main cannot be the launcher (run_launcher_if_asked)".to_owned(),
        );
        let path = path.unwrap_or_default();
        match first_program(&path, kind.binary, &mut searched) {
            Some(found) => Ok(Self::Binary(found)),
            None => Err(NoLauncher { binary: kind.binary, searched }),
        }
    }

    /// Starts a launcher: nothing of this process's environment, its descriptors or its terminal reaches it but what it
    /// is given. It blocks until the program runs.
    ///
    /// # Errors
    /// The operating system's.
    pub fn start(&self, kind: &LauncherKind) -> io::Result<Started> {
        let began = Instant::now();
        let (Ours { control, lifeline, messages }, its_control, its_lifeline) = Ours::new()?;
        let mut command = self.command(kind);
        command
            .arg0(kind.binary)
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(messages.try_clone()?)
            .fd_mappings(vec![
                FdMapping { parent_fd: its_control, child_fd: CONTROL_FD },
                FdMapping { parent_fd: its_lifeline.into(), child_fd: LIFELINE_FD },
            ])
            .map_err(io::Error::other)?;
        let process = Process::new(command.spawn()?)?;
        let spawn_time = began.elapsed();
        Ok(Started { control, process, lifeline, messages, spawn_time })
    }

    fn command(&self, kind: &LauncherKind) -> Command {
        let mut command = match self {
            // The link leads to this very program even if its file was replaced meanwhile.
            Self::ThisProgram => Command::new(Path::new("/proc/self/exe")),
            Self::Binary(path) => Command::new(path),
        };
        command.env_clear();
        if let Some(libraries) = env::var_os("LD_LIBRARY_PATH") {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        if *self == Self::ThisProgram {
            command.env(kind.run_variable, "1");
        }
        command
    }
}

impl fmt::Display for LauncherProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ThisProgram => f.write_str("this program"),
            Self::Binary(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Display for NoLauncher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no launcher program {}; searched {}", self.binary, self.searched.join("; "))
    }
}

impl std::error::Error for NoLauncher {}

/// What an owner keeps of what it shares with one launcher.
#[derive(Debug)]
pub struct Ours {
    /// The owner's end of the control socket; it does not block.
    pub control: OwnedFd,
    /// When it closes, the launcher ends.
    pub lifeline: PipeWriter,
    /// What the launcher writes to its standard error.
    pub messages: File,
}

impl Ours {
    /// Makes it, with the launcher's ends of control socket and lifeline.
    ///
    /// # Errors
    /// The operating system's.
    pub fn new() -> io::Result<(Self, OwnedFd, PipeReader)> {
        let (control, its_control) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        let (its_lifeline, lifeline) = io::pipe()?;
        let messages =
            File::from(rustix::fs::memfd_create("vm-launcher.log", MemfdFlags::CLOEXEC)?);
        Ok((Self { control, lifeline, messages }, its_control, its_lifeline))
    }
}

/// A launcher that was started; it ends when this is dropped.
#[derive(Debug)]
pub struct Started {
    /// The owner's end of the control socket; it does not block.
    pub control: OwnedFd,
    /// Its process.
    pub process: Process,
    /// When it closes, the launcher ends.
    pub lifeline: PipeWriter,
    /// What the launcher writes to its standard error.
    pub messages: File,
    /// How long starting took.
    pub spawn_time: Duration,
}

/// A launcher's process, named whatever becomes of its pid. It is killed when dropped, and reaped if it is a child.
#[derive(Debug)]
pub struct Process {
    /// None where a launcher made it; whoever is its parent then reaps it.
    child: Option<Child>,
    pid: u32,
    exact: OwnedFd,
}

impl Process {
    /// Takes charge of a child. It is killed and reaped where it cannot be named.
    ///
    /// # Errors
    /// The operating system's.
    pub fn new(mut child: Child) -> io::Result<Self> {
        let exact = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::other("not a process id"))
            .and_then(|pid| Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?));
        match exact {
            Ok(exact) => Ok(Self { pid: child.id(), child: Some(child), exact }),
            Err(error) => {
                child.kill()?;
                child.wait()?;
                Err(error)
            }
        }
    }

    /// Takes charge of a process that a launcher made.
    #[must_use]
    pub fn of_launcher(pid: u32, exact: OwnedFd) -> Self {
        Self { child: None, pid, exact }
    }

    /// Gives its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Gives a descriptor that becomes readable when the process has ended.
    ///
    /// # Errors
    /// The operating system's.
    pub fn exact(&self) -> io::Result<OwnedFd> {
        self.exact.try_clone()
    }

    /// Waits for its end, and reaps it. Once that is done, it can be called again. There is no status of a process that
    /// is not this one's child.
    ///
    /// # Errors
    /// The operating system's.
    pub fn reap(&mut self) -> io::Result<Option<ExitStatus>> {
        match &mut self.child {
            Some(child) => child.wait().map(Some),
            None => {
                let mut exit = [PollFd::new(&self.exact, PollFlags::IN)];
                rustix::io::retry_on_intr(|| rustix::event::poll(&mut exit, None))?;
                Ok(None)
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        kill(&self.exact);
        let _ = self.reap();
    }
}

/// Kills a process. One that has ended already is what is wanted.
pub fn kill(exact: &OwnedFd) {
    let _ = rustix::process::pidfd_send_signal(exact, Signal::KILL);
}

/// How long the end of a process that was killed may take.
const KILLED: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Kills what may be a process and waits for its end. What is none is passed over.
pub(crate) fn await_end(exact: &OwnedFd) {
    if rustix::process::pidfd_send_signal(exact, Signal::KILL).is_ok() {
        let mut exit = [PollFd::new(exact, PollFlags::IN)];
        let _ = rustix::io::retry_on_intr(|| rustix::event::poll(&mut exit, Some(&KILLED)));
    }
}

/// Gives the last of what a launcher wrote to its standard error.
#[must_use]
pub fn last_words(messages: &File) -> String {
    let length = messages.metadata().map_or(0, |metadata| metadata.len());
    let kept = length.min(MESSAGE_BYTES);
    let mut bytes = vec![0; usize::try_from(kept).unwrap_or(0)];
    match messages.read_exact_at(&mut bytes, length - kept) {
        Ok(()) => String::from_utf8_lossy(&bytes).trim().to_owned(),
        Err(_) => String::new(),
    }
}

/// Gives the first program of that name in a list of directories, as in `PATH`, and notes what is wrong in those before it.
pub(crate) fn first_program(
    path: &OsStr,
    name: &str,
    searched: &mut Vec<String>,
) -> Option<PathBuf> {
    for place in env::split_paths(path).map(|dir| dir.join(name)) {
        match flaw(&place) {
            None => return Some(place),
            Some(flaw) => searched.push(format!("{}: {flaw}", place.display())),
        }
    }
    None
}

/// Says why a file cannot be run, if it cannot.
pub(crate) fn flaw(path: &Path) -> Option<String> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some("not there".to_owned()),
        Err(error) => Some(error.to_string()),
        Ok(metadata) if !metadata.is_file() => Some("not a file".to_owned()),
        Ok(metadata) if metadata.permissions().mode() & 0o111 == 0 => {
            Some("not executable".to_owned())
        }
        Ok(_) => None,
    }
}

fn is_older(one: &Path, than: &Path) -> bool {
    let written = |path: &Path| -> Option<SystemTime> { fs::metadata(path).ok()?.modified().ok() };
    matches!((written(one), written(than)), (Some(one), Some(than)) if one < than)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Read,
        os::{fd::AsFd, unix::fs::symlink},
    };
    use tempfile::TempDir;

    static KIND: LauncherKind =
        LauncherKind::new(BINARY, "TWINVM_TEST_LAUNCHER", "TWINVM_RUN_TEST_LAUNCHER");

    const BINARY: &str = "vm-test-launcher";

    fn program(dir: &Path, name: &str, seconds: u64) -> PathBuf {
        let path = dir.join(name);
        fs::create_dir_all(dir).unwrap();
        let file = File::create(&path).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o755)).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
        path
    }

    #[test]
    fn a_launcher_is_found_in_the_promised_order() {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.path().join(name);
        let this = program(&at("target/deps"), "test-1234", 100);
        let path = Some(OsString::from(at("bin")));
        let find = |variable: Option<&Path>, itself| {
            let variable = variable.map(|path| path.as_os_str().to_owned());
            LauncherProgram::find_in(&KIND, variable, Some(&this), itself, path.clone())
        };
        let searched = find(None, false).unwrap_err().searched;
        for place in ["target/deps", "target", "bin"] {
            let place = at(place).join(BINARY).display().to_string();
            assert!(searched.iter().any(|text| text.starts_with(&place)), "{place}: {searched:?}");
        }
        assert_eq!(find(None, true), Ok(LauncherProgram::ThisProgram));
        let on_path = program(&at("bin"), BINARY, 200);
        assert_eq!(find(None, false), Ok(LauncherProgram::Binary(on_path)));
        assert_eq!(find(None, true), Ok(LauncherProgram::ThisProgram));
        let near = program(&at("target"), BINARY, 50);
        assert_eq!(find(None, true), Ok(LauncherProgram::ThisProgram), "it is older");
        assert_eq!(find(None, false), Ok(LauncherProgram::Binary(near)));
        let near = program(&at("target"), BINARY, 150);
        assert_eq!(find(None, true), Ok(LauncherProgram::Binary(near)));
        let named = program(&at("elsewhere"), "l", 1);
        assert_eq!(find(Some(&named), true), Ok(LauncherProgram::Binary(named.clone())));
        fs::set_permissions(&named, fs::Permissions::from_mode(0o644)).unwrap();
        let error = find(Some(&named), true).unwrap_err().to_string();
        assert!(error.contains("TWINVM_TEST_LAUNCHER=") && error.contains("not executable"));
        symlink("nowhere", at("dangling")).unwrap();
        assert!(find(Some(&at("dangling")), true).is_err());
    }

    #[test]
    fn a_launcher_gets_its_descriptors_and_nothing_else() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("fake");
        let script = "#!/bin/sh\nls -l /proc/$$/fd /proc/$$/cwd >&2; echo \"$(/usr/bin/env)\" >&2; ps >/dev/null\n\
                      echo pgid $(cut -d' ' -f5 /proc/$$/stat) pid $$ >&2\n";
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let mut started = LauncherProgram::at(&KIND, path).unwrap().start(&KIND).unwrap();
        started.process.reap().unwrap();
        let words = last_words(&started.messages);
        assert!(words.contains("3 -> socket:") && words.contains("4 -> pipe:"), "{words}");
        assert!(words.contains("cwd -> /\n"), "{words}");
        assert!(!words.contains("CARGO") && !words.contains("HOME="), "{words}");
        let ids: Vec<_> = words.split_whitespace().collect();
        let after = |word: &str| ids[ids.iter().position(|one| *one == word).unwrap() + 1];
        assert_eq!(after("pgid"), after("pid"), "{words}");
    }

    #[test]
    fn a_lifeline_hangs_up_when_the_owner_lets_go() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("fake");
        fs::write(&path, "#!/bin/sh\nexec 5>&2; cat <&4; echo over >&5\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let Started { lifeline, mut process, messages, control, .. } =
            LauncherProgram::at(&KIND, path).unwrap().start(&KIND).unwrap();
        assert!(process.child.as_mut().unwrap().try_wait().unwrap().is_none());
        drop(lifeline);
        process.reap().unwrap();
        assert_eq!(last_words(&messages), "over");
        let mut end = File::from(control.as_fd().try_clone_to_owned().unwrap());
        assert_eq!(end.read(&mut [0; 8]).unwrap(), 0);
    }
}
