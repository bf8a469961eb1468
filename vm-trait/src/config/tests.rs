use super::*;

/// Names the field for which a configuration is refused.
pub(super) fn refused(config: &VmConfig) -> String {
    match config.validate_for(&HostLimits { max_vcpus: 8, max_memory: Mib(4096) }) {
        Err(VmErrorKind::InvalidConfig { field, .. }) => field,
        other => format!("{other:?}"),
    }
}

#[test]
fn timeouts_and_amounts_are_kept_and_shown() {
    let timeouts = Timeouts { boot: Duration::from_secs(77), ..Timeouts::default() };
    let built = VmConfig::builder().with_vcpus(3).with_timeouts(timeouts.clone());
    let config = built.build().unwrap();
    assert_eq!((config.vcpus, config.timeouts), (3, timeouts));
    assert_eq!(Mib(96).to_string(), "96 MiB");
}

#[test]
fn a_kernel_keeps_what_was_set_before() {
    let kernel = KernelConfig::default().with_path("/k").with_initrd("/i").with_cmdline("quiet");
    let wanted = KernelConfig {
        path: Some("/k".into()),
        initrd: Some("/i".into()),
        cmdline: "quiet".into(),
    };
    assert_eq!(kernel, wanted);
    let other = KernelConfig::default().with_cmdline("quiet").with_initrd("/i").with_path("/k");
    assert_eq!(other, wanted);
}

#[test]
fn each_bad_field_is_named() {
    type Change = fn(&mut VmConfig);
    let changes: &[(&str, Change)] = &[
        ("name", |c| c.name = Some(String::new())),
        ("name", |c| c.name = Some("a b".into())),
        ("name", |c| c.name = Some("x".repeat(65))),
        ("hostname", |c| c.hostname = String::new()),
        ("hostname", |c| c.hostname = "-a".into()),
        ("hostname", |c| c.hostname = "a_b".into()),
        ("vcpus", |c| c.vcpus = 0),
        ("vcpus", |c| c.vcpus = 9),
        ("memory", |c| c.memory = Mib(0)),
        ("memory", |c| c.memory = Mib(63)),
        ("memory", |c| c.memory = Mib(4097)),
        ("memory", |c| c.memory = Mib(u32::MAX)),
        ("env", |c| {
            c.env.insert("A=B".into(), String::new());
        }),
        ("env.A", |c| {
            c.env.insert("A".into(), "\0".into());
        }),
        ("kernel.path", |c| c.kernel.path = Some(PathBuf::new())),
        ("kernel.initrd", |c| c.kernel.initrd = Some("a\0b".into())),
        ("kernel.cmdline", |c| c.kernel.cmdline = "a\nb".into()),
        ("kernel.cmdline", |c| c.kernel.cmdline = "a".repeat(1025)),
        ("console_file", |c| c.console_file = Some(PathBuf::new())),
        ("console_bytes", |c| c.console_bytes = 1023),
        ("console_bytes", |c| c.console_bytes = (16 << 20) + 1),
        ("timeouts.boot", |c| c.timeouts.boot = Duration::ZERO),
        ("timeouts.pause", |c| c.timeouts.pause = Duration::ZERO),
        ("timeouts.capture", |c| c.timeouts.capture = Duration::ZERO),
        ("timeouts.request", |c| c.timeouts.request = Duration::ZERO),
        ("timeouts.link", |c| c.timeouts.link = Duration::ZERO),
        ("timeouts.kill", |c| c.timeouts.kill = Duration::ZERO),
    ];
    for (field, change) in changes {
        let mut config = VmConfig::default();
        change(&mut config);
        assert_eq!(refused(&config), *field);
    }
}

#[test]
fn what_a_backend_cannot_do_is_named() {
    let config = VmConfig {
        mounts: vec![MountConfig::new("h", "/a")],
        limits: BTreeMap::from([(Resource::Cpu, Limit::of(1))]),
        network: NetworkConfig::passt(),
        ..VmConfig::default()
    };
    for missing in [Capability::Mounts, Capability::Limits, Capability::NetworkPasst] {
        let expected = VmErrorKind::Unsupported { what: missing.name().to_owned() };
        let outcome = config.validate_with(Capabilities::all().without(missing));
        assert_eq!(format!("{outcome:?}"), format!("{:?}", Err::<(), _>(expected)));
    }
    let shared = VmConfig { root: RootConfig::shared("r"), ..VmConfig::default() };
    let without = |missing| shared.validate_with(Capabilities::all().without(missing));
    assert!(without(Capability::Mounts).is_err() && without(Capability::Root).is_ok());
    let others = Capabilities::all().without(Capability::NetworkTsi);
    assert!(config.validate_with(others).is_ok());
    assert!(VmConfig::default().validate_with(Capabilities::default()).is_ok());
}

