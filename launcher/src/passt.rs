//! [`find`]: the program by which a guest's packets become connections of its host's.

use crate::program::{first_program, flaw};
use std::{
    env,
    ffi::OsString,
    fmt,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};
use vm_guest_protocol::boot::BootNetwork;

/// The variable that names passt's place.
pub const PASST_VARIABLE: &str = "TWINVM_PASST";

/// The name of its binary.
const BINARY: &str = "passt";

/// What a guest with such a network has. Each has a network of its own, so all can have the same.
///
/// All other addresses of the network lead to the host's namesakes, so that only these four hide any.
pub const GUEST_NETWORK: BootNetwork = BootNetwork {
    mac: [0x52, 0x54, 0x00, 0x70, 0x73, 0x02],
    address: Ipv4Addr::new(10, 0, 2, 15),
    prefix: 24,
    gateway: Ipv4Addr::new(10, 0, 2, 2),
    resolver: Ipv4Addr::new(10, 0, 2, 3),
};

/// The hardware address that the guest sees of all others.
pub const PASST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x70, 0x73, 0x01];

/// There is no passt to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoPasst {
    /// Where it was looked for, and what was wrong there.
    pub searched: Vec<String>,
}

/// Finds passt: at `named` and nowhere else where that is given, else where the variable `TWINVM_PASST` says and nowhere
/// else where it is set, else in the directories of `PATH`.
///
/// # Errors
/// [`NoPasst`] with every place that was searched.
pub fn find(named: Option<&Path>) -> Result<PathBuf, NoPasst> {
    find_in(named, env::var_os(PASST_VARIABLE), env::var_os("PATH"))
}

fn find_in(
    named: Option<&Path>,
    variable: Option<OsString>,
    path: Option<OsString>,
) -> Result<PathBuf, NoPasst> {
    let variable = variable.filter(|value| !value.is_empty()).map(PathBuf::from);
    let (place, prefix) = match (named, variable) {
        (Some(named), _) => (named.to_owned(), String::new()),
        (None, Some(variable)) => (variable, format!("{PASST_VARIABLE}=")),
        (None, None) => {
            let mut searched = vec![format!("{PASST_VARIABLE}: not set")];
            return first_program(&path.unwrap_or_default(), BINARY, &mut searched)
                .ok_or(NoPasst { searched });
        }
    };
    match flaw(&place) {
        None => Ok(place),
        Some(flaw) => {
            Err(NoPasst { searched: vec![format!("{prefix}{}: {flaw}", place.display())] })
        }
    }
}

impl fmt::Display for NoPasst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no program passt; searched {}; install it, or name it by {PASST_VARIABLE}",
            self.searched.join("; ")
        )
    }
}

impl std::error::Error for NoPasst {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    #[test]
    fn it_is_found_in_the_promised_order() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| {
            let path = dir.path().join(name).join(BINARY);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let (named, by_variable, second) = (place("named"), place("variable"), place("second"));
        let first = dir.path().join("first");
        let path = env::join_paths([&first, second.parent().unwrap()]).unwrap();
        let variable = Some(by_variable.clone().into_os_string());
        assert_eq!(find_in(Some(&named), variable.clone(), Some(path.clone())), Ok(named));
        assert_eq!(find_in(None, variable, Some(path.clone())), Ok(by_variable));
        assert_eq!(find_in(None, Some(OsString::new()), Some(path.clone())), Ok(second));
        let nowhere = find_in(None, None, Some(first.clone().into())).unwrap_err();
        let there = first.join(BINARY).display().to_string();
        assert!(nowhere.searched.iter().any(|place| place.starts_with(&there)), "{nowhere}");
        let nowhere = find_in(Some(&first.join("x")), None, Some(path.clone())).unwrap_err();
        assert_eq!(nowhere.searched.len(), 1, "nowhere else");
        let nowhere = find_in(None, Some(first.into()), Some(path)).unwrap_err();
        assert!(nowhere.to_string().contains(PASST_VARIABLE), "{nowhere}");
    }
}
