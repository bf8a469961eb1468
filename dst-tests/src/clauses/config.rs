//! Configurations: what is refused, what is accepted, and what the guest sees of it.

use super::{
    probe::{Stage, disk, made, order, sh, started, works},
    streams::{payload, same_bytes},
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use std::time::Duration;
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    Capability, DiskConfig, Mib, Operation, Timeouts, VmConfig, VmErrorKind, VmInstanceExt, VmState,
};

/// The clauses on configurations.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(defaults, "config.defaults_work",
        "the default configuration makes a machine in Created that boots", [], faults: []),
    clause!(bad_fields, "config.each_bad_field_is_named",
        "each field that is not acceptable is refused at create with InvalidConfig naming it", [], faults: []),
    clause!(host_limits, "config.limits_of_the_host",
        "more vCPUs or memory than the host allows is refused, and what it allows is not", [], faults: []),
    clause!(bad_disks, "config.bad_disks_are_named",
        "each bad field of a disk is refused with InvalidConfig naming disk and field", [Disks], faults: []),
    clause!(good_configs, "config.good_ones_are_accepted",
        "every acceptable configuration makes a machine", [], faults: []),
    clause!(written_and_read, "config.written_and_read",
        "a configuration that is written and read again is the same, and makes the same machine", [], faults: []),
    clause!(env_seen, "config.environment_is_seen",
        "the machine's environment is every program's, and a request's variables come on top", [Exec], faults: []),
    clause!(hostname_seen, "config.hostname_is_seen",
        "the guest has the host name of the configuration", [Exec, GuestKernel], faults: []),
    clause!(many_disks, "config.disks_are_mounted",
        "every disk is mounted where the configuration says", [Exec, Files, Disks], faults: []),
    clause!(missing_disk, "config.missing_read_only_disk",
        "a read-only disk whose file is missing is refused, at create or at start", [Disks], faults: []),
    clause!(vcpus_seen, "config.vcpus_are_seen",
        "the guest has as many processors as the configuration says", [Exec, GuestKernel], faults: []),
    clause!(least_memory, "config.least_memory_boots",
        "a machine of the least memory boots and works", [Exec, Files], faults: []),
    clause!(exhausted, "config.exhausted_host",
        "a host without room refuses another machine with ResourceExhausted, and accepts it later",
        [Exec], faults: [CreateExhausted]),
];

async fn defaults(ctx: &Context) -> Verdict {
    let vm = made(ctx, |_| {}).await?;
    ensure_eq!(vm.state(), VmState::Created, "the state of a new machine");
    ensure_eq!(*vm.config(), VmConfig::default(), "its configuration");
    vm.start().await?;
    ensure_eq!(vm.state(), VmState::Running, "its state after start");
    Ok(())
}

async fn vcpus_seen(ctx: &Context) -> Verdict {
    let most = ctx.backend().limits().max_vcpus.min(8);
    let vcpus = u8::try_from(ctx.draw(1, u64::from(most))).unwrap_or(1);
    let vm = started(ctx, |config| config.vcpus = vcpus).await?;
    let counted = sh(&vm, "nproc").await?;
    ensure_eq!(counted, vcpus.to_string(), "the processors that the guest counts");
    Ok(())
}

async fn least_memory(ctx: &Context) -> Verdict {
    let vm = started(ctx, |config| config.memory = VmConfig::MIN_MEMORY).await?;
    works(ctx, &vm, "with the least memory").await?;
    let path = format!("{}/file", ctx.scratch(&*vm));
    let bytes = payload(ctx, 1 << 20);
    vm.write(&path, bytes.clone()).await?;
    same_bytes(&vm.read_file(&path).await?, &bytes, "a file in a machine of the least memory")
}

