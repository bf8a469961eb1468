//! What is decided before a program is started: whether the request makes sense, which file the program is, who it
//! runs as.

use super::{
    error::{MAX_PATH, kind_of, kinded, refused},
    tree::join,
};
use crate::os::{Errno, GuestOs, SpawnSpec, Spawned, SysResult};
use bytes::BytesMut;
use vm_guest_protocol::{
    EntryKind, ExecSpec, GuestError, GuestErrorKind, MAX_DATA, MAX_LIMITS, StatEntry, UserSpec,
};
use vm_planted_bugs::{Bug, planted};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The largest `/etc/passwd` that is read.
const MAX_PASSWD: usize = 4 << 20;

/// Starts a program.
pub(super) fn spawn(request: ExecSpec, os: &mut dyn GuestOs) -> Result<Spawned, GuestError> {
    check(&request)?;
    let ExecSpec { program, args, env, cwd, user, tty, stdin, limits, .. } = request;
    let ids = user.map(|user| ids_of(user, os)).transpose()?;
    let cwd = cwd.unwrap_or_else(|| "/".to_owned());
    check_directory(&cwd, ids, os)?;
    let mut argv = Vec::with_capacity(args.len() + 1);
    argv.push(program);
    argv.extend(args);
    let mut spec = SpawnSpec { path: String::new(), argv, env, cwd, ids, tty, stdin, limits };
    let spawned = spawn_first(&mut spec, os)?;
    if tty.is_some() && !stdin {
        // A terminal is its own standard input, and the host will not end it.
        os.close_stdin(spawned.child);
    }
    Ok(spawned)
}

fn check(request: &ExecSpec) -> Result<(), GuestError> {
    let nul = |text: &String| text.contains('\0');
    let bad = request.program.is_empty()
        || request.program.len() > MAX_PATH
        || nul(&request.program)
        || request.args.iter().any(nul)
        || request.cwd.as_ref().is_some_and(nul)
        || request
            .env
            .iter()
            .any(|(name, value)| name.is_empty() || name.contains('=') || nul(name) || nul(value))
        || request.limits.iter().enumerate().any(|(index, limit)| {
            usize::from(limit.resource) >= MAX_LIMITS
                || limit.soft > limit.hard
                || request.limits[..index].iter().any(|other| other.resource == limit.resource)
        });
    if bad { Err(refused(GuestErrorKind::InvalidArgument, &request.program)) } else { Ok(()) }
}

/// Tries the files that a program's name may mean, as a shell does: the first that can be executed is it.
fn spawn_first(spec: &mut SpawnSpec, os: &mut dyn GuestOs) -> Result<Spawned, GuestError> {
    let program = spec.argv[0].clone();
    if program.contains('/') {
        spec.path = if program.starts_with('/') { program } else { join(&spec.cwd, &program) };
        let errno = match try_spawn(spec, os) {
            Ok(spawned) => return Ok(spawned),
            Err(errno) => errno,
        };
        return Err(refusal(errno, spec));
    }
    let path = spec.env.iter().rev().find(|(name, _)| name == "PATH");
    let path = path.map_or_else(|| DEFAULT_PATH.to_owned(), |(_, value)| value.clone());
    let mut first = None;
    for dir in path.split(':') {
        spec.path.clear();
        // An empty or relative place is one below the working directory.
        let places = if dir.starts_with('/') { ["", dir] } else { [&spec.cwd, dir] };
        for part in places.into_iter().chain([program.as_str()]).filter(|part| !part.is_empty()) {
            if !spec.path.is_empty() && !spec.path.ends_with('/') {
                spec.path.push('/');
            }
            spec.path.push_str(part);
        }
        match try_spawn(spec, os) {
            Ok(spawned) => return Ok(spawned),
            Err(Errno::NOENT) if planted(Bug::SearchStopsEarly) => break,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG) => {}
            Err(Errno::ACCES | Errno::ISDIR) => first = first.or(Some(Errno::ACCES)),
            Err(errno) => return Err(refusal(errno, spec)),
        }
    }
    Err(refusal(first.unwrap_or(Errno::NOENT), spec))
}

