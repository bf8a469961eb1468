//! Redirections.

use super::{
    Shell,
    ast::{Redirection, RedirectionKind},
};
use crate::guest::{
    applets::errno_text,
    syscalls::{OpenFlags, Syscalls},
};
use vm_guest_agent::os::{Errno, SysResult};

/// Former files are kept at descriptors from here on.
const KEPT: u32 = 10;

/// Each descriptor that was changed, with where its former file is kept, if it had one.
pub(super) type Saved = Vec<(u32, Option<u32>)>;

impl Shell {
    /// Carries redirections out on the shell itself; on an error it has undone them.
    pub(super) fn redirect(
        &mut self,
        sys: &mut Syscalls<'_>,
        redirections: &[Redirection],
        targets: &[String],
    ) -> Result<Saved, String> {
        let mut saved = Saved::new();
        for (redirection, target) in redirections.iter().zip(targets) {
            if let Err(message) = self.redirect_one(sys, redirection, target, &mut saved) {
                self.restore(sys, saved);
                return Err(message);
            }
        }
        Ok(saved)
    }

    fn redirect_one(
        &mut self,
        sys: &mut Syscalls<'_>,
        redirection: &Redirection,
        target: &str,
        saved: &mut Saved,
    ) -> Result<(), String> {
        let fd = redirection.fd;
        let write = OpenFlags { write: true, create: true, truncate: true, ..OpenFlags::default() };
        let flags = match redirection.kind {
            RedirectionKind::Read => OpenFlags { read: true, ..OpenFlags::default() },
            RedirectionKind::Write | RedirectionKind::Both => write,
            RedirectionKind::Append => OpenFlags { append: true, truncate: false, ..write },
            RedirectionKind::ReadWrite => OpenFlags { read: true, truncate: false, ..write },
            RedirectionKind::Here => {
                keep(sys, fd, saved);
                let file = sys.memory_file(target.to_owned()).map_err(errno_text)?;
                return place(sys, file, fd).map_err(errno_text);
            }
            RedirectionKind::Duplicate => {
                if target == "-" {
                    keep(sys, fd, saved);
                    // Closing what is not open is no error here.
                    return match sys.close(fd) {
                        Ok(()) | Err(Errno::BADF) => Ok(()),
                        Err(errno) => Err(errno_text(errno)),
                    };
                }
                let from: u32 =
                    target.parse().map_err(|_| format!("syntax error: bad fd number {target}"))?;
                keep(sys, fd, saved);
                let failed = |errno| format!("dup2({from},{fd}): {}", errno_text(errno));
                return sys.dup2(from, fd).map_err(failed);
            }
        };
        let verb = if flags.write { "create" } else { "open" };
        let file = sys.open(target, flags, 0o666).map_err(|errno| {
            let text = match errno {
                Errno::NOENT if flags.write => "nonexistent directory".to_owned(),
                Errno::NOENT => "no such file".to_owned(),
                errno => errno_text(errno),
            };
            format!("can't {verb} {target}: {text}")
        })?;
        // The new file may stand at the very descriptor that was free.
        if file != fd {
            keep(sys, fd, saved);
        } else {
            saved.push((fd, None));
        }
        place(sys, file, fd).map_err(errno_text)?;
        if redirection.kind == RedirectionKind::Both {
            keep(sys, 2, saved);
            sys.dup2(fd, 2).map_err(errno_text)?;
        }
        Ok(())
    }

    /// Puts descriptors back, the last change first.
    pub(super) fn restore(&mut self, sys: &mut Syscalls<'_>, saved: Saved) {
        for (fd, kept) in saved.into_iter().rev() {
            let restored = match kept {
                Some(kept) => sys.dup2(kept, fd).and_then(|()| sys.close(kept)),
                None => sys.close(fd),
            };
            // A script may itself have closed what is to be put back.
            debug_assert!(matches!(restored, Ok(()) | Err(Errno::BADF)), "closing only fails so");
        }
    }

    /// Lets redirections stand for good, as `exec` does.
    pub(super) fn keep_redirections(sys: &mut Syscalls<'_>, saved: Saved) {
        for kept in saved.into_iter().filter_map(|(_, kept)| kept) {
            let closed = sys.close(kept);
            debug_assert!(closed.is_ok(), "a kept descriptor is open");
        }
    }
}

fn keep(sys: &mut Syscalls<'_>, fd: u32, saved: &mut Saved) {
    saved.push((fd, sys.dup_above(fd, KEPT).ok()));
}

/// Moves an open file to a descriptor.
fn place(sys: &mut Syscalls<'_>, file: u32, fd: u32) -> SysResult<()> {
    if file != fd {
        sys.dup2(file, fd)?;
        sys.close(file)?;
    }
    Ok(())
}
