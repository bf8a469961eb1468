//! A guest's network.

use crate::{capability::Capability, error::VmErrorKind};
use serde::{Deserialize, Serialize};

/// What network a guest has.
///
/// Whatever it is, programs of a guest reach each other at its own loopback address, and their connections are of its
/// own memory. A backend without [`GuestKernel`](Capability::GuestKernel) has no guest to keep apart: its programs have
/// their host's network.
///
/// # Copies
/// Mapped ports belong to the host, and one machine has a port at a time: from its start or restore to its end. A
/// restored machine needs the ports of its configuration as a started one does, so it can only be had once its source
/// has ended. A fork leaves them with the source; a child has none of them until it is stopped and started anew. The
/// connections of a captured machine go on, and are reset in every copy; what listened in it listens in the copy.
///
/// While a machine is paused its connections stand still, and new ones wait.
///
/// ```
/// use vm_trait::{NetworkConfig, VmConfig};
/// let config = VmConfig::builder().with_network(NetworkConfig::tsi().with_port(8080, 80)).build()?;
/// assert_eq!(config.network.ports()[0].guest, 80);
/// # Ok::<(), vm_trait::VmError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NetworkConfig {
    /// Its own loopback device and nothing else: it reaches no host and no other address, and no host reaches it but by
    /// vsock.
    #[default]
    None,
    /// The host's sockets in place of a network device: what the guest connects to is connected to by the host, and
    /// the mapped ports are listened on by the host. A loopback address is the guest's own, and the host's where nothing
    /// in the guest listens on the port. It needs a guest kernel that can do it.
    Tsi(PortMap),
    /// A network device whose packets a `passt` process of the host turns into its own connections, in both ways. The host's
    /// loopback address is not reached by it. It needs a guest kernel with a driver for the device.
    /// A real `passt` gives up connections whose guest does not answer for some seconds, so one may be reset across a pause on
    /// a busy host.
    /// `/etc/resolv.conf` names the host's resolver where the root has none, unless the root is a directory of the host
    /// ([`RootSource::Shared`](crate::RootSource::Shared)).
    Passt(PortMap),
}

/// Which ports of the host lead to which of the guest, over TCP. A host port is reached at the host's loopback
/// address; one that leads nowhere, because nothing listens in the guest, refuses or ends its connections.
///
/// A start or restore that needs a port which another machine or program has fails with
/// [`PortInUse`](VmErrorKind::PortInUse), takes none of the others, and leaves the VM Stopped. Once the machine has
/// ended, however it did, its ports are free again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PortMap(pub Vec<PortForward>);

/// One port of the host that leads to one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortForward {
    /// The host's port, not 0 and not given twice in a machine.
    pub host: u16,
    /// The guest's port, not 0 and not given twice in a machine.
    pub guest: u16,
}

impl NetworkConfig {
    /// The most ports that may be mapped.
    pub const MAX_PORTS: usize = 256;

    /// Gives a [`Tsi`](Self::Tsi) network without ports.
    #[must_use]
    pub fn tsi() -> Self {
        Self::Tsi(PortMap::default())
    }

    /// Gives a [`Passt`](Self::Passt) network without ports.
    #[must_use]
    pub fn passt() -> Self {
        Self::Passt(PortMap::default())
    }

    /// Maps a port of the host to one of the guest. A guest without a network has no ports to map: nothing changes.
    #[must_use]
    pub fn with_port(mut self, host: u16, guest: u16) -> Self {
        match &mut self {
            Self::None => {}
            Self::Tsi(ports) | Self::Passt(ports) => ports.0.push(PortForward { host, guest }),
        }
        self
    }

    /// Lists the mapped ports.
    #[must_use]
    pub fn ports(&self) -> &[PortForward] {
        match self {
            Self::None => &[],
            Self::Tsi(ports) | Self::Passt(ports) => &ports.0,
        }
    }

    /// Says which capability a backend needs for it.
    #[must_use]
    pub fn capability(&self) -> Option<Capability> {
        match self {
            Self::None => None,
            Self::Tsi(_) => Some(Capability::NetworkTsi),
            Self::Passt(_) => Some(Capability::NetworkPasst),
        }
    }

    pub(super) fn validate(&self) -> Result<(), VmErrorKind> {
        let ports = self.ports();
        if ports.len() > Self::MAX_PORTS {
            let reason = format!("{} given, at most {}", ports.len(), Self::MAX_PORTS);
            return Err(VmErrorKind::invalid("network.ports", reason));
        }
        for (index, port) in ports.iter().enumerate() {
            let earlier = &ports[..index];
            let same_host = earlier.iter().position(|it| it.host == port.host);
            let same_guest = earlier.iter().position(|it| it.guest == port.guest);
            for (side, number, same) in
                [("host", port.host, same_host), ("guest", port.guest, same_guest)]
            {
                let field = format!("network.ports[{index}].{side}");
                if number == 0 {
                    return Err(VmErrorKind::invalid(field, "0 is no port"));
                }
                if let Some(other) = same {
                    let reason = format!("{number} is that of ports[{other}] too");
                    return Err(VmErrorKind::invalid(field, reason));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn too_many_ports_are_refused() {
        let network = (0..=256).fold(NetworkConfig::passt(), |it, n| it.with_port(n + 1, n + 1));
        assert!(matches!(
            network.validate(),
            Err(VmErrorKind::InvalidConfig { field, .. }) if field == "network.ports"
        ));
    }

    proptest! {
        #[test]
        fn only_ports_that_are_unique_and_above_zero_are_taken(
            tsi: bool,
            ports in prop::collection::vec((0..12_u16, 0..12_u16), 0..6),
        ) {
            let mut network = if tsi { NetworkConfig::tsi() } else { NetworkConfig::passt() };
            for (host, guest) in &ports {
                network = network.with_port(*host, *guest);
            }
            let distinct = |of: fn(&(u16, u16)) -> u16| {
                let numbers: BTreeSet<u16> = ports.iter().map(of).collect();
                numbers.len() == ports.len() && !numbers.contains(&0)
            };
            prop_assert_eq!(network.validate().is_ok(), distinct(|it| it.0) && distinct(|it| it.1));
            let text = serde_json::to_string(&network).unwrap();
            prop_assert_eq!(serde_json::from_str::<NetworkConfig>(&text).unwrap(), network);
        }
    }

    #[test]
    fn as_many_ports_as_are_allowed_are_taken() {
        let network = (1..=256).fold(NetworkConfig::tsi(), |it, n| it.with_port(n, n));
        assert_eq!(network.ports().len(), NetworkConfig::MAX_PORTS);
        assert_eq!(network.validate(), Ok(()));
    }
}
