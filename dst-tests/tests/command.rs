//! The `vmdst` command as its users see it: output, files, exit codes.

use serde_json::Value;
use std::process::{Command, Output, Stdio};

/// A clause that runs fast everywhere.
const CLAUSE: &str = "exec.every_exit_code";

fn vmdst(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmdst"));
    for name in ["DST_SEED", "DST_SEEDS", "DST_ENV", "REQUIRE_BACKENDS"] {
        command.env_remove(name);
    }
    command.args(arguments);
    command
}

fn output(arguments: &[&str]) -> (Option<i32>, String, String) {
    texts(&vmdst(arguments).output().unwrap())
}

fn texts(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_run_ends_with_its_sums_and_writes_them_as_data() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    let file = path.to_str().unwrap();
    let (code, text, errors) = output(&["run", "--seeds", "6", "--clause", CLAUSE, "--json", file]);
    assert_eq!(code, Some(0), "{text}\n{errors}");
    assert_eq!(text.lines().last(), Some("6 seeds, 1 clauses, 6 runs: 0 failed"));
    assert!(text.contains("environment: "), "{text}");
    let json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    for (key, expected) in
        [("seeds", 6), ("clauses", 1), ("runs", 6), ("failed", 0), ("ignored", 0)]
    {
        assert_eq!(json[key], expected, "{key}");
    }
    assert!(json["faults_fired"].is_object() && json["environment"].is_string());
}

#[test]
fn shards_are_merged_into_one_report_of_every_kind() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let shards = ["1/2", "2/2"].map(|shard| {
        let path = file(&shard.replace('/', "-of-"));
        let arguments =
            ["run", "--seeds", "5", "--clause", "exec.*", "--shard", shard, "--json", &path];
        let (code, text, errors) = output(&arguments);
        assert_eq!(code, Some(0), "{text}\n{errors}");
        assert!(text.contains(&format!("shard {shard} of the runs under 5 seeds")), "{text}");
        path
    });
    let (json, page, junit) = (file("all.json"), file("all.html"), file("all.xml"));
    let [one, two] = &shards;
    let outputs = ["--json", &json, "--report", &page, "--junit", &junit];
    let (code, text, errors) = output(&[&["merge", one, two][..], &outputs].concat());
    assert_eq!(code, Some(0), "{text}\n{errors}");
    let (_, whole, _) = output(&["run", "--seeds", "5", "--clause", "exec.*"]);
    assert_eq!(text.lines().last(), whole.lines().last());
    let read = |path: &str| std::fs::read_to_string(path).unwrap();
    let merged: Value = serde_json::from_str(&read(&json)).unwrap();
    assert_eq!(merged["shard"], serde_json::json!({ "index": 1, "of": 1 }));
    assert!(read(&page).contains("Contract report") && read(&junit).contains("<testsuites"));
    // What was merged can be merged again, and a part of it is not the whole.
    assert_eq!(output(&["merge", &json]).0, Some(0));
    for refused in [&["merge", one][..], &["merge", one, one, two], &["merge", one, two, &json]] {
        let (code, _, errors) = output(refused);
        assert_eq!(code, Some(2), "{errors}");
        assert!(!errors.is_empty());
    }
}

#[test]
fn dst_seed_is_the_seed_that_runs() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    let mut command = vmdst(&["run", "--clause", CLAUSE, "--json", path.to_str().unwrap()]);
    let (code, text, _) = texts(&command.env("DST_SEED", "0x2a").output().unwrap());
    assert_eq!(code, Some(0), "{text}");
    let json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!((&json["first_seed"], &json["seeds"]), (&Value::from(42), &Value::from(1)));
}

