//! The runner against targets and clauses that misbehave on purpose.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use third_party_backend::MemoryBackend;
use vm_dst::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    ensure, honesty,
    plan::Plan,
    report,
    runner::Session,
    seeds::{SeedSource, Seeds},
    session::Limits,
    summary::Summary,
    target::{Detail, Opened, RunReport, Target, TokioTarget},
};
use vm_trait::{Capabilities, VmBackend};

mod lying;

async fn kept(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    vm.kill().await?;
    Ok(())
}

async fn broken_for_seed_3(ctx: &Context) -> Verdict {
    ensure!(ctx.seed() != 3, "seed {} is refused", ctx.seed());
    Ok(())
}

async fn panics(_: &Context) -> Verdict {
    panic!("the check fell over");
}

async fn a_task_panics(ctx: &Context) -> Verdict {
    let task = ctx.spawn(async { panic!("the task fell over") });
    // The check itself does not mind.
    let _: Result<(), _> = task.join().await;
    Ok(())
}

async fn waits_for_ever(_: &Context) -> Verdict {
    pending::<()>().await;
    Ok(())
}

static KEPT: Clause = clause!(kept, "test.kept", "is kept", [], faults: []);
static BROKEN: Clause =
    clause!(broken_for_seed_3, "test.broken", "is broken for seed 3", [], faults: []);
static PANICS: Clause = clause!(panics, "test.panics", "panics", [], faults: []);
static TASK: Clause = clause!(a_task_panics, "test.task", "panics in a task", [], faults: []);
static WAITS: Clause = clause!(waits_for_ever, "test.waits", "never ends", [], faults: []);
static NEEDS: Clause = clause!(kept, "test.needs", "needs forks", [Fork], faults: []);
static FAULTS: Clause = clause!(kept, "test.faults", "needs a fault", [], faults: [GuestPanic]);

fn memory() -> TokioTarget {
    let claims = MemoryBackend::default().capabilities();
    TokioTarget::new("memory", claims, || async {
        let backend: Arc<dyn VmBackend> = Arc::new(MemoryBackend::default());
        backend
    })
    .with_limits(Limits { check: Duration::from_millis(300), leftovers: Duration::from_millis(50) })
}

