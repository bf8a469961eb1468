//! What a backend can do, so that nothing has to be tried to find out.

use serde::{Deserialize, Serialize};
use std::fmt;

/// One thing that a backend may or may not be able to do.
///
/// An operation whose capability is absent returns [`Unsupported`](crate::VmErrorKind::Unsupported);
/// one whose capability is claimed must work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Capability {
    /// Programs run in the guest: `exec`, `spawn`, `attach_process`, `processes`.
    Exec,
    /// Guest files are read, written and listed.
    Files,
    /// Programs run on a terminal that can be resized.
    Tty,
    /// Programs run as another user than the agent's own.
    Users,
    /// `pause` and `resume`.
    Pause,
    /// `snapshot`, and `restore` into a new machine.
    Snapshot,
    /// `restore` in place.
    RestoreInPlace,
    /// `fork`.
    Fork,
    /// Disks of the host that outlive the machine.
    Disks,
    /// The guest has a kernel of its own: it can power off and panic, its memory ends with the machine, and its clocks
    /// and its loopback address are its own. Without it, programs have the network of their host.
    GuestKernel,
    /// The guest's memory is limited to what the configuration says.
    MemoryLimit,
    /// A console with the guest's boot output.
    Console,
    /// Byte streams to and from any vsock port of the guest: `connect` and `listen`.
    Vsock,
    /// A root file system of the user's choice: [`VmConfig::root`](crate::VmConfig::root) other than the built-in one and a
    /// [shared](crate::RootSource::Shared) one.
    Root,
    /// A kernel, command line and initial RAM disk of the user's choice: [`VmConfig::kernel`](crate::VmConfig::kernel).
    Kernel,
    /// The console also goes to a host file: [`VmConfig::console_file`](crate::VmConfig::console_file).
    ConsoleFile,
    /// `inspect`.
    Inspect,
    /// Snapshots that hold only what changed since another one, and `merge_snapshot`.
    IncrementalSnapshot,
    /// Directories of the host in the guest: [`VmConfig::mounts`](crate::VmConfig::mounts), and a
    /// [shared](crate::RootSource::Shared) root.
    Mounts,
    /// Limits on what each program uses: [`VmConfig::limits`](crate::VmConfig::limits).
    Limits,
    /// A network by way of the host's sockets: [`NetworkConfig::Tsi`](crate::NetworkConfig::Tsi).
    NetworkTsi,
    /// A network by way of a `passt` process: [`NetworkConfig::Passt`](crate::NetworkConfig::Passt).
    NetworkPasst,
}

impl Capability {
    /// Lists every capability, in a fixed order.
    pub const ALL: &'static [Self] = &[
        Self::Exec,
        Self::Files,
        Self::Tty,
        Self::Users,
        Self::Pause,
        Self::Snapshot,
        Self::RestoreInPlace,
        Self::Fork,
        Self::Disks,
        Self::GuestKernel,
        Self::MemoryLimit,
        Self::Console,
        Self::Vsock,
        Self::Root,
        Self::Kernel,
        Self::ConsoleFile,
        Self::Inspect,
        Self::IncrementalSnapshot,
        Self::Mounts,
        Self::Limits,
        Self::NetworkTsi,
        Self::NetworkPasst,
    ];

    /// Names the capability as reports do, in snake case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Files => "files",
            Self::Tty => "tty",
            Self::Users => "users",
            Self::Pause => "pause",
            Self::Snapshot => "snapshot",
            Self::RestoreInPlace => "restore_in_place",
            Self::Fork => "fork",
            Self::Disks => "disks",
            Self::GuestKernel => "guest_kernel",
            Self::MemoryLimit => "memory_limit",
            Self::Console => "console",
            Self::Vsock => "vsock",
            Self::Root => "root",
            Self::Kernel => "kernel",
            Self::ConsoleFile => "console_file",
            Self::Inspect => "inspect",
            Self::IncrementalSnapshot => "incremental_snapshot",
            Self::Mounts => "mounts",
            Self::Limits => "limits",
            Self::NetworkTsi => "network_tsi",
            Self::NetworkPasst => "network_passt",
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The set of things that a backend can do.
///
/// ```
/// use vm_trait::{Capabilities, Capability};
/// let caps = Capabilities::from_iter([Capability::Exec, Capability::Files]);
/// assert!(caps.has(Capability::Exec));
/// assert!(!caps.has(Capability::Fork));
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Capability>", into = "Vec<Capability>")]
pub struct Capabilities(u32);

impl Capabilities {
    /// Makes the set of every capability.
    #[must_use]
    pub fn all() -> Self {
        Capability::ALL.iter().copied().collect()
    }

    /// Says whether `capability` is in the set.
    #[must_use]
    pub fn has(self, capability: Capability) -> bool {
        self.0 & bit(capability) != 0
    }

    /// Takes `capability` out of the set.
    #[must_use]
    pub fn without(self, capability: Capability) -> Self {
        Self(self.0 & !bit(capability))
    }

    /// Puts `capability` into the set.
    #[must_use]
    pub fn with(self, capability: Capability) -> Self {
        Self(self.0 | bit(capability))
    }

    /// Walks through the set in the order of [`Capability::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Capability> {
        Capability::ALL.iter().copied().filter(move |capability| self.has(*capability))
    }
}

fn bit(capability: Capability) -> u32 {
    1 << capability as u32
}

impl fmt::Debug for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl From<Vec<Capability>> for Capabilities {
    fn from(list: Vec<Capability>) -> Self {
        list.into_iter().collect()
    }
}

impl From<Capabilities> for Vec<Capability> {
    fn from(set: Capabilities) -> Self {
        set.iter().collect()
    }
}

impl FromIterator<Capability> for Capabilities {
    fn from_iter<I: IntoIterator<Item = Capability>>(iter: I) -> Self {
        iter.into_iter().fold(Self::default(), Self::with)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_set_holds_what_was_put_into_it(
            put in prop::collection::vec((0..Capability::ALL.len(), any::<bool>()), 0..30),
        ) {
            let mut set = Capabilities::default();
            let mut model = BTreeSet::new();
            for (index, insert) in put {
                let capability = Capability::ALL[index];
                if insert {
                    set = set.with(capability);
                    model.insert(capability);
                } else {
                    set = set.without(capability);
                    model.remove(&capability);
                }
            }
            prop_assert_eq!(set.iter().collect::<BTreeSet<_>>(), model);
            let text = serde_json::to_string(&set).unwrap();
            prop_assert_eq!(serde_json::from_str::<Capabilities>(&text).unwrap(), set);
        }
    }

    #[test]
    fn every_capability_has_a_name_of_its_own_that_is_shown_and_written() {
        let names: BTreeSet<&str> = Capability::ALL.iter().map(|it| it.name()).collect();
        assert_eq!(names.len(), Capability::ALL.len());
        for capability in Capability::ALL {
            assert_eq!(serde_json::to_value(capability).unwrap(), capability.name());
            assert_eq!(capability.to_string(), capability.name());
        }
    }

    #[test]
    fn a_set_is_shown_with_what_is_in_it() {
        let set = Capabilities::default().with(Capability::Fork).with(Capability::Exec);
        assert_eq!(format!("{set:?}"), "{Exec, Fork}");
    }
}