fn try_spawn(spec: &SpawnSpec, os: &mut dyn GuestOs) -> SysResult<Spawned> {
    let file = os.stat(&spec.path)?;
    match file.kind {
        EntryKind::Directory => return Err(Errno::ISDIR),
        EntryKind::File if file.mode & 0o111 != 0 => {}
        _ => return Err(Errno::ACCES),
    }
    os.spawn(spec)
}

fn refusal(errno: Errno, spec: &SpawnSpec) -> GuestError {
    use GuestErrorKind as K;
    let kind = match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG => K::ProgramNotFound,
        Errno::ACCES | Errno::ISDIR | Errno::NOEXEC | Errno::LOOP => K::ProgramNotExecutable,
        Errno::PERM if spec.ids.is_some() => K::UserNotPermitted,
        _ => match kind_of(errno) {
            kind @ (K::OutOfResources | K::InvalidArgument) => kind,
            // Without a path it is not mistaken for the failure of a file.
            _ => return kinded(K::Other, errno, ""),
        },
    };
    kinded(kind, errno, &spec.argv[0])
}

/// Checks that a working directory is there and may be entered, so that it is not mistaken for the program.
fn check_directory(
    cwd: &str,
    ids: Option<(u32, u32)>,
    os: &mut dyn GuestOs,
) -> Result<(), GuestError> {
    let bad = |errno| Err(kinded(GuestErrorKind::BadWorkingDirectory, errno, cwd));
    if !cwd.starts_with('/') {
        return bad(Errno::INVAL);
    }
    if cwd.len() > MAX_PATH {
        return bad(Errno::NAMETOOLONG);
    }
    match os.stat(cwd) {
        Ok(it) if it.kind == EntryKind::Directory => {}
        Ok(_) => return bad(Errno::NOTDIR),
        Err(errno) => return bad(errno),
    }
    let Some((uid, gid)) = ids.filter(|(uid, _)| *uid != 0) else { return Ok(()) };
    let ends = cwd.match_indices('/').map(|(at, _)| at.max(1)).chain([cwd.len()]);
    for end in ends {
        match os.stat(&cwd[..end]) {
            Ok(it) if may_enter(&it, uid, gid) => {}
            Ok(_) => return bad(Errno::ACCES),
            Err(errno) => return bad(errno),
        }
    }
    Ok(())
}

fn may_enter(dir: &StatEntry, uid: u32, gid: u32) -> bool {
    let bit = if dir.uid == uid {
        0o100
    } else if dir.gid == gid {
        0o010
    } else {
        0o001
    };
    dir.mode & bit != 0
}

/// Finds out who a user is. Without `/etc/passwd` there is only root.
fn ids_of(user: UserSpec, os: &mut dyn GuestOs) -> Result<(u32, u32), GuestError> {
    let name = match user {
        UserSpec::Ids { uid, gid } => return Ok((uid, gid)),
        UserSpec::Name(name) => name,
    };
    let unknown = |errno: Errno| kinded(GuestErrorKind::UnknownUser, errno, &name);
    let passwd = match read_whole("/etc/passwd", os) {
        Ok(passwd) => passwd,
        Err(Errno::NOENT) if name == "root" => return Ok((0, 0)),
        Err(errno) => return Err(unknown(errno)),
    };
    let found = passwd.as_ref().split(|byte: &u8| *byte == b'\n').find_map(|line| {
        let mut fields = std::str::from_utf8(line).ok()?.split(':');
        if fields.next()? != name {
            return None;
        }
        let ids = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(if planted(Bug::UserKeepsRootGroup) { (ids.0, 0) } else { ids })
    });
    found.ok_or_else(|| unknown(Errno(0)))
}

fn read_whole(path: &str, os: &mut dyn GuestOs) -> SysResult<BytesMut> {
    let fd = os.open_read(path)?;
    let mut whole = BytesMut::new();
    let result = loop {
        match os.read(fd, MAX_DATA) {
            Ok(bytes) if bytes.is_empty() => break Ok(()),
            Ok(bytes) => whole.extend_from_slice(&bytes),
            Err(Errno::INTR) => {}
            Err(errno) => break Err(errno),
        }
        if whole.len() > MAX_PASSWD {
            break Err(Errno::FBIG);
        }
    };
    os.close(fd);
    result.map(|()| whole)
}
