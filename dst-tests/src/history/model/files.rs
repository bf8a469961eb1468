//! What a guest's files are, for the model.

use super::super::script::HOME;
use std::collections::BTreeMap;

/// The files below [`HOME`], which is there itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Files(BTreeMap<String, Node>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Node {
    /// With its permission bits.
    Directory(u16),
    /// A text, several times over.
    File { text: String, times: u32, mode: u16 },
}

/// An error's name, as records have it.
pub(super) type FileResult<T> = Result<T, &'static str>;

const NOT_FOUND: &str = "NotFound";
const NOT_A_DIRECTORY: &str = "NotADirectory";
const IS_A_DIRECTORY: &str = "IsADirectory";
const NOT_EMPTY: &str = "DirectoryNotEmpty";
const INVALID_PATH: &str = "InvalidPath";
const EXISTS: &str = "AlreadyExists";
const INVALID_ARGUMENT: &str = "Io { errno: 22 }";

/// Permission bits where none are asked for.
const FILE_MODE: u16 = 0o644;
const DIRECTORY_MODE: u16 = 0o755;

/// The longest name that a directory can hold, in bytes.
const LONGEST_NAME: usize = 255;

impl Files {
    pub(super) fn read(&self, path: &str) -> FileResult<String> {
        match self.find(path)? {
            Node::File { text, times, .. } => Ok(repeated(text, *times)),
            Node::Directory(_) => Err(IS_A_DIRECTORY),
        }
    }

    pub(super) fn stat(&self, path: &str) -> FileResult<&Node> {
        self.find(path)
    }

    pub(super) fn write(
        &mut self,
        path: &str,
        text: &str,
        times: u32,
        mode: Option<u16>,
    ) -> FileResult<()> {
        self.parent(path)?;
        fits(path)?;
        let before = match self.0.get(path) {
            Some(Node::Directory(_)) => return Err(IS_A_DIRECTORY),
            Some(Node::File { mode, .. }) => Some(*mode),
            None => None,
        };
        let mode = mode.or(before).unwrap_or(FILE_MODE);
        self.0.insert(path.to_owned(), Node::File { text: text.to_owned(), times, mode });
        Ok(())
    }

    pub(super) fn list(&self, path: &str) -> FileResult<Vec<(String, String)>> {
        match self.find(path)? {
            Node::File { .. } => Err(NOT_A_DIRECTORY),
            Node::Directory(_) => {
                let inside = self.below(path).filter(|(rest, _)| !rest.contains('/'));
                let named = inside.map(|(name, node)| {
                    let kind = match node {
                        Node::Directory(_) => "directory",
                        Node::File { .. } => "file",
                    };
                    (name.to_owned(), kind.to_owned())
                });
                Ok(named.collect())
            }
        }
    }

    pub(super) fn make_dir(
        &mut self,
        path: &str,
        recursive: bool,
        mode: Option<u16>,
    ) -> FileResult<()> {
        if !recursive {
            self.parent(path)?;
        }
        fits(path)?;
        let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]);
        let prefixes: Vec<_> = ends.map(|end| path[..end].to_owned()).skip(1).collect();
        for prefix in &prefixes {
            let is_it = prefix == path;
            match self.0.get(prefix) {
                Some(Node::File { .. }) => {
                    return Err(if is_it { EXISTS } else { NOT_A_DIRECTORY });
                }
                Some(Node::Directory(_)) if is_it && !recursive => return Err(EXISTS),
                _ => {}
            }
        }
        for prefix in prefixes {
            let mode = mode.filter(|_| prefix == path).unwrap_or(DIRECTORY_MODE);
            self.0.entry(prefix).or_insert(Node::Directory(mode));
        }
        Ok(())
    }

    pub(super) fn remove(&mut self, path: &str, recursive: bool) -> FileResult<()> {
        self.find(path)?;
        let inside: Vec<_> = self.below(path).map(|(rest, _)| format!("{path}/{rest}")).collect();
        if !recursive && !inside.is_empty() {
            return Err(NOT_EMPTY);
        }
        self.0.remove(path);
        self.0.retain(|path, _| !inside.contains(path));
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &str, to: &str) -> FileResult<()> {
        self.parent(from)?;
        self.parent(to)?;
        let moved = self.find(from)?.clone();
        fits(to)?;
        if within(to, from) {
            return Err(INVALID_ARGUMENT);
        }
        if within(from, to) {
            return Err(NOT_EMPTY);
        }
        match (&moved, self.0.get(to)) {
            _ if from == to => return Ok(()),
            (Node::Directory(_), Some(Node::File { .. })) => return Err(NOT_A_DIRECTORY),
            (Node::File { .. }, Some(Node::Directory(_))) => return Err(IS_A_DIRECTORY),
            (Node::Directory(_), Some(Node::Directory(_))) if self.below(to).next().is_some() => {
                return Err(NOT_EMPTY);
            }
            _ => {}
        }
        let inside: Vec<_> = self.below(from).map(|(rest, _)| rest.to_owned()).collect();
        for rest in inside {
            if let Some(node) = self.0.remove(&format!("{from}/{rest}")) {
                self.0.insert(format!("{to}/{rest}"), node);
            }
        }
        self.0.remove(from);
        self.0.insert(to.to_owned(), moved);
        Ok(())
    }

    fn find(&self, path: &str) -> FileResult<&Node> {
        if path == HOME {
            return Ok(&Node::Directory(DIRECTORY_MODE));
        }
        self.parent(path)?;
        fits(path)?;
        self.0.get(path).ok_or(NOT_FOUND)
    }

    /// Checks that what stands above a path is a directory.
    fn parent(&self, path: &str) -> FileResult<()> {
        let Some((parent, _)) = path.rsplit_once('/') else { return Ok(()) };
        match self.find(parent)? {
            Node::Directory(_) => Ok(()),
            Node::File { .. } => Err(NOT_A_DIRECTORY),
        }
    }

    /// Gives everything below a directory, by the rest of its path.
    fn below<'a>(&'a self, path: &'a str) -> impl Iterator<Item = (&'a str, &'a Node)> {
        let all = self.0.iter();
        all.filter_map(move |(one, node)| Some((one.strip_prefix(path)?.strip_prefix('/')?, node)))
    }
}

