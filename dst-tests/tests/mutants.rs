//! The planted bugs, each against the clauses that are known to catch it. `vmdst mutants` does the same with more seeds
//! and every clause.

use serde_json::Value;
use std::{
    process::Command,
    sync::{Arc, atomic::AtomicBool},
};
use vm_dst::{
    environment::Environment,
    mutants::{Hunt, Reach, catchers, markdown},
    plan, runner,
    target::SimTarget,
};
use vm_planted_bugs::{Area, Bug};

/// From how many seeds a bug has to hide here.
const SEEDS: u64 = 200;

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

fn vmdst(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vmdst")).args(arguments).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn the_command_tells_what_caught_a_bug_and_writes_it_as_data() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mutants.json");
    let (code, text) =
        vmdst(&["mutants", "--only", "stop-forgets-crash", "--json", path.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("1 bugs: 1 caught, 0 survived"), "{text}");
    let json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let outcome = &json["outcomes"][0];
    assert_eq!(outcome["bug"], "stop-forgets-crash");
    assert!(outcome["caught"]["clause"].is_string() && outcome["caught"]["seeds"].is_u64());
}

#[test]
fn a_bug_that_hides_well_enough_fails_the_command() {
    // Only one clause of many programs notices it, and that one only in few of its runs.
    let (code, text) = vmdst(&["mutants", "--only", "missed-events-are-not-told", "--seeds", "1"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("SURVIVED missed-events-are-not-told"), "{text}");
}

#[test]
fn clauses_that_catch_no_bug_of_their_own_are_listed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mutants.json");
    let bugs = ["ended-machine-is-kept", "ids-repeat"].map(|bug| ["--only", bug]).concat();
    let all = ["mutants", "--every-clause", "--seeds", "1", "--json", path.to_str().unwrap()];
    let (code, text) = vmdst(&[&all[..], &bugs[..]].concat());
    assert_eq!(code, Some(0), "{text}");
    let json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let by = |outcome: usize| json["outcomes"][outcome]["by"].as_array().unwrap().clone();
    let idle = json["idle_clauses"].as_array().unwrap();
    let own = Value::from("lifecycle.ids_are_unique");
    assert!(by(0).contains(&own) && !idle.contains(&own), "{text}");
    // Every clause with a machine notices this one.
    let common = Value::from("exec.every_exit_code");
    assert!(by(1).contains(&common) && idle.contains(&common), "{text}");
}

#[test]
fn bad_usage_is_told_from_survivors() {
    let bad: [&[&str]; 3] = [
        &["mutants", "--only", "no-such-bug"],
        &["mutants", "--jobs", "0"],
        &["coverage", "--seeds", "0"],
    ];
    for arguments in bad {
        assert_eq!(vmdst(arguments).0, Some(2), "{arguments:?}");
    }
}