fn run(target: Arc<dyn Target>, clauses: &[&'static Clause], seeds: u64) -> Summary {
    let plan = Plan { clauses: clauses.to_vec(), ignored: Vec::new() };
    let seeds = Seeds::range(0, seeds, SeedSource::Option).unwrap();
    Session::new(target, plan, seeds).run(&mut |_| {})
}

fn only_failure(summary: &Summary) -> &str {
    assert_eq!((summary.failed, summary.failures.len()), (1, 1), "{summary:?}");
    &summary.failures[0].broken
}

#[test]
fn sums_are_those_of_the_runs() {
    let summary = run(Arc::new(memory()), &[&KEPT, &BROKEN], 5);
    assert_eq!((summary.seeds, summary.clauses, summary.runs), (5, 2, 10));
    assert_eq!(summary.last_line(), "5 seeds, 2 clauses, 10 runs: 1 failed");
    assert_eq!(summary.per_clause.iter().map(|clause| clause.failed).collect::<Vec<_>>(), [0, 1]);
    assert!(!summary.passed() && !summary.interrupted);
    let failure = &summary.failures[0];
    assert_eq!((failure.clause, failure.seed), ("test.broken", 3));
    let json = serde_json::to_value(&summary).unwrap();
    for key in ["seeds", "clauses", "runs", "failed", "ignored", "faults_fired"] {
        assert!(json.get(key).is_some(), "{key}");
    }
}

#[test]
fn a_failure_shows_promise_sight_and_replay() {
    let summary = run(Arc::new(memory()), &[&BROKEN], 5);
    let text = report::text(&summary, Some(100));
    for part in ["is broken for seed 3", "seed 3 is refused", "runner.rs:"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert!(text.contains("DST_SEED=0x3 cargo test -- --exact memory::test::broken"), "{text}");
    let replayed = memory().run(&BROKEN, 3, Detail::Timeline);
    assert!(replayed.broken.unwrap().contains("seed 3 is refused"));
    assert!(memory().run(&BROKEN, 4, Detail::Timeline).broken.is_none());
}

#[test]
fn panics_are_caught_wherever_they_happen() {
    let summary = run(Arc::new(memory()), &[&PANICS], 1);
    assert!(only_failure(&summary).contains("the check fell over"));
    let summary = run(Arc::new(memory()), &[&TASK], 1);
    assert!(only_failure(&summary).contains("the task fell over"));
}

#[test]
fn a_check_that_waits_for_ever_is_broken() {
    let summary = run(Arc::new(memory()), &[&WAITS], 1);
    assert!(only_failure(&summary).contains("did not end within 300ms"));
}

#[test]
fn what_is_left_behind_is_held_against_the_backend() {
    let target = TokioTarget::opened_by("memory", Capabilities::default(), || async {
        let mut opened = Opened::new(Arc::new(MemoryBackend::default()));
        opened.leftovers = Arc::new(|| vec!["a socket".to_owned()]);
        Ok(opened)
    });
    let target =
        target.with_limits(Limits { leftovers: Duration::from_millis(20), ..Limits::REAL });
    let summary = run(Arc::new(target), &[&KEPT], 1);
    assert!(only_failure(&summary).contains("left behind after 20ms: a socket"));
}

#[test]
fn a_backend_that_cannot_be_opened_fails() {
    let target = TokioTarget::opened_by("memory", Capabilities::default(), || async {
        Err("no such host".to_owned())
    });
    let summary = run(Arc::new(target), &[&KEPT], 1);
    assert!(only_failure(&summary).contains("no such host"));
}

#[test]
fn clauses_that_cannot_bind_are_left_out_with_the_reason() {
    let plan = Plan::out_of([&KEPT, &NEEDS, &FAULTS], &memory(), &[]);
    let ignored: Vec<_> =
        plan.ignored.iter().map(|one| (one.clause.id, one.reason.as_str())).collect();
    assert_eq!(
        ignored,
        [
            ("test.needs", "the backend has no fork"),
            ("test.faults", "cannot be made to happen here: guest_panic"),
        ]
    );
    // In place of what it lacks, it is held to saying so.
    let ids: Vec<_> = plan.clauses.iter().map(|clause| clause.id).collect();
    assert!(ids.contains(&"test.kept") && ids.contains(&"honesty.fork"));
    assert!(!ids.contains(&"honesty.files"), "it claims files");
}

#[test]
fn a_backend_that_does_not_fit_here_is_ignored_as_a_whole() {
    let target = memory().with_fit(|| Err("no /dev/memory".to_owned()));
    let plan = Plan::out_of([&KEPT], &target, &[]);
    assert!(plan.clauses.is_empty());
    assert!(plan.ignored.iter().all(|one| one.reason == "cannot run here: no /dev/memory"));
    let seeds = Seeds::one(0, SeedSource::Option);
    let summary = Session::new(Arc::new(target), plan, seeds).run(&mut |_| {});
    assert!(summary.last_line().starts_with("1 seeds, 0 clauses, 0 runs: 0 failed, "));
}

#[test]
fn every_lie_about_a_missing_capability_is_caught() {
    let lacks_all = Capabilities::default();
    for (capability, clause) in honesty::CLAUSES {
        let honest = TokioTarget::new("honest", lacks_all, || async { lying::backend(None) });
        let summary = run(Arc::new(honest), &[clause], 2);
        assert!(summary.passed(), "{}: {:?}", clause.id, summary.failures);
        let lie = *capability;
        let liar =
            TokioTarget::new("liar", lacks_all, move || async move { lying::backend(Some(lie)) });
        let summary = run(Arc::new(liar), &[clause], 1);
        assert_eq!(summary.failed, 1, "{} did not see the lie", clause.id);
    }
}

/// A target that never comes back from one seed.
#[derive(Debug, Default)]
struct Stuck {
    released: Arc<AtomicBool>,
    runs: AtomicU64,
}

impl Target for Stuck {
    fn name(&self) -> &str {
        "stuck"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::all()
    }

    fn environment(&self) -> &str {
        "none"
    }

    fn is_deterministic(&self) -> bool {
        true
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(100)
    }

    fn run(&self, _: &'static Clause, seed: u64, _: Detail) -> RunReport {
        let count = self.runs.fetch_add(1, Ordering::Relaxed);
        while seed == 2 && !self.released.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Seed 5 is different every time.
        let fingerprint = if seed == 5 { u128::from(count) } else { u128::from(seed) };
        RunReport { fingerprint: Some(fingerprint), ..RunReport::default() }
    }
}

#[test]
fn a_run_that_never_ends_is_given_up_and_the_others_go_on() {
    let began = Instant::now();
    let stuck = Arc::new(Stuck::default());
    let summary = run(stuck.clone(), &[&KEPT], 5);
    stuck.released.store(true, Ordering::Relaxed);
    assert_eq!(summary.runs, 5);
    assert!(only_failure(&summary).contains("a livelock"));
    assert_eq!(summary.failures[0].seed, 2);
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[test]
fn differing_fingerprints_are_counted_and_fail() {
    let target = Arc::new(Stuck::default());
    target.released.store(true, Ordering::Relaxed);
    let plan = Plan { clauses: vec![&KEPT], ignored: Vec::new() };
    let mut session = Session::new(target, plan, Seeds::range(0, 7, SeedSource::Option).unwrap());
    session.twice = true;
    let summary = session.run(&mut |_| {});
    assert_eq!((summary.runs, summary.differing, summary.failed), (14, 1, 1));
    assert_eq!(summary.failures[0].seed, 5);
    assert!(report::text(&summary, None).contains("7 seeds run twice: 1 differing fingerprints"));
}

#[test]
fn an_interrupt_ends_the_session_with_what_ran() {
    let target = Arc::new(Stuck::default());
    target.released.store(true, Ordering::Relaxed);
    let plan = Plan { clauses: vec![&KEPT], ignored: Vec::new() };
    let seeds = Seeds::range(0, 1 << 40, SeedSource::Option).unwrap();
    let mut session = Session::new(target, plan, seeds);
    let flag = Arc::new(AtomicBool::new(false));
    session.interrupt = flag.clone();
    let summary = session.run(&mut |progress| {
        flag.store(progress.done >= 10, Ordering::Relaxed);
    });
    assert!(summary.interrupted && !summary.passed());
    assert!(summary.runs >= 10 && summary.runs < 1 << 40);
    assert!(report::text(&summary, None).contains("interrupted after "));
}
