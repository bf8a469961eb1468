//! [`BootConfig`]: what the image tells the agent that is the first process of a machine.

use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// Where the image keeps the encoded [`BootConfig`].
pub const BOOT_CONFIG_PATH: &str = "/twinvm/boot";

/// The I/O port to which the agent writes how far it has come, one [`BootMark`] as a byte, where the machine has
/// the port; writing there does nothing on other machines.
pub const BOOT_MARK_PORT: u16 = 0x7e0;

/// What the first process of a machine is to do before it serves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootConfig {
    /// The host name.
    pub hostname: String,
    /// Kernel modules in the initial file system, as absolute paths, in the order in which they are loaded. One that
    /// cannot be loaded because the kernel has it already is no error.
    pub modules: Vec<String>,
    /// What becomes the root.
    pub root: BootRoot,
    /// Disks to mount.
    pub disks: Vec<BootDisk>,
    /// Host directories to mount.
    pub shares: Vec<BootShare>,
    /// The network device to set up, where there is one.
    pub network: Option<BootNetwork>,
}

/// What becomes a guest's root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BootRoot {
    /// The initial file system itself.
    Initial {
        /// Whether writes to it are refused.
        read_only: bool,
    },
    /// The file system on a block device, under a layer in memory unless `read_only`.
    Disk {
        /// The device's serial string.
        serial: String,
        /// Whether writes to it are refused.
        read_only: bool,
    },
    /// A host directory, by the device of all [`BootShare`]s under the name [`BootShare::ROOT`].
    Shared {
        /// Whether it is mounted for reading only. It is the host that sees to it that nothing is written.
        read_only: bool,
    },
}

impl BootRoot {
    /// The directories in every root whose files are made as the machine starts. In a root that is a host directory they
    /// are all the guest's own.
    pub const PLACES: [&str; 5] = ["dev", "proc", "sys", "run", "tmp"];
}

impl Default for BootRoot {
    fn default() -> Self {
        Self::Initial { read_only: false }
    }
}

/// A disk to mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootDisk {
    /// The device's serial string.
    pub serial: String,
    /// Where: an absolute path, made if nothing is there.
    pub mount: String,
    /// Whether it is mounted for reading only.
    pub read_only: bool,
}

/// A directory of the host to mount. All directories of a machine come by one virtiofs device, each under a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootShare {
    /// Its name in the device's root.
    pub name: String,
    /// Where: an absolute path, made if nothing is there.
    pub mount: String,
    /// Whether it is mounted for reading only. It is the host that sees to it that nothing is written.
    pub read_only: bool,
}

impl BootShare {
    /// The tag of the device.
    pub const TAG: &str = "shares";

    /// The name of the host directory that is the root.
    pub const ROOT: &str = "root";

    /// Gives the name of the host directory that is the `index`th of a machine.
    #[must_use]
    pub fn name_of(index: usize) -> String {
        index.to_string()
    }
}

/// A network device to set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootNetwork {
    /// The device's hardware address, by which it is found.
    pub mac: [u8; 6],
    /// The address that it is given.
    pub address: Ipv4Addr,
    /// How many bits of the address name the network, at most 32.
    pub prefix: u8,
    /// By whom all other networks are reached.
    pub gateway: Ipv4Addr,
    /// Who resolves names.
    pub resolver: Ipv4Addr,
}

impl BootNetwork {
    /// Gives the mask of the address's bits that name the network.
    #[must_use]
    pub fn netmask(&self) -> Ipv4Addr {
        let host_bits = 32_u32.saturating_sub(self.prefix.into());
        Ipv4Addr::from_bits(u32::MAX.checked_shl(host_bits).unwrap_or(0))
    }
}

/// How far the first process of a machine has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BootMark {
    /// It runs.
    Init = 1,
    /// It listens for hosts.
    Listening = 2,
}

/// A boot configuration that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the boot configuration cannot be read: {0}")]
pub struct BadBootConfig(String);

impl BootConfig {
    /// Writes it as the image keeps it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_allocvec(self).unwrap_or_default()
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// [`BadBootConfig`].
    pub fn decode(bytes: &[u8]) -> Result<Self, BadBootConfig> {
        match postcard::take_from_bytes(bytes) {
            Ok((config, [])) => Ok(config),
            Ok((_, rest)) => Err(BadBootConfig(format!("{} bytes too many", rest.len()))),
            Err(error) => Err(BadBootConfig(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    prop_compose! {
        fn network()(
            mac: [u8; 6],
            address: Ipv4Addr,
            prefix in 0..=32_u8,
            gateway: Ipv4Addr,
            resolver: Ipv4Addr,
        ) -> BootNetwork {
            BootNetwork { mac, address, prefix, gateway, resolver }
        }
    }

    prop_compose! {
        fn config()(
            hostname in ".{0,20}",
            modules in vec("/[a-z/.]{0,30}", 0..5),
            disk in any::<Option<String>>(),
            (shared, read_only) in any::<(bool, bool)>(),
            disks in vec((".{0,20}", "/[a-z/]{0,20}", any::<bool>()), 0..4),
            shares in vec((".{0,36}", "/[a-z/]{0,20}", any::<bool>()), 0..4),
            network in prop::option::of(network()),
        ) -> BootConfig {
            let root = match disk {
                Some(serial) => BootRoot::Disk { serial, read_only },
                None if shared => BootRoot::Shared { read_only },
                None => BootRoot::Initial { read_only },
            };
            let disks = disks
                .into_iter()
                .map(|(serial, mount, read_only)| BootDisk { serial, mount, read_only })
                .collect();
            let shares = shares
                .into_iter()
                .map(|(name, mount, read_only)| BootShare { name, mount, read_only })
                .collect();
            BootConfig { hostname, modules, root, disks, shares, network }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(config in config()) {
            prop_assert_eq!(BootConfig::decode(&config.encode()), Ok(config));
        }

        #[test]
        fn no_part_of_it_and_nothing_longer_is_taken_for_it(config in config(), at: prop::sample::Index) {
            let mut bytes = config.encode();
            prop_assert!(BootConfig::decode(&bytes[..at.index(bytes.len())]).is_err());
            bytes.push(0);
            prop_assert!(BootConfig::decode(&bytes).is_err());
        }

        #[test]
        fn shares_have_names_of_their_own(one in 0_usize..1000, other in 0_usize..1000) {
            let (name, another) = (BootShare::name_of(one), BootShare::name_of(other));
            prop_assert_eq!(name == another, one == other);
            prop_assert!(name.bytes().all(|byte| byte.is_ascii_alphanumeric()));
            prop_assert!((1..=8).contains(&name.len()), "it is a name in a directory");
            prop_assert_ne!(name, BootShare::ROOT);
        }

        #[test]
        fn a_netmask_has_as_many_bits_as_the_prefix(network in network()) {
            let mask = network.netmask().to_bits();
            prop_assert_eq!(mask.leading_ones(), u32::from(network.prefix));
            prop_assert_eq!(mask.count_ones(), u32::from(network.prefix));
        }

        #[test]
        fn any_bytes_are_survived(bytes in vec(any::<u8>(), 0..200)) {
            let _ = BootConfig::decode(&bytes);
        }
    }
}
