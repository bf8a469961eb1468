//! Networks of guests.

use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use vm_trait::{NetworkConfig, Operation, PortForward, VmConfig, VmErrorKind};

/// The clauses on networks.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(bad_ports, "network.bad_ports_are_refused",
        "port 0, a port that is mapped twice on either side, and too many of them are refused naming port and side",
        [], faults: []),
    clause!(written_and_read, "network.written_and_read",
        "a network that is written and read again is the same, and one that is left out is none", [], faults: []),
];

/// Draws a network with so many mapped ports, no two alike.
fn drawn(ctx: &Context, count: u64) -> NetworkConfig {
    let first = |side: u64| u16::try_from(1 + side + ctx.draw(0, 60_000)).unwrap_or(1);
    let (host, guest) = (first(0), first(1));
    let network = ctx.pick(&[NetworkConfig::tsi(), NetworkConfig::passt()]);
    let count = u16::try_from(count).unwrap_or(1);
    (0..count).fold(network, |network, n| network.with_port(host + n, guest + n))
}

async fn bad_ports(ctx: &Context) -> Verdict {
    let count = ctx.draw(1, 8);
    let good = drawn(ctx, count);
    let PortForward { host, guest } = ctx.pick(good.ports());
    let (network, field) = match ctx.draw(0, 4) {
        0 => (good.with_port(0, 65_535), format!("network.ports[{count}].host")),
        1 => (good.with_port(65_535, 0), format!("network.ports[{count}].guest")),
        2 => (good.with_port(host, 65_535), format!("network.ports[{count}].host")),
        3 => (good.with_port(65_535, guest), format!("network.ports[{count}].guest")),
        _ => {
            let most = u64::try_from(NetworkConfig::MAX_PORTS).unwrap_or(u64::MAX);
            (drawn(ctx, most + ctx.draw(1, 9)), "network.ports".to_owned())
        }
    };
    let mut config = VmConfig::default();
    config.network = network;
    let text = format!("{:?}", config.network);
    let outcome = ctx.backend().create(config).await;
    if let Err(error) = &outcome {
        ensure_eq!(error.operation(), Operation::Create, "the operation that refused {text}");
    }
    ensure_err!(
        outcome,
        VmErrorKind::InvalidConfig { field: found, reason } if *found == field && !reason.is_empty(),
        "create with a bad {field}: {text}"
    );
    Ok(())
}

async fn written_and_read(ctx: &Context) -> Verdict {
    let mut config = VmConfig::default();
    config.network = drawn(ctx, ctx.draw(0, 20));
    let broken = |error: serde_json::Error| Broken::new(error.to_string());
    let mut value = serde_json::to_value(&config).map_err(broken)?;
    let read: VmConfig = serde_json::from_value(value.clone()).map_err(broken)?;
    ensure_eq!(read, config, "a configuration that was written and read");
    ensure!(read.validate().is_ok(), "a drawn network is refused: {:?}", read.network);
    if let Some(fields) = value.as_object_mut() {
        fields.remove("network");
    }
    let without: VmConfig = serde_json::from_value(value).map_err(broken)?;
    ensure_eq!(without.network, NetworkConfig::None, "a network that was left out");
    ensure_eq!(VmConfig::default().network, NetworkConfig::None, "the default");
    Ok(())
}