pub(super) fn repeated(text: &str, times: u32) -> String {
    text.repeat(usize::try_from(times).unwrap_or(0))
}

/// Checks that a path's last name is not too long. Unlike other faults of a path, that is for the guest to find out, once
/// it has come so far.
fn fits(path: &str) -> FileResult<()> {
    let name = path.rsplit('/').next().unwrap_or(path);
    if name.len() > LONGEST_NAME { Err(INVALID_PATH) } else { Ok(()) }
}

/// Says whether a path is below another.
fn within(path: &str, above: &str) -> bool {
    path.strip_prefix(above).is_some_and(|rest| rest.starts_with('/'))
}

/// Says whether a path is absolute and normalised, once the directory to write in stands for [`HOME`].
pub(super) fn is_valid(path: &str) -> bool {
    let Some(rest) = path.strip_prefix(HOME).or(Some(path)).and_then(|path| path.strip_prefix('/'))
    else {
        return path == HOME;
    };
    rest.split('/').all(|name| !matches!(name, "" | "." | "..") && !name.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_moved_removed_and_refused_as_in_a_file_system() {
        let mut files = Files::default();
        assert_eq!(files.write("~/d/a", "x", 2, None), Err(NOT_FOUND));
        assert_eq!(files.make_dir("~/d/e", false, None), Err(NOT_FOUND));
        assert_eq!(files.make_dir("~/d/e", true, None), Ok(()));
        assert_eq!(files.write("~/d/a", "x", 2, None), Ok(()));
        assert_eq!(files.read("~/d/a").as_deref(), Ok("xx"));
        assert_eq!(files.read("~/d"), Err(IS_A_DIRECTORY));
        assert_eq!(files.make_dir("~/d/a/b", true, None), Err(NOT_A_DIRECTORY));
        assert_eq!(files.make_dir("~/d/a", true, None), Err(EXISTS));
        assert_eq!(files.rename("~/d", "~/d/e/f"), Err(INVALID_ARGUMENT));
        assert_eq!(files.rename("~/d/a", "~/d"), Err(NOT_EMPTY));
        assert_eq!(files.rename("~/d/a", "~/d/e"), Err(IS_A_DIRECTORY));
        assert_eq!(files.rename("~/d", "~/g"), Ok(()));
        assert_eq!(files.read("~/g/a").as_deref(), Ok("xx"));
        let names: Vec<_> = files.list("~/g").unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a", "e"]);
        assert_eq!(files.remove("~/g", false), Err(NOT_EMPTY));
        assert_eq!(files.remove("~/g", true), Ok(()));
        assert_eq!(files, Files::default());
    }

    #[test]
    fn paths_are_told_apart() {
        for path in ["~", "~/a", "/a/b"] {
            assert!(is_valid(path), "{path}");
        }
        for path in ["", "a", "/", "~/", "~//a", "/a/../b", "~/./a", "/a/"] {
            assert!(!is_valid(path), "{path}");
        }
    }
}
