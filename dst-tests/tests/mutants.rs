//! The planted bugs, each against the clauses that are known to catch it. `vmdst mutants` does the same with more seeds
//! and every clause.

use std::sync::{Arc, atomic::AtomicBool};
use vm_dst::{
    environment::Environment,
    mutants::{Hunt, Reach, catchers, markdown},
    plan, runner,
    target::SimTarget,
};
use vm_planted_bugs::{Area, Bug};

/// From how many seeds a bug has to hide here.
const SEEDS: u64 = 50;

#[test]
fn every_planted_bug_is_caught() {
    let hunt = Hunt {
        target: Arc::new(SimTarget::new(Environment::best())),
        bugs: Bug::ALL.to_vec(),
        seeds: SEEDS,
        jobs: runner::cores(),
        reach: Reach::Known,
        interrupt: Arc::new(AtomicBool::new(false)),
    };
    let bag = hunt.run(&mut |_| {}).expect("the tests have the bugs built in");
    let survivors: Vec<_> = bag.survivors().map(|survivor| survivor.bug).collect();
    // In another environment fewer schedules are explored, and a bug may need more seeds.
    assert!(survivors.is_empty() || !cfg!(madsim), "not caught: {survivors:?}");
    assert_eq!(bag.outcomes.len(), Bug::ALL.len());
    assert!(bag.outcomes.iter().all(|outcome| outcome.caught.is_none() || outcome.reached > 0));
}

#[test]
fn every_bug_names_clauses_that_there_are() {
    for bug in Bug::ALL {
        assert!(!catchers(*bug).is_empty(), "{bug}");
        for id in catchers(*bug) {
            assert!(plan::find(id).is_some(), "{bug}: {id}");
        }
    }
}

#[test]
fn every_area_has_bugs_and_there_are_at_least_sixty() {
    assert!(Bug::ALL.len() >= 60, "{}", Bug::ALL.len());
    for area in [
        Area::State,
        Area::Core,
        Area::Client,
        Area::Agent,
        Area::Protocol,
        Area::Container,
        Area::Simulator,
    ] {
        assert!(Bug::ALL.iter().any(|bug| bug.area() == area), "{area:?}");
    }
}

#[test]
fn the_document_is_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/planted-bugs.md");
    assert_eq!(std::fs::read_to_string(path).unwrap(), markdown());
}