#[test]
fn the_same_seeds_have_the_same_fingerprints() {
    let (code, text, _) = output(&["run", "--seeds", "4", "--clause", "exec.*", "--twice"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("4 seeds run twice: 0 differing fingerprints"), "{text}");
}

#[test]
fn a_replay_shows_the_run() {
    let arguments = ["replay", "--seed", "0x2a", "--clause", CLAUSE];
    let (code, text, _) = output(&arguments);
    assert_eq!(code, Some(0), "{text}");
    for part in ["seed 0x2a", "exec", "running", "fingerprint: ", "outcome: kept"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert_eq!(output(&arguments).1, text);
    assert_ne!(output(&["replay", "--seed", "0x2b", "--clause", CLAUSE]).1, text);
}

#[test]
fn every_environment_of_this_build_runs() {
    for environment in vm_dst::environment::Environment::ALL {
        let (code, text, errors) =
            output(&["run", "--seeds", "2", "--clause", CLAUSE, "--env", environment.name()]);
        if environment.available().is_ok() {
            assert_eq!(code, Some(0), "{environment}: {text}\n{errors}");
            assert!(text.contains(environment.describe()), "{text}");
        } else {
            assert_eq!(code, Some(2), "{environment}: {text}\n{errors}");
        }
    }
}

#[test]
fn a_soak_says_how_often_it_went_well() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("soak.json");
    for (what, measured) in
        [("restore", "restore to first exec"), ("fork", "first exec of a child")]
    {
        let (code, text, errors) = output(&[
            "soak",
            "--what",
            what,
            "--rounds",
            "3",
            "--vcpus",
            "2",
            "--json",
            path.to_str().unwrap(),
        ]);
        assert_eq!(code, Some(0), "{text}\n{errors}");
        assert_eq!(text.lines().last(), Some("3 of 3 rounds went well"));
        let json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!((&json["well"], &json["vcpus"]), (&Value::from(3), &Value::from(2)));
        let spreads = json["measured"].as_array().unwrap();
        assert!(spreads.iter().any(|it| it["what"] == measured && it["count"] == 3), "{json}");
    }
}

#[test]
fn bad_usage_is_told_from_failure() {
    let bad: [&[&str]; 25] = [
        &["soak", "--rounds", "0"],
        &["soak", "--what", "fork", "--rounds", "1025"],
        &["soak", "--vcpus", "256"],
        &["soak", "--backend", "process"],
        &[],
        &["walk"],
        &["run", "--seeds", "0"],
        &["run", "--seeds", "many"],
        &["run", "--seed", "0xg"],
        &["run", "--seed", "1", "--seeds", "2"],
        &["run", "--first-seed", "0xffffffffffffffff", "--seeds", "2"],
        &["run", "--clause", "no_such_clause"],
        &["run", "--clause", ""],
        &["run", "--jobs", "0"],
        &["run", "--histories", "5", "--each"],
        &["diff", "--right", "process", "--jobs", "4097"],
        &["run", "--env", "docker"],
        &["run", "--backend", "process", "--twice"],
        &["replay", "--seed", "1", "--clause", "no.such_clause"],
        &["replay", "--clause", CLAUSE],
        &["run", "--shard", "0/4"],
        &["run", "--shard", "5/4"],
        &["run", "--shard", "half"],
        &["merge"],
        &["merge", "/there/is/none.json"],
    ];
    for arguments in bad {
        let (code, text, errors) = output(arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {text}{errors}");
        assert!(!errors.is_empty(), "{arguments:?}");
    }
    for (name, value) in [("DST_SEED", "x"), ("DST_SEEDS", "0"), ("DST_ENV", "docker")] {
        let mut command = vmdst(&["run", "--clause", CLAUSE]);
        let (code, _, errors) = texts(&command.env(name, value).output().unwrap());
        assert_eq!(code, Some(2), "{errors}");
        assert!(errors.contains(name), "{errors}");
    }
}

#[test]
fn clauses_are_listed_and_the_doctor_speaks() {
    let (code, text, _) = output(&["clauses", "--markdown"]);
    assert_eq!(code, Some(0));
    assert_eq!(text, vm_dst::contract_doc::markdown());
    let (code, text, _) = output(&["clauses"]);
    assert_eq!(code, Some(0));
    assert!(text.contains(CLAUSE));
    let (code, text, _) = output(&["doctor"]);
    assert_eq!(code, Some(0), "{text}");
    for part in ["madsim", "turmoil", "sim: runs here", "process", "guest_panic"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_reports_what_ran() {
    use std::{thread, time::Duration};
    let mut command = vmdst(&["run", "--seeds", "0xffffffff", "--clause", CLAUSE]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let pid = child.id().to_string();
    let interrupt = thread::spawn(move || {
        thread::sleep(Duration::from_secs(2));
        Command::new("sh").args(["-c", &format!("kill -INT {pid}")]).status().unwrap()
    });
    let (code, text, _) = texts(&child.wait_with_output().unwrap());
    assert!(interrupt.join().unwrap().success());
    assert_eq!(code, Some(130), "{text}");
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[lines.len() - 2].starts_with("interrupted after "), "{text}");
    assert!(lines[lines.len() - 1].contains(" runs: 0 failed"), "{text}");
}