/// Spoils a drawn field; gives its name.
fn spoil(ctx: &Context, config: &mut VmConfig) -> &'static str {
    // Something that no word may hold.
    let odd = ctx.pick(&["a b", "a/b", "\u{e9}", "a\nb", "", "a:b"]);
    match ctx.draw(0, 14) {
        0 => {
            config.name = Some(odd.to_owned());
            "name"
        }
        1 => {
            config.name = Some("n".repeat(usize::try_from(ctx.draw(65, 500)).unwrap_or(65)));
            "name"
        }
        2 => {
            config.hostname = odd.to_owned();
            "hostname"
        }
        3 => {
            config.hostname = "h".repeat(usize::try_from(ctx.draw(64, 500)).unwrap_or(64));
            "hostname"
        }
        4 => {
            config.hostname = ctx.pick(&["-a", "a-", "-", "a_b"]).to_owned();
            "hostname"
        }
        5 => {
            config.vcpus = 0;
            "vcpus"
        }
        6 => {
            config.memory = Mib(u32::try_from(ctx.draw(0, 63)).unwrap_or(0));
            "memory"
        }
        7 => {
            let name = ctx.pick(&["", "A=B", "=", "A\0B"]);
            config.env.insert(name.to_owned(), ctx.text(5));
            "env"
        }
        8 => {
            config.env.insert("VALUE".to_owned(), format!("{}\0", ctx.text(5)));
            "env.VALUE"
        }
        9 => {
            let bytes =
                ctx.pick(&[ctx.draw(0, 1023), ctx.draw((16 << 20) + 1, u64::from(u32::MAX))]);
            config.console_bytes = u32::try_from(bytes).unwrap_or(0);
            "console_bytes"
        }
        other => spoil_timeout(&mut config.timeouts, other - 10, ctx),
    }
}

fn spoil_timeout(timeouts: &mut Timeouts, which: u64, ctx: &Context) -> &'static str {
    let (field, name) = match which {
        0 => (&mut timeouts.boot, "timeouts.boot"),
        1 => (&mut timeouts.pause, "timeouts.pause"),
        2 => (&mut timeouts.capture, "timeouts.capture"),
        3 if ctx.one_in(2) => (&mut timeouts.request, "timeouts.request"),
        3 => (&mut timeouts.link, "timeouts.link"),
        _ => (&mut timeouts.kill, "timeouts.kill"),
    };
    *field = Duration::ZERO;
    name
}

/// Checks that a configuration is refused for a field.
async fn refused_for(ctx: &Context, config: VmConfig, expected: &str) -> Verdict {
    let text = format!("{config:?}");
    let outcome = ctx.backend().create(config).await;
    if let Err(error) = &outcome {
        ensure_eq!(
            error.operation(),
            Operation::Create,
            "the operation of a refused configuration"
        );
        ensure_eq!(error.vm(), None, "the machine of a refused configuration");
    }
    ensure_err!(
        outcome,
        VmErrorKind::InvalidConfig { field, reason } if field == expected && !reason.is_empty(),
        "create with a bad {expected}: {text}"
    );
    Ok(())
}

async fn bad_fields(ctx: &Context) -> Verdict {
    for _ in 0..ctx.draw(4, 8) {
        let mut config = VmConfig::default();
        let field = spoil(ctx, &mut config);
        refused_for(ctx, config, field).await?;
    }
    Ok(())
}

async fn host_limits(ctx: &Context) -> Verdict {
    let limits = ctx.backend().limits();
    ensure!(limits.max_vcpus >= 1, "the host allows no vCPU");
    ensure!(limits.max_memory >= VmConfig::MIN_MEMORY, "the host allows {}", limits.max_memory);
    let mut config = VmConfig::default();
    let field = if ctx.one_in(2) && limits.max_vcpus < u8::MAX {
        let least = u64::from(limits.max_vcpus) + 1;
        config.vcpus = u8::try_from(ctx.draw(least, 255)).unwrap_or(u8::MAX);
        "vcpus"
    } else if limits.max_memory.0 < u32::MAX {
        let least = u64::from(limits.max_memory.0) + 1;
        config.memory =
            Mib(u32::try_from(ctx.draw(least, u64::from(u32::MAX))).unwrap_or(u32::MAX));
        "memory"
    } else {
        return Ok(());
    };
    refused_for(ctx, config, field).await?;
    // Made and not started: a test host need not have that much to spare.
    made(ctx, |config| {
        config.vcpus = limits.max_vcpus;
        config.memory = limits.max_memory;
    })
    .await?;
    Ok(())
}

