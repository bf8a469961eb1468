//! Generated histories find a defect, and what is left after shrinking shows it.

use std::{sync::Arc, time::Duration};
use vm_core::fault::FaultKind;
use vm_dst::{
    environment::Environment,
    history::{
        Script, Trial,
        compare::compare,
        generate, profile_on, program,
        script::{Act, Call, Disturbance, Program, Step},
        shrink::shrink,
    },
    target::{Detail, SimTarget, Target},
};

mod forgetful;

fn sim() -> SimTarget {
    SimTarget::new(Environment::best())
}

fn liar() -> SimTarget {
    sim().seen_through(forgetful::forgetful)
}

fn calls(script: &Script) -> Vec<&Act> {
    script.steps.iter().flat_map(Step::calls).map(|call| &call.act).collect()
}

#[test]
fn a_lie_is_found_and_shrinks_to_a_program_that_shows_it() {
    let (liar, profile) = (liar(), profile_on(&liar()));
    let failed = (0..200).find_map(|seed| {
        let trial = Trial::of(generate::script(seed, &profile), &liar, Detail::Fingerprint);
        trial.failure().is_some().then_some(trial)
    });
    let failed = failed.expect("200 histories do not find it");
    let honest = Trial::of(failed.script.clone(), &sim(), Detail::Fingerprint);
    assert_eq!(honest.failure(), None, "{}", honest.text());
    let sort = failed.failure();
    let mut fails =
        |script: &Script| Trial::of(script.clone(), &liar, Detail::Fingerprint).failure() == sort;
    let shrunk = shrink(&failed.script, Duration::from_secs(10), &mut fails);
    let text = program::program(&shrunk.script);
    assert!(shrunk.took < Duration::from_secs(11), "it took {:?}", shrunk.took);
    assert!(shrunk.is_minimal, "not minimal after {} tries:\n{text}", shrunk.tried);
    // A machine that runs, a pause or a copy that stands still, a resume, two writes, and what sees that the second is
    // not there.
    let size = shrunk.script.size();
    assert!(size <= 9, "{size} operations are left of {}:\n{text}", failed.script.size());
    let left = calls(&shrunk.script);
    let resumed = left.iter().any(|act| matches!(act, Act::Resume));
    let writes = left.iter().filter(|act| matches!(act, Act::Write { .. })).count();
    assert!(resumed && writes == 2, "{text}");
    assert_eq!(text.lines().count(), size, "{text}");
}

#[test]
fn a_saved_script_fails_again_and_is_a_difference_between_backends() {
    let path = || "~/a".to_owned();
    let write =
        |text: &str| Act::Write { path: path(), text: text.to_owned(), times: 1, mode: None };
    let acts = [
        Act::Create,
        Act::Start,
        Act::Pause,
        Act::Resume,
        write("first"),
        write("second"),
        Act::Read { path: path() },
    ];
    let steps = acts.into_iter().map(|act| Step::Do(Call::new(0, act))).collect();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("script.json");
    Script { seed: 3, steps }.save(&file).unwrap();
    let script = Script::load(&file).unwrap();
    let trial = Trial::of(script.clone(), &liar(), Detail::Fingerprint);
    let violation = trial.progress.violation.clone().expect("the lie is seen");
    assert_eq!(violation.step, 6, "{}", trial.text());
    assert_eq!(Trial::of(script.clone(), &sim(), Detail::Fingerprint).failure(), None);
    let comparison = compare(&script, &sim(), &liar());
    let divergence = comparison.divergence.expect("they differ");
    assert_eq!(divergence.step, 6, "{divergence:?}");
    assert!(compare(&script, &sim(), &sim()).agrees());
}

#[test]
fn the_same_history_has_the_same_fingerprint_and_record() {
    let (target, profile): (Arc<dyn Target>, _) = (Arc::new(sim()), profile_on(&sim()));
    for seed in 0..20 {
        let script = generate::script(seed, &profile);
        let run = || Trial::of(script.clone(), &*target, Detail::Fingerprint);
        let (first, second) = (run(), run());
        assert!(first.report.fingerprint.is_some());
        assert_eq!(first.report.fingerprint, second.report.fingerprint, "seed {seed}");
        assert_eq!(first.progress.record, second.progress.record, "seed {seed}");
    }
}

#[test]
fn only_machines_that_calls_wait_for_are_let_run_on() {
    let on = |vm, act| Step::Do(Call::new(vm, act));
    // Longer than a call is left to wait before guests that stand still are let run on.
    let slow = Disturbance { kind: FaultKind::BootSlow, vm: 1, skip: 0, amount_ms: Some(3_000) };
    let program = Program::Sleep(500);
    let sleep = Act::Exec { program, timeout_ms: None, output_limit: None };
    let mut pause = Call::new(0, Act::Pause);
    pause.after_ms = 100;
    let steps = vec![
        on(0, Act::Create),
        on(0, Act::Start),
        on(1, Act::Create),
        Step::Together(vec![Call::new(0, sleep), pause]),
        on(0, Act::Pause),
        Step::Fault(slow),
        on(1, Act::Start),
    ];
    let trial = Trial::of(Script { seed: 5, steps }, &sim(), Detail::Fingerprint);
    assert_eq!(trial.failure(), None, "{}", trial.text());
    let record = &trial.progress.record.steps;
    let resumed = |step: usize| record[step].calls.iter().any(|it| it.call.act == Act::Resume);
    assert!(resumed(3), "{}", trial.text());
    assert!(!resumed(6) && record[6].fired.contains(&FaultKind::BootSlow), "{}", trial.text());
    assert_eq!(record[6].states, [(0, "paused".to_owned()), (1, "running".to_owned())].into());
}
