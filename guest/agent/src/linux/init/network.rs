//! The network device.

use super::{Failed, console, devices};
use crate::linux::ffi;
use std::{fs, io, net::Ipv4Addr, path::Path};
use vm_guest_protocol::boot::BootNetwork;

const STAGE: &str = "network";

/// Where network devices are listed.
const LIST: &str = "/sys/class/net";

/// Where the kernel is told how a device is to be used, and in which file that it tells its address when it is turned on.
const SETTINGS: &str = "/proc/sys/net/ipv4/conf";
const ANNOUNCE: &str = "arp_notify";

/// Where programs read who resolves names.
const RESOLVERS: &str = "/etc/resolv.conf";

/// Gives the device its address, turns it on, and has everything else reached by the gateway. Where the root's files may
/// be written to, one of them names the resolver.
pub(super) fn set_up(network: &BootNetwork, may_write: bool) -> Result<(), Failed> {
    let device = find(&network.mac)?;
    let fail = |error| Failed::at(STAGE, &device)(error);
    ffi::set_interface_address(&device, network.address, network.netmask()).map_err(fail)?;
    // Passt learns by the first packet where to send its own; until then it sends to everybody, which TCP does not take.
    if let Err(error) = fs::write(Path::new(SETTINGS).join(&device).join(ANNOUNCE), "1") {
        console::say(&format_args!("{device} is not announced: {error}"));
    }
    ffi::set_interface_up(&device).map_err(fail)?;
    ffi::add_default_route(network.gateway)
        .map_err(Failed::at(STAGE, format_args!("route by {}", network.gateway)))?;
    // A guest may have a root that is not written to, and addresses do without names.
    if may_write && let Err(error) = name_resolver(Path::new(RESOLVERS), network.resolver) {
        console::say(&format_args!("no resolver in {RESOLVERS}: {error}"));
    }
    Ok(())
}

/// Finds the device with this hardware address, waiting for it for some seconds.
fn find(mac: &[u8; 6]) -> Result<String, Failed> {
    let wanted = mac.map(|byte| format!("{byte:02x}")).join(":");
    let mut all = Vec::new();
    let found = devices::wait_for(|| {
        all = addresses(Path::new(LIST));
        all.iter().find(|(_, address)| *address == wanted).map(|(name, _)| name.clone())
    });
    found.ok_or_else(|| {
        let seen: Vec<String> =
            all.iter().map(|(name, address)| format!("{name} {address}")).collect();
        Failed::new(STAGE, format_args!("no device {wanted}, only [{}]", seen.join(", ")))
    })
}

/// Lists network devices with their hardware addresses, by name.
fn addresses(list: &Path) -> Vec<(String, String)> {
    devices::list(list, &["address"])
}

/// Names the resolver, unless the root's own files name one.
fn name_resolver(file: &Path, resolver: Ipv4Addr) -> io::Result<()> {
    match fs::read_to_string(file) {
        Ok(text) if names_one(&text) => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::write(file, format!("nameserver {resolver}\n")),
    }
}

/// Says whether a file in the form of resolv.conf(5) names a resolver.
fn names_one(text: &str) -> bool {
    text.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        words.next() == Some("nameserver") && words.next().is_some()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_listed_with_their_addresses() {
        let list = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("lo/address", "00:00:00:00:00:00\n"),
            ("eth0/address", "52:54:00:00:00:01\n"),
            ("odd/mtu", "1500\n"),
        ] {
            let path = list.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let expected = [("eth0", "52:54:00:00:00:01"), ("lo", "00:00:00:00:00:00")];
        let expected = expected.map(|(name, address)| (name.to_owned(), address.to_owned()));
        assert_eq!(addresses(list.path()), expected);
    }

    #[test]
    fn a_resolver_of_the_root_s_own_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("resolv.conf");
        let resolver = Ipv4Addr::new(10, 0, 2, 3);
        for (before, after) in [
            (None, "nameserver 10.0.2.3\n"),
            (Some(""), "nameserver 10.0.2.3\n"),
            (Some("# nameserver 1.2.3.4\nnameserver\n"), "nameserver 10.0.2.3\n"),
            (Some("search here\n nameserver 1.2.3.4\n"), "search here\n nameserver 1.2.3.4\n"),
        ] {
            let _ = fs::remove_file(&file);
            if let Some(before) = before {
                fs::write(&file, before).unwrap();
            }
            name_resolver(&file, resolver).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), after);
        }
        assert!(name_resolver(&dir.path().join("no/resolv.conf"), resolver).is_err());
    }
}
