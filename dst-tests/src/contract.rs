//! The contract as a test program: one test for each clause and backend.

use crate::{
    clause::Clause,
    plan::Plan,
    runner::{Session, failure_text},
    seeds::Seeds,
    target::{Target, default_seeds, trial_name},
};
use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    collections::BTreeSet,
    env,
    process::ExitCode,
    sync::{Arc, Condvar, Mutex, PoisonError},
};

/// A test program that holds backends to the contract.
///
/// ```no_run
/// # use std::{process::ExitCode, sync::Arc};
/// # use vm_dst::target::TokioTarget;
/// # fn backend() -> TokioTarget { unimplemented!() }
/// fn main() -> ExitCode {
///     vm_dst::contract_main(vec![Arc::new(backend())])
/// }
/// ```
#[derive(Debug)]
pub struct Contract {
    targets: Vec<Arc<dyn Target>>,
    clauses: Option<Vec<&'static Clause>>,
    all_required_listed: bool,
}

/// Runs the contract against `targets` as a test program with the usual arguments, to be returned from `main`.
///
/// The variables `DST_SEED`, `DST_SEEDS` and `REQUIRE_BACKENDS` are read; a value that cannot be read is an error.
#[must_use]
pub fn contract_main(targets: Vec<Arc<dyn Target>>) -> ExitCode {
    Contract::of(targets).main()
}

impl Contract {
    /// Binds `targets`.
    #[must_use]
    pub fn of(targets: Vec<Arc<dyn Target>>) -> Self {
        Self { targets, clauses: None, all_required_listed: false }
    }

    /// Fails where `REQUIRE_BACKENDS` names a backend that this program does not have.
    #[must_use]
    pub fn refusing_unknown_backends(mut self) -> Self {
        self.all_required_listed = true;
        self
    }

    /// Puts other clauses in place of the registry's.
    #[must_use]
    pub fn with_clauses(mut self, clauses: Vec<&'static Clause>) -> Self {
        self.clauses = Some(clauses);
        self
    }

    /// Runs as a test program with the arguments of the process.
    #[must_use]
    pub fn main(self) -> ExitCode {
        let arguments = Arguments::from_args();
        let (seeds, required) = match (Seeds::from_env(), required_backends()) {
            (Ok(seeds), Ok(required)) => (seeds, required),
            (seeds, required) => {
                let seeds = seeds.err().map(|error| error.to_string());
                for error in seeds.into_iter().chain(required.err()) {
                    complain(&error);
                }
                return ExitCode::from(2);
            }
        };
        if !arguments.list {
            self.introduce(seeds);
        }
        let trials = self.trials(seeds, &required);
        libtest_mimic::run(&arguments, trials).exit_code()
    }

    /// Says what is about to be run, and where.
    #[expect(clippy::print_stdout, reason = "this is a test program's output")]
    fn introduce(&self, seeds: Option<Seeds>) {
        for target in &self.targets {
            let seeds = seeds.unwrap_or_else(|| default_seeds(&**target));
            println!("{}: environment: {}; seeds: {seeds}", target.name(), target.environment());
        }
    }

    fn trials(&self, seeds: Option<Seeds>, required: &BTreeSet<String>) -> Vec<Trial> {
        let mut trials = Vec::new();
        for target in &self.targets {
            let seeds = seeds.unwrap_or_else(|| default_seeds(&**target));
            let plan = match &self.clauses {
                Some(clauses) => Plan::out_of(clauses.iter().copied(), &**target, &[]),
                None => Plan::of(&**target, &[]),
            };
            let turns = Arc::new(Turns::new(target.parallel_runs()));
            for clause in plan.clauses {
                let (target, turns) = (target.clone(), turns.clone());
                let name = trial_name(target.name(), clause);
                trials.push(Trial::test(name, move || {
                    let _turn = turns.wait();
                    one(&target, clause, seeds)
                }));
            }
            for ignored in plan.ignored {
                let name = trial_name(target.name(), ignored.clause);
                let reason = ignored.reason.clone();
                let trial = Trial::test(name, move || Err(Failed::from(reason)));
                trials.push(trial.with_kind(ignored.reason).with_ignored_flag(true));
            }
            if required.contains(target.name()) {
                let target = target.clone();
                trials.push(Trial::test(format!("{}::runs_here", target.name()), move || {
                    target.fit().map_err(|reason| {
                        let name = target.name();
                        format!("REQUIRE_BACKENDS names {name}, which cannot run here: {reason}")
                            .into()
                    })
                }));
            }
        }
        if self.all_required_listed {
            let known: BTreeSet<_> = self.targets.iter().map(|target| target.name()).collect();
            for name in required.iter().filter(|name| !known.contains(name.as_str())) {
                let text =
                    format!("REQUIRE_BACKENDS names `{name}`, which this program does not have");
                trials.push(Trial::test(format!("{name}::is_known"), move || Err(text.into())));
            }
        }
        trials
    }
}

fn one(target: &Arc<dyn Target>, clause: &'static Clause, seeds: Seeds) -> Result<(), Failed> {
    let plan = Plan { clauses: vec![clause], ignored: Vec::new() };
    let mut session = Session::new(target.clone(), plan, seeds);
    session.jobs = 1;
    let summary = session.run(&mut |_| {});
    let Some(failure) = summary.failures.first() else {
        if summary.interrupted {
            return Err("no thread could be started to run the clause".into());
        }
        return Ok(());
    };
    let (failed, runs) = (summary.failed, summary.runs);
    Err(format!("{failed} of {runs} runs failed\n{}", failure_text(failure)).into())
}

fn required_backends() -> Result<BTreeSet<String>, String> {
    match env::var("REQUIRE_BACKENDS") {
        Ok(text) => backend_names(&text),
        Err(env::VarError::NotPresent) => Ok(BTreeSet::new()),
        Err(env::VarError::NotUnicode(_)) => Err("REQUIRE_BACKENDS: not UTF-8".to_owned()),
    }
}

fn backend_names(text: &str) -> Result<BTreeSet<String>, String> {
    if text.is_empty() {
        return Ok(BTreeSet::new());
    }
    let names = text.split(',').map(|name| match name.trim() {
        "" => Err(format!("REQUIRE_BACKENDS: `{text}` has an empty name; write `sim,process`")),
        name => Ok(name.to_owned()),
    });
    names.collect()
}

#[expect(clippy::print_stderr, reason = "this is a test program's output")]
fn complain(text: &str) {
    eprintln!("error: {text}");
}

/// Lets only so many tests of one target run at a time.
struct Turns {
    free: Mutex<usize>,
    freed: Condvar,
}

struct Turn<'a>(&'a Turns);

impl Turns {
    fn new(limit: Option<usize>) -> Self {
        Self { free: Mutex::new(limit.unwrap_or(usize::MAX)), freed: Condvar::new() }
    }

    fn wait(&self) -> Turn<'_> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free =
            self.freed.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
        Turn(self)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn required_backends_are_named_with_commas() {
        let names = backend_names("kvm, libkrun").unwrap();
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["kvm", "libkrun"]);
        assert!(backend_names("").unwrap().is_empty());
        assert!(backend_names("kvm,,sim").is_err());
        assert!(backend_names(",").is_err());
    }
}