async fn bad_disks(ctx: &Context) -> Verdict {
    let count = usize::try_from(ctx.draw(1, 5)).unwrap_or(1);
    let mut config = VmConfig::default();
    for n in 0..count {
        config.disks.push(disk(ctx, &format!("/disks/d{n}")));
    }
    let last = count - 1;
    let field = match ctx.draw(0, 4) {
        0 => {
            config.disks[last].path = std::path::PathBuf::new();
            format!("disks[{last}].path")
        }
        1 => {
            config.disks[last].size = Mib(0);
            format!("disks[{last}].size")
        }
        2 => {
            let mount = ctx.pick(&["", "/", "data", "/a//b", "/a/", "/a/../b", "/./a", "/a\0"]);
            config.disks[last].mount = mount.to_owned();
            format!("disks[{last}].mount")
        }
        3 => {
            let mount = ctx.pick(&["/disks/d0", "/disks/d0/below", "/disks"]);
            config.disks.push(disk(ctx, mount));
            format!("disks[{count}].mount")
        }
        _ => {
            let path = config.disks[ctx.index(count)].path.clone();
            config.disks.push(DiskConfig::new(path, "/elsewhere"));
            format!("disks[{count}].path")
        }
    };
    refused_for(ctx, config.clone(), &field).await?;
    let most = VmConfig::MAX_DISKS;
    config.disks = (0..=most).map(|n| disk(ctx, &format!("/m{n}"))).collect();
    refused_for(ctx, config, "disks").await
}

/// Draws an acceptable configuration.
fn drawn(ctx: &Context) -> Result<VmConfig, Broken> {
    let limits = ctx.backend().limits();
    let word = |most: u64| -> String {
        (0..ctx.draw(1, most)).map(|_| ctx.pick(&['a', 'Z', '0', '9'])).collect()
    };
    let most_vcpus = u64::from(limits.max_vcpus);
    let most_memory = u64::from(limits.max_memory.0.min(512));
    let span = || Duration::from_millis(ctx.draw(20_000, 100_000));
    let mut timeouts = Timeouts::default();
    timeouts.boot = span();
    timeouts.pause = span();
    timeouts.capture = span();
    timeouts.request = span();
    timeouts.link = span();
    timeouts.kill = span();
    let mut builder = VmConfig::builder()
        .with_name(format!("{}-_.", word(50)))
        .with_label(ctx.text(10), ctx.text(40))
        .with_vcpus(u8::try_from(ctx.draw(1, most_vcpus)).unwrap_or(1))
        .with_memory(Mib(u32::try_from(ctx.draw(64, most_memory)).unwrap_or(64)))
        .with_hostname(format!("{}-{}", word(20), word(20)))
        .with_console_bytes(u32::try_from(ctx.draw(1024, 16 << 20)).unwrap_or(1024))
        .with_timeouts(timeouts);
    for n in 0..ctx.draw(0, 3) {
        builder = builder.with_env(format!("{}{n}", word(10)), ctx.text(40));
    }
    if ctx.has(Capability::Disks) {
        for n in 0..ctx.draw(0, 2) {
            builder = builder.with_disk(disk(ctx, &format!("/disks/{n}{}", word(5))));
        }
    }
    Ok(builder.build()?)
}

async fn good_configs(ctx: &Context) -> Verdict {
    let config = drawn(ctx)?;
    let vm = ctx.backend().create(config.clone()).await?;
    ensure_eq!(vm.state(), VmState::Created, "the state of a new machine");
    ensure_eq!(*vm.config(), config, "its configuration");
    if ctx.has(Capability::Exec) && config.memory <= Mib(256) && config.vcpus <= 2 {
        Stage::Running.bring(ctx, &vm).await?;
        works(ctx, &vm, "with a drawn configuration").await?;
    }
    Ok(())
}

async fn written_and_read(ctx: &Context) -> Verdict {
    let config = drawn(ctx)?;
    let broken = |error: serde_json::Error| Broken::new(error.to_string());
    let text = serde_json::to_string(&config).map_err(broken)?;
    let read: VmConfig = serde_json::from_str(&text).map_err(broken)?;
    ensure_eq!(read, config, "a configuration that was written and read");
    // A field that is left out has its default.
    let mut value: serde_json::Value = serde_json::from_str(&text).map_err(broken)?;
    let fields: Vec<String> =
        value.as_object().map(|fields| fields.keys().cloned().collect()).unwrap_or_default();
    ensure!(!fields.is_empty(), "a written configuration has no field");
    let field = ctx.pick(&fields);
    if let Some(fields) = value.as_object_mut() {
        fields.remove(&field);
    }
    let without: VmConfig = serde_json::from_value(value).map_err(broken)?;
    let written = serde_json::to_value(&without).map_err(broken)?;
    let default = serde_json::to_value(VmConfig::default()).map_err(broken)?;
    ensure_eq!(written.get(&field), default.get(&field), "the field {field} left out");
    let vm = ctx.backend().create(read).await?;
    ensure_eq!(*vm.config(), config, "the configuration of a machine from what was read");
    Ok(())
}

