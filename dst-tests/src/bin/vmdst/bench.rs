//! `vmdst bench`.

use crate::{Backend, FAILED, Problem, any_number, print, write_json};
use indicatif::{ProgressBar, ProgressStyle};
use std::{collections::BTreeMap, fmt::Write, path::PathBuf};
use vm_dst::{
    bench::{
        Bench, Measured,
        kvm::{KvmBench, KvmMeasured},
        side_by_side::SideBySide,
    },
    environment::Environment,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What to measure: the simulator or machines of KVM
    #[arg(long, value_enum, default_value_t = Backend::Sim)]
    backend: Backend,
    /// How many boots of machines of KVM
    #[arg(long, value_name = "N", default_value = "5", value_parser = any_number)]
    boots: u64,
    /// How many machines of KVM to make, start and kill, to look for what they leave
    #[arg(long, value_name = "N", default_value = "20", value_parser = any_number)]
    cycles: u64,
    /// How many seeds of the scenario of mixed operations
    #[arg(long, value_name = "N", default_value = "10000", value_parser = any_number)]
    seeds: u64,
    /// How many seeds of the idle scenario
    #[arg(long, value_name = "N", default_value = "20", value_parser = any_number)]
    idle_seeds: u64,
    /// Also runs so many seeds twice and compares the fingerprints
    #[arg(long, value_name = "N", default_value = "0", value_parser = any_number)]
    twice: u64,
    /// Where: madsim, tokio or turmoil. Default DST_ENV, else the one that explores most
    #[arg(long, value_name = "ENV")]
    env: Option<Environment>,
    /// Writes what was measured to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8, Problem> {
    match arguments.backend {
        Backend::Sim => {}
        Backend::Kvm => return run_kvm(arguments),
        Backend::Libkrun => return run_side_by_side(arguments),
        Backend::Process => {
            return Err(Problem::usage("there is nothing to measure of the process backend"));
        }
    }
    let Arguments { seeds, idle_seeds, twice, env, json, .. } = arguments;
    let environment = match env {
        Some(environment) => environment.available().map(|()| *environment),
        None => Environment::from_env(),
    };
    let environment = environment.map_err(Problem::usage)?;
    if *seeds == 0 || *idle_seeds == 0 {
        return Err(Problem::usage("at least 1 seed of each scenario is needed"));
    }
    // Sums of counts must not overflow.
    if [seeds, idle_seeds, twice].into_iter().any(|count| *count > 1 << 40) {
        return Err(Problem::usage("that many seeds take years"));
    }
    print(&format!("environment: {}\n", environment.describe()))?;
    let bar = progress_bar();
    let bench = Bench { environment, seeds: *seeds, idle_seeds: *idle_seeds, twice: *twice };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of 1000")]
    let measured = bench.run(&mut |share| bar.set_position((share * 1000.0) as u64));
    bar.finish_and_clear();
    let measured = measured.map_err(Problem::failed)?;
    if let Some(path) = json {
        write_json(path, &measured)?;
    }
    print(&text(&measured))?;
    Ok(if measured.differing_fingerprints == 0 { 0 } else { FAILED })
}

fn run_kvm(arguments: &Arguments) -> Result<u8, Problem> {
    let few = |what: &str, count: u64| {
        u32::try_from(count)
            .ok()
            .filter(|count| *count <= 100_000)
            .ok_or_else(|| Problem::usage(format!("--{what}: at most 100000")))
    };
    let (boots, cycles) = (few("boots", arguments.boots)?, few("cycles", arguments.cycles)?);
    if boots == 0 {
        return Err(Problem::usage("at least 1 boot is needed"));
    }
    let bar = progress_bar();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of 1000")]
    let measured =
        KvmBench { boots, cycles }.run(&mut |share| bar.set_position((share * 1000.0) as u64));
    bar.finish_and_clear();
    let measured = measured.map_err(Problem::failed)?;
    if let Some(path) = &arguments.json {
        write_json(path, &measured)?;
    }
    print(&kvm_text(&measured))?;
    Ok(if measured.left_over.is_empty() { 0 } else { FAILED })
}

fn run_side_by_side(arguments: &Arguments) -> Result<u8, Problem> {
    let boots = u32::try_from(arguments.boots).ok().filter(|boots| (1..=10_000).contains(boots));
    let boots = boots.ok_or_else(|| Problem::usage("--boots: 1 to 10000"))?;
    let bar = progress_bar();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of 1000")]
    let measured = SideBySide { boots }.run(&mut |share| bar.set_position((share * 1000.0) as u64));
    bar.finish_and_clear();
    let measured = measured.map_err(Problem::failed)?;
    if let Some(path) = &arguments.json {
        write_json(path, &measured)?;
    }
    let mut text = format!("medians of {boots} boots of each, turn by turn\n");
    for side in &measured {
        let resident =
            side.resident_kib.map_or("unknown".to_owned(), |kib| format!("{kib:.0} KiB"));
        let _ = write!(
            text,
            "\n{} ({})\n  start to ready      {:.0} ms\n  exec round trip     {:.0} us\n  ping                {:.0} us\n  \
             pause and resume    {:.2} ms\n  resident beside the guest  {resident}\n",
            side.backend,
            side.launcher,
            side.start_ms,
            side.exec_round_trip_us,
            side.ping_us,
            side.pause_resume_ms,
        );
    }
    print(&text)?;
    Ok(0)
}

