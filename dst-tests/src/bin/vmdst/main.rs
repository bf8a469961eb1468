//! The `vmdst` command: runs the contract, replays failures, lists clauses and measures.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand, ValueEnum};
use std::{
    io::{self, Write},
    process::ExitCode,
    sync::Arc,
};
use vm_dst::{
    contract_doc,
    environment::Environment,
    seeds::{BadSeeds, number},
    target::{KrunTarget, KvmTarget, ProcessTarget, SimTarget, Target},
};

mod bench;
mod coverage;
mod diff;
mod doctor;
mod histories;
mod interrupt;
mod jobs;
mod merge;
mod mutants;
mod outputs;
mod replay;
mod run;
mod shrink;
mod soak;

/// Something failed.
const FAILED: u8 = 1;
/// The command was used in a way that makes no sense.
const BAD_USAGE: u8 = 2;
/// Ended by Ctrl-C.
const INTERRUPTED: u8 = 130;

/// Why `--env` is refused.
const ENV_OF_SIM: &str = "--env is for the simulated backend; the others run in real time";

/// Holds virtual machine backends to the behavioural contract of twinvm.
#[derive(Debug, Parser)]
#[command(name = "vmdst", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs clauses under many seeds
    Run(run::Arguments),
    /// Puts the reports of several machines or backends together
    Merge(merge::Arguments),
    /// Runs one clause with one seed, or a script from a file, and prints everything that happens
    Replay(replay::Arguments),
    /// Makes a failing script small
    Shrink(shrink::Arguments),
    /// Carries out the same generated histories on two backends and compares them step by step
    Diff(diff::Arguments),
    /// Lists the clauses
    Clauses {
        /// As the Markdown of docs/contract.md
        #[arg(long)]
        markdown: bool,
    },
    /// Says what can run here, and why not where it cannot
    Doctor,
    /// Measures the simulator
    Bench(bench::Arguments),
    /// Counts which operations meet which states and faults, and says what never happened
    Coverage(coverage::Arguments),
    /// Runs the contract against each planted bug and says which clause notices it
    Mutants(mutants::Arguments),
    /// Restores, forks or boots machines many times in a row, and says how often it went well
    Soak(soak::Arguments),
}

/// Which backend, and in which environment.
#[derive(Clone, Debug, clap::Args)]
struct Chosen {
    /// The backend to hold to the contract
    #[arg(long, value_enum, default_value_t = Backend::Sim)]
    backend: Backend,
    /// Where simulated runs take place: madsim, tokio or turmoil. Default DST_ENV, else the one that explores most
    #[arg(long, value_name = "ENV")]
    env: Option<Environment>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// The simulated backend
    Sim,
    /// The real guest agent as a process of this host
    Process,
    /// Machines of KVM
    Kvm,
    /// Machines of libkrun
    Libkrun,
}

impl Chosen {
    fn target(&self) -> Result<Arc<dyn Target>, Problem> {
        if self.backend != Backend::Sim && self.env.is_some() {
            return Err(Problem::usage(ENV_OF_SIM));
        }
        self.target_of(self.backend)
    }

    fn target_of(&self, backend: Backend) -> Result<Arc<dyn Target>, Problem> {
        Ok(match backend {
            Backend::Sim => Arc::new(SimTarget::new(self.environment()?)),
            Backend::Process => Arc::new(ProcessTarget::new()),
            Backend::Kvm => Arc::new(KvmTarget::new()),
            Backend::Libkrun => Arc::new(KrunTarget::new()),
        })
    }

    /// Gives the environment of simulated runs, and none for a backend that runs in real time.
    fn environment_of_sim(&self) -> Result<Option<Environment>, Problem> {
        match self.backend {
            Backend::Sim => self.environment().map(Some),
            _ if self.env.is_some() => Err(Problem::usage(ENV_OF_SIM)),
            _ => Ok(None),
        }
    }

    fn environment(&self) -> Result<Environment, Problem> {
        let chosen = match self.env {
            Some(environment) => environment
                .available()
                .map_err(|why| format!("--env {environment}: {why}"))
                .map(|()| environment),
            None => Environment::from_env(),
        };
        chosen.map_err(Problem::usage)
    }
}

/// What ends the command early: a text for people and an exit code.
#[derive(Debug)]
struct Problem {
    text: String,
    code: u8,
}

impl Problem {
    fn usage(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: BAD_USAGE }
    }

    fn failed(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: FAILED }
    }
}

impl From<BadSeeds> for Problem {
    fn from(error: BadSeeds) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::failed(format!("cannot write: {error}"))
    }
}

/// Simulated runs allocate often and in small pieces; see `vmdst bench`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    vm_backend_process::run_agent_if_asked();
    vm_backend_kvm::run_launcher_if_asked();
    vm_backend_libkrun::run_launcher_if_asked();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Merge(arguments) => merge::run(&arguments),
        Command::Replay(arguments) => replay::run(&arguments),
        Command::Shrink(arguments) => shrink::run(&arguments),
        Command::Diff(arguments) => diff::run(&arguments),
        Command::Clauses { markdown } => {
            let text = if markdown { contract_doc::markdown() } else { contract_doc::plain() };
            print(&text).map(|()| 0)
        }
        Command::Doctor => doctor::run(),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Coverage(arguments) => coverage::run(&arguments),
        Command::Mutants(arguments) => mutants::run(&arguments),
        Command::Soak(arguments) => soak::run(&arguments),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(Problem { text, code }) => {
            let _ = writeln!(io::stderr(), "error: {text}");
            ExitCode::from(code)
        }
    }
}

/// Prints to standard output. A reader that has gone away is no failure.
fn print(text: &str) -> Result<(), Problem> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

fn write_json(path: &std::path::Path, value: &impl serde::Serialize) -> Result<(), Problem> {
    let fail =
        |error: &dyn std::fmt::Display| Problem::failed(format!("{}: {error}", path.display()));
    let mut text = serde_json::to_string_pretty(value).map_err(|error| fail(&error))?;
    text.push('\n');
    std::fs::write(path, text).map_err(|error| fail(&error))
}

fn any_number(text: &str) -> Result<u64, String> {
    number("not accepted", text).map_err(|error| error.to_string())
}
