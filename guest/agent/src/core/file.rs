//! Streams that read a file or replace one.

use super::{
    error::{MAX_PATH, failed, refused},
    flow::{OUTGOING_BOUND, Outflow},
    tree::{check, join, parent},
};
use crate::os::{Errno, Fd, GuestOs, SysResult};
use bytes::BytesMut;
use serde::{Deserialize, Serialize};
use vm_guest_protocol::{
    Channel, EntryKind, GuestError, GuestErrorKind, MAX_DATA, StatEntry, StreamId,
};
use vm_planted_bugs::{Bug, planted};

/// How many links in a row a file to be replaced may be behind, as in the kernel.
const MAX_LINKS: u32 = 40;

/// A file or listing on its way to the host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Read {
    pub(super) out: Outflow,
    path: String,
    fd: Option<Fd>,
    pub(super) error: Option<GuestError>,
}

impl Read {
    pub(super) fn file(path: String, os: &mut dyn GuestOs) -> Result<Self, GuestError> {
        check(&path)?;
        let fd = os.open_read(&path).map_err(|errno| failed(errno, &path))?;
        Ok(Self { out: Outflow::new(), path, fd: Some(fd), error: None })
    }

    pub(super) fn listing(path: String, listing: &[u8]) -> Self {
        let mut out = Outflow::new();
        out.push(listing);
        out.finish();
        Self { out, path, fd: None, error: None }
    }

    /// Reads and sends as far as the host's credit and the connection allow. Says whether a full connection was what
    /// ended it.
    pub(super) fn pump(
        &mut self,
        stream: StreamId,
        window: usize,
        out: &mut BytesMut,
        os: &mut dyn GuestOs,
    ) -> bool {
        loop {
            if self.out.flush(stream, Channel::Stdout, out) {
                return true;
            }
            let Some(fd) = self.fd else { return false };
            if !self.out.is_hungry() || self.out.kept() >= window {
                return false;
            }
            if out.len() >= OUTGOING_BOUND {
                return true;
            }
            match os.read(fd, MAX_DATA.min(window - self.out.kept())) {
                Ok(bytes) if bytes.is_empty() => {
                    self.out.finish();
                    self.close(os);
                }
                Ok(bytes) => self.out.push(&bytes),
                Err(Errno::INTR) => {}
                Err(errno) => {
                    self.error = Some(failed(errno, &self.path));
                    self.close(os);
                    return false;
                }
            }
        }
    }

    /// Says whether nothing more comes but the stream's end.
    pub(super) fn is_over(&self) -> bool {
        self.error.is_some() || self.out.is_done()
    }

    pub(super) fn close(&mut self, os: &mut dyn GuestOs) {
        if let Some(fd) = self.fd.take() {
            os.close(fd);
        }
    }
}

/// A file that is being replaced: the new content goes to a temporary file beside it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Write {
    fd: Fd,
    temporary: String,
    target: String,
    mode: Option<u32>,
}

impl Write {
    pub(super) fn begin(
        path: &str,
        mode: Option<u32>,
        session: u128,
        stream: StreamId,
        os: &mut dyn GuestOs,
    ) -> Result<Self, GuestError> {
        check(path)?;
        let target =
            if planted(Bug::LinkIsReplaced) { path.to_owned() } else { resolve(path, os)? };
        let name = format!(".twinvm-{session:032x}-{stream}.tmp");
        let temporary = join(parent(&target), &name);
        let fd = match os.create_new(&temporary, 0o600) {
            // No one else uses this name, so what stands there was left by a machine that died.
            Err(Errno::EXIST) => {
                os.unlink(&temporary).and_then(|()| os.create_new(&temporary, 0o600))
            }
            other => other,
        };
        let fd = fd.map_err(|errno| failed(errno, path))?;
        Ok(Self { fd, temporary, target, mode })
    }

    pub(super) fn append(&mut self, bytes: &[u8], os: &mut dyn GuestOs) -> Result<(), GuestError> {
        os.write_all(self.fd, bytes).map_err(|errno| failed(errno, &self.target))
    }

    /// Puts the new content in the old one's place and makes it durable. On an error nothing is left of it.
    pub(super) fn commit(self, os: &mut dyn GuestOs) -> Result<(), GuestError> {
        if let Err(errno) = self.complete(os) {
            let error = failed(errno, &self.target);
            self.abort(os);
            return Err(error);
        }
        os.close(self.fd);
        if let Err(errno) = os.rename(&self.temporary, &self.target) {
            // Whether the name still stands does not matter: the file must not.
            let _ = os.unlink(&self.temporary);
            return Err(failed(errno, &self.target));
        }
        if planted(Bug::NameIsNotSynced) {
            return Ok(());
        }
        match os.sync_dir(parent(&self.target)) {
            // Some file systems have no notion of a durable directory.
            Ok(()) | Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(failed(errno, &self.target)),
        }
    }

    fn complete(&self, os: &mut dyn GuestOs) -> SysResult<()> {
        let replaced = match os.lstat(&self.target) {
            Ok(StatEntry { kind: EntryKind::Directory, .. }) => return Err(Errno::ISDIR),
            Ok(entry) if entry.kind == EntryKind::File => Some(entry),
            Ok(_) | Err(Errno::NOENT) => None,
            Err(errno) => return Err(errno),
        };
        let replaced = replaced.filter(|_| !planted(Bug::ModeIsReset));
        let owner = replaced.as_ref().map(|it| (it.uid, it.gid));
        let mode = self.mode.or(replaced.map(|it| it.mode)).unwrap_or(0o644) & 0o7777;
        os.set_owner_and_mode(self.fd, owner, mode)?;
        if planted(Bug::ContentIsNotSynced) {
            return Ok(());
        }
        os.sync_file(self.fd)
    }

    /// Drops the new content.
    pub(super) fn abort(&self, os: &mut dyn GuestOs) {
        os.close(self.fd);
        if planted(Bug::TemporaryIsLeft) {
            return;
        }
        // It can fail only where the file is gone or cannot be removed by anyone now.
        let _ = os.unlink(&self.temporary);
    }
}

/// Follows links at the end of a path to the name that is to be replaced.
fn resolve(path: &str, os: &mut dyn GuestOs) -> Result<String, GuestError> {
    let mut target = path.to_owned();
    for _ in 0..=MAX_LINKS {
        match os.lstat(&target) {
            Err(Errno::NOENT) => return Ok(target),
            Err(errno) => return Err(failed(errno, path)),
            Ok(entry) => match entry.kind {
                EntryKind::File => return Ok(target),
                EntryKind::Directory => return Err(failed(Errno::ISDIR, path)),
                // Putting a file in the place of a device or a socket is nobody's wish.
                EntryKind::Other => return Err(refused(GuestErrorKind::Unsupported, path)),
                EntryKind::Symlink => {}
            },
        }
        let link = os.read_link(&target).map_err(|errno| failed(errno, path))?;
        if link.is_empty() || link.contains('\0') {
            return Err(failed(Errno::NOENT, path));
        }
        if link.ends_with('/') {
            // Only a directory can stand there.
            return Err(failed(Errno::ISDIR, path));
        }
        target = if link.starts_with('/') { link } else { join(parent(&target), &link) };
        if target.len() > MAX_PATH {
            return Err(failed(Errno::NAMETOOLONG, path));
        }
    }
    Err(failed(Errno::LOOP, path))
}