async fn env_seen(ctx: &Context) -> Verdict {
    let (machine, request) = (ctx.text(40), ctx.text(40));
    let vm = made(ctx, |config| {
        config.env.insert("FROM_MACHINE".to_owned(), machine.clone());
        config.env.insert("FROM_BOTH".to_owned(), machine.clone());
    })
    .await?;
    vm.start().await?;
    let print = "printf '%s|' \"$FROM_MACHINE\" \"$FROM_BOTH\" \"$FROM_REQUEST\"";
    let output = vm.sh(print).await?;
    ensure_eq!(output.stdout_text(), format!("{machine}|{machine}||"), "a plain program");
    let asked = super::probe::script(print)
        .env("FROM_BOTH", request.clone())
        .env("FROM_REQUEST", request.clone());
    let output = vm.exec(asked).await?;
    ensure_eq!(output.stdout_text(), format!("{machine}|{request}|{request}|"), "a request's own");
    Ok(())
}

async fn hostname_seen(ctx: &Context) -> Verdict {
    let hostname = format!("h{:x}", ctx.draw(0, u64::MAX));
    let vm = made(ctx, |config| config.hostname.clone_from(&hostname)).await?;
    vm.start().await?;
    ensure_eq!(sh(&vm, "cat /proc/sys/kernel/hostname").await?, hostname, "the host name");
    Ok(())
}

async fn many_disks(ctx: &Context) -> Verdict {
    let count = ctx.draw(1, 4);
    let disks: Vec<_> = (0..count).map(|n| disk(ctx, &format!("/disks/number/{n}"))).collect();
    let vm = made(ctx, |config| config.disks.clone_from(&disks)).await?;
    vm.start().await?;
    for (n, disk) in disks.iter().enumerate() {
        vm.write(&format!("{}/which", disk.mount), n.to_string()).await?;
    }
    for (n, disk) in disks.iter().enumerate() {
        let found = vm.read_to_string(&format!("{}/which", disk.mount)).await?;
        ensure_eq!(found, n.to_string(), "the file on {}", disk.mount);
    }
    Ok(())
}

async fn missing_disk(ctx: &Context) -> Verdict {
    let missing = DiskConfig { read_only: true, ..disk(ctx, "/data") };
    // The file is looked for when the machine is made, or when it boots.
    let vm = match made(ctx, |config| config.disks.push(missing)).await {
        Ok(vm) => vm,
        refused => {
            ensure_err!(
                refused,
                VmErrorKind::InvalidConfig { field, .. } if field == "disks[0].path",
                "a machine with a missing read-only disk"
            );
            return Ok(());
        }
    };
    ensure_err!(
        vm.start().await,
        VmErrorKind::InvalidConfig { .. }
            | VmErrorKind::HostIo { .. }
            | VmErrorKind::BootFailed { .. },
        "a boot with a missing read-only disk"
    );
    ensure!(
        matches!(vm.state(), VmState::Crashed(_) | VmState::Created | VmState::Stopped),
        "a machine with a missing disk is {}",
        vm.state()
    );
    Ok(())
}

async fn exhausted(ctx: &Context) -> Verdict {
    let ordered = order(ctx, FaultOrder::next(FaultKind::CreateExhausted))?;
    // The host's memory is taken when the machine is made or when it boots.
    let outcome = match ctx.created().await {
        Ok(vm) => vm.start().await,
        Err(error) => Err(error),
    };
    ordered.must_have_fired(ctx)?;
    if let Err(error) = &outcome {
        ensure!(error.is_retriable(), "{error} is said not to be worth another try");
    }
    ensure_err!(outcome, VmErrorKind::ResourceExhausted { .. }, "a machine on a full host");
    works(ctx, &ctx.running().await?, "once the host has room").await
}