#[test]
fn missing_fields_have_their_defaults_and_unknown_ones_are_refused() {
    let config: VmConfig = serde_json::from_str("{}").unwrap();
    assert_eq!(config, VmConfig::default());
    let config: VmConfig =
        serde_json::from_str(r#"{"disks":[{"path":"d","mount":"/d"}],"vcpus":2}"#).unwrap();
    assert_eq!((config.vcpus, config.disks[0].size), (2, Mib(64)));
    let text = r#"{"mounts":[{"path":"d","mount":"/d"}],"limits":{"nofile":{"soft":4,"hard":9}},
        "network":{"tsi":[{"host":8080,"guest":80}]}}"#;
    let given: VmConfig = serde_json::from_str(text).unwrap();
    assert_eq!(given.mounts, [MountConfig::new("d", "/d")]);
    assert_eq!(given.limits[&Resource::Nofile], Limit { soft: Some(4), hard: Some(9) });
    assert_eq!(given.network, NetworkConfig::tsi().with_port(8080, 80));
    assert!(serde_json::from_str::<VmConfig>(r#"{"vcpu":2}"#).is_err());
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<VmConfig>(&text).unwrap(), config);
}

#[test]
fn the_builder_keeps_all_that_was_set_before() {
    let wanted = VmConfig {
        name: Some("n".into()),
        labels: BTreeMap::from([("k".into(), "v".into())]),
        vcpus: 3,
        memory: Mib(96),
        hostname: "h".into(),
        env: BTreeMap::from([("A".into(), "1".into())]),
        kernel: KernelConfig::default().with_path("/k"),
        root: RootConfig::directory("/r"),
        disks: vec![DiskConfig::new("d", "/d")],
        mounts: vec![MountConfig::new("m", "/m")],
        network: NetworkConfig::tsi(),
        limits: BTreeMap::from([(Resource::Cpu, Limit::of(1))]),
        console_bytes: 2048,
        console_file: Some("/c".into()),
        timeouts: Timeouts { boot: Duration::from_secs(77), ..Timeouts::default() },
    };
    type Step = fn(VmConfigBuilder, &VmConfig) -> VmConfigBuilder;
    let steps: [Step; 15] = [
        |builder, _| builder.with_name("n"),
        |builder, _| builder.with_label("k", "v"),
        |builder, _| builder.with_vcpus(3),
        |builder, _| builder.with_memory(Mib(96)),
        |builder, _| builder.with_hostname("h"),
        |builder, _| builder.with_env("A", "1"),
        |builder, it| builder.with_kernel(it.kernel.clone()),
        |builder, it| builder.with_root(it.root.clone()),
        |builder, it| builder.with_disk(it.disks[0].clone()),
        |builder, it| builder.with_mount(it.mounts[0].clone()),
        |builder, it| builder.with_network(it.network.clone()),
        |builder, it| builder.with_limit(Resource::Cpu, it.limits[&Resource::Cpu]),
        |builder, _| builder.with_console_bytes(2048),
        |builder, _| builder.with_console_file("/c"),
        |builder, it| builder.with_timeouts(it.timeouts.clone()),
    ];
    // In either order, so that each is both before and after all others.
    let there = steps.iter().fold(VmConfig::builder(), |built, step| step(built, &wanted));
    let back = steps.iter().rev().fold(VmConfig::builder(), |built, step| step(built, &wanted));
    assert_eq!(there.build().unwrap(), wanted);
    assert_eq!(back.build().unwrap(), wanted);
}

#[test]
fn a_kernel_command_line_is_taken_up_to_its_most_bytes() {
    let mut config = VmConfig::default();
    config.kernel.cmdline = format!(" {}~", "a".repeat(1022));
    assert_eq!(config.validate(), Ok(()));
}
