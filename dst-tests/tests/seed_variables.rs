//! Proves that a contract test program runs exactly the seeds that `DST_SEED` and `DST_SEEDS` ask for, and refuses
//! what it cannot read: the program runs itself once more as a contract test whose target writes its seeds down.

use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    env,
    fs::OpenOptions,
    io::Write,
    path::PathBuf,
    process::{Command, ExitCode, Output},
    sync::Arc,
};
use vm_dst::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    contract::Contract,
    target::{Detail, RunReport, Target},
};
use vm_trait::Capabilities;

/// Where the inner program writes its seeds down.
const RECORD: &str = "SEED_VARIABLES_RECORD";
const VARIABLES: [&str; 3] = ["DST_SEED", "DST_SEEDS", "REQUIRE_BACKENDS"];

static CLAUSE: Clause = clause!(nothing, "test.nothing", "holds", [], faults: []);

async fn nothing(_: &Context) -> Verdict {
    Ok(())
}

#[derive(Debug)]
struct Recorder(PathBuf);

impl Target for Recorder {
    fn name(&self) -> &str {
        "recorder"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::all()
    }

    fn environment(&self) -> &str {
        "none"
    }

    fn test_seeds(&self) -> u64 {
        3
    }

    fn run(&self, _: &'static Clause, seed: u64, _: Detail) -> RunReport {
        let file = OpenOptions::new().create(true).append(true).open(&self.0);
        let broken = file.and_then(|mut file| writeln!(file, "{seed}")).err();
        let broken = broken.map(|error| error.to_string());
        RunReport { broken, ..RunReport::default() }
    }
}

fn main() -> ExitCode {
    if let Some(path) = env::var_os(RECORD) {
        let contract = Contract::of(vec![Arc::new(Recorder(path.into()))]);
        return contract.with_clauses(vec![&CLAUSE]).refusing_unknown_backends().main();
    }
    let trials = vec![
        Trial::test("dst_seed_runs_exactly_that_seed", exactly),
        Trial::test("dst_seeds_runs_that_many", many),
        Trial::test("no_variable_runs_the_default", default),
        Trial::test("random_runs_one_and_prints_it", random),
        Trial::test("bad_values_are_refused", refused),
        Trial::test("required_backends_must_be_there", required),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Runs the inner program with these variables, and gives its output and the seeds that it ran.
fn inner(variables: &[(&str, &str)]) -> Result<(Output, Vec<u64>), Failed> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("seeds");
    let mut command = Command::new(env::current_exe()?);
    VARIABLES.iter().for_each(|name| {
        command.env_remove(name);
    });
    let output = command.env(RECORD, &path).envs(variables.iter().copied()).output()?;
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let seeds = text.lines().map(str::parse).collect::<Result<_, _>>()?;
    Ok((output, seeds))
}

fn expect(holds: bool, text: impl std::fmt::Debug) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(format!("{text:?}").into()) }
}

fn exactly() -> Result<(), Failed> {
    for (text, seed) in [("0x2a", 42), ("42", 42), ("0", 0), ("0xffffffffffffffff", u64::MAX)] {
        let (output, seeds) = inner(&[("DST_SEED", text)])?;
        expect(output.status.success() && seeds == [seed], (text, seeds, output))?;
    }
    Ok(())
}

fn many() -> Result<(), Failed> {
    let (output, seeds) = inner(&[("DST_SEEDS", "5")])?;
    expect(output.status.success() && seeds == [0, 1, 2, 3, 4], (seeds, output))
}

fn default() -> Result<(), Failed> {
    let (output, seeds) = inner(&[])?;
    expect(output.status.success() && seeds == [0, 1, 2], (seeds, output))
}

fn random() -> Result<(), Failed> {
    let (output, seeds) = inner(&[("DST_SEED", "random")])?;
    let [seed] = seeds[..] else { return Err(format!("{seeds:?}").into()) };
    let printed = String::from_utf8_lossy(&output.stdout).contains(&format!("{seed:#x}"));
    expect(output.status.success() && printed, (seed, output))
}

fn refused() -> Result<(), Failed> {
    let bad: [&[(&str, &str)]; 6] = [
        &[("DST_SEED", "many")],
        &[("DST_SEED", "")],
        &[("DST_SEEDS", "0")],
        &[("DST_SEEDS", "-1")],
        &[("DST_SEED", "1"), ("DST_SEEDS", "2")],
        &[("REQUIRE_BACKENDS", "sim,,")],
    ];
    for variables in bad {
        let (output, seeds) = inner(variables)?;
        let named = String::from_utf8_lossy(&output.stderr).contains(variables[0].0);
        let refused = output.status.code() == Some(2) && seeds.is_empty() && named;
        expect(refused, (variables, seeds, output))?;
    }
    Ok(())
}

fn required() -> Result<(), Failed> {
    let (output, _) = inner(&[("REQUIRE_BACKENDS", "recorder")])?;
    expect(output.status.success(), output)?;
    let (output, _) = inner(&[("REQUIRE_BACKENDS", "recorder,kvm")])?;
    expect(!output.status.success(), output)
}
