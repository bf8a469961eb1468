//! `vmdst doctor`.

use crate::{Problem, print};
use std::{env, fmt::Write};
use vm_core::fault::FaultKind;
use vm_dst::{
    environment::Environment,
    plan::Plan,
    runner::cores,
    target::{KrunTarget, KvmTarget, ProcessTarget, SimTarget, Target},
};
use vm_trait::Capability;

pub(crate) fn run() -> Result<u8, Problem> {
    let mut text = format!(
        "vmdst {}, {} on {}, {} cores\n",
        env!("CARGO_PKG_VERSION"),
        env::consts::OS,
        env::consts::ARCH,
        cores()
    );
    text += "\nenvironments of the simulated backend\n";
    let chosen = Environment::from_env();
    for environment in Environment::ALL {
        let mark = if chosen.as_ref() == Ok(environment) { "*" } else { " " };
        let state = match environment.available() {
            Ok(()) => environment.describe().to_owned(),
            Err(why) => format!("not here: {why}"),
        };
        let _ = writeln!(text, "{mark} {:8} {state}", environment.name());
    }
    text += "\nvariables\n";
    for name in [
        "DST_SEED",
        "DST_SEEDS",
        "DST_ENV",
        "REQUIRE_BACKENDS",
        "TWINVM_KVM_LAUNCHER",
        "TWINVM_KRUN_LAUNCHER",
        "TWINVM_KERNEL",
        "TWINVM_MODULES",
        "TWINVM_ROOT",
        "RUSTFLAGS",
    ] {
        let value = env::var_os(name)
            .map_or_else(|| "not set".to_owned(), |value| format!("{}", value.display()));
        let _ = writeln!(text, "  {name:20} {value}");
    }
    let sim = SimTarget::new(chosen.clone().unwrap_or_else(|_| Environment::best()));
    let process = ProcessTarget::new();
    let kvm = KvmTarget::new();
    let libkrun = KrunTarget::new();
    let targets: [&dyn Target; 4] = [&sim, &process, &kvm, &libkrun];
    text += "\nbackends\n";
    for target in targets {
        text += &about(target);
    }
    text += "\nwhat machines of KVM need\n";
    for line in KvmTarget::findings() {
        let _ = writeln!(text, "  {line}");
    }
    text += "\nwhat machines of libkrun need\n";
    for line in KrunTarget::findings() {
        let _ = writeln!(text, "  {line}");
    }
    text += "\nfaults, and who can make them happen\n";
    for kind in FaultKind::ALL {
        let able: Vec<_> = targets
            .iter()
            .filter(|target| target.can_fault(*kind))
            .map(|target| target.name())
            .collect();
        let able = if able.is_empty() { "nobody".to_owned() } else { able.join(", ") };
        let scope = format!("{:?}", kind.scope()).to_lowercase();
        let _ = writeln!(text, "  {scope:9} {:20} {able}", kind.name());
    }
    print(&text)?;
    chosen.map_err(Problem::usage)?;
    Ok(0)
}

fn about(target: &dyn Target) -> String {
    let claimed = target.capabilities();
    let names = |has: bool| {
        let names =
            Capability::ALL.iter().filter(|one| claimed.has(**one) == has).map(|one| one.name());
        names.collect::<Vec<_>>().join(", ")
    };
    let plan = Plan::of(target, &[]);
    let fit = match target.fit() {
        Ok(()) => "runs here".to_owned(),
        Err(why) => format!("cannot run here: {why}"),
    };
    format!(
        "  {}: {fit}\n    environment: {}\n    has: {}\n    lacks: {}\n    clauses: {} to run, {} left out\n",
        target.name(),
        target.environment(),
        names(true),
        names(false),
        plan.clauses.len(),
        plan.ignored.len()
    )
}