fn kvm_text(measured: &KvmMeasured) -> String {
    let mut text = format!("machines of KVM, medians of {} boots\n", measured.boots);
    let mut line = |what: &str, value: String| {
        let _ = writeln!(text, "  {what:32} {value}");
    };
    line("launcher", measured.launcher.clone());
    for stage in KvmBench::STAGES {
        // A guest without a serial console tells nothing of its stages.
        let took = measured.stages_ms.get(stage).filter(|took| !took.is_nan());
        line(stage, took.map_or_else(|| "unknown".to_owned(), |took| format!("{took:.1} ms")));
    }
    line("start to ready", format!("{:.1} ms", measured.start_ms));
    line("first_exec", format!("{:.1} ms", measured.first_exec_ms));
    line("exec_round_trip", format!("{:.0} us", measured.exec_round_trip_us));
    line("ping", format!("{:.0} us", measured.ping_us));
    line("exec over ping", format!("{:.1}", measured.exec_over_ping));
    let kib =
        |kib: Option<f64>| kib.map_or_else(|| "unknown".to_owned(), |kib| format!("{kib:.0} KiB"));
    line("VMM memory beside the guest's", kib(measured.vmm_resident_kib));
    line("fork to the child's first exec", format!("{:.1} ms", measured.fork_to_exec_ms));
    parts(&mut line, KvmBench::FORK_STAGES, &measured.fork_stages_ms);
    line("source paused for a fork", format!("{:.1} ms", measured.fork_paused_ms));
    line("private memory of an idle child", kib(measured.idle_child_private_kib));
    line("  its guest's", kib(measured.idle_child_guest_kib));
    line("private memory after an exec", kib(measured.child_private_kib));
    line("snapshot", format!("{:.1} ms", measured.snapshot_ms));
    line("paused for a snapshot", format!("{:.1} ms", measured.snapshot_paused_ms));
    line("its file", format!("{:.0} KiB", measured.snapshot_kib));
    line("restore to the first exec", format!("{:.1} ms", measured.restore_to_exec_ms));
    parts(&mut line, KvmBench::RESTORE_STAGES, &measured.restore_stages_ms);
    line("incremental snapshot", format!("{:.1} ms", measured.increment_ms));
    line("paused for it", format!("{:.1} ms", measured.increment_paused_ms));
    line("its file", format!("{:.0} KiB", measured.increment_kib));
    let left = match measured.left_over.is_empty() {
        true => "nothing".to_owned(),
        false => measured.left_over.join(", "),
    };
    line(&format!("left by {} cycles", measured.cycles), left);
    text
}

/// Says how long each part of something took.
fn parts(
    line: &mut impl FnMut(&str, String),
    names: &[&'static str],
    took_ms: &BTreeMap<&'static str, f64>,
) {
    for part in names {
        let took = took_ms.get(part).copied().unwrap_or(f64::NAN);
        line(&format!("  {part}"), format!("{took:.1} ms"));
    }
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(1000);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {percent}%, {eta} left") {
        bar.set_style(style);
    }
    bar
}

fn text(measured: &Measured) -> String {
    let Measured { seeds, operations, timers_per_seed, events_per_seed, .. } = measured;
    let mut text = format!("{seeds} seeds of {operations} mixed operations on one core\n");
    let mut line = |what: &str, value: String| {
        let _ = writeln!(text, "  {what:32} {value}");
    };
    line("seeds per second", format!("{:.0}", measured.seeds_per_second_per_core));
    line(
        "of the rate of bare madsim",
        match (measured.ratio_to_bare_madsim, measured.ratio_missing_because) {
            (Some(ratio), _) => format!("{ratio:.2}"),
            (None, reason) => format!("not measured: {}", reason.unwrap_or_default()),
        },
    );
    line("virtual over real time, idle", format!("{:.0}", measured.simulated_time_ratio));
    line("timers per seed", format!("{timers_per_seed:.1}"));
    line("events per seed", format!("{events_per_seed:.1}"));
    let memory =
        |kib: Option<u64>| kib.map_or_else(|| "unknown".to_owned(), |kib| format!("{kib} KiB"));
    let (before, after) =
        (memory(measured.resident_kib_before), memory(measured.resident_kib_after));
    line("resident memory", format!("{before} before, {after} after"));
    if measured.seeds_run_twice > 0 {
        let Measured { seeds_run_twice, differing_fingerprints, .. } = measured;
        line(
            "run twice",
            format!("{seeds_run_twice} seeds: {differing_fingerprints} differing fingerprints"),
        );
    }
    text
}
