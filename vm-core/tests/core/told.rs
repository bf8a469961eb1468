//! What the core tells its observer, and its users, of its work.

use crate::{
    frames::welcome,
    hostile_agent::on_paused_time,
    machine::{Act, Ill, Ports},
    scripted_agent::{SECOND, answers},
};
use futures_util::FutureExt;
use std::{collections::BTreeSet, sync::Arc};
use vm_guest_protocol::{Frame, Reply};
use vm_trait::{SnapshotOptions, VmBackend, VmConfig, VmErrorKind, VmInstance};

async fn running(script: Vec<Act>, ports: Ports) -> (Arc<Ill>, Arc<dyn VmInstance>) {
    let ill = Ill::playing(vec![script], ports);
    let vm = ill.running(VmConfig::default()).await;
    tokio::time::sleep(SECOND).await;
    (ill, vm)
}

/// Gives the lines in which each of these words stands.
fn with(ill: &Ill, words: &[&str]) -> Vec<String> {
    let has = |line: &String| words.iter().all(|word| line.contains(word));
    ill.told().into_iter().filter(has).collect()
}

#[test]
fn every_call_is_told_with_a_number_of_its_own_and_how_it_ended() {
    on_paused_time(async {
        let (ill, vm) =
            running(answers(vec![vec![Frame::Done(Reply::Empty)]]), Ports::Silent).await;
        vm.ping().await.unwrap();
        assert!(vm.ping().now_or_never().is_none());
        let told = with(&ill, &["ping #"]);
        let [begun, ended, begun_anew, dropped] = &told[..] else { panic!("{told:?}") };
        assert_eq!(ended, &format!("{begun}: ok"));
        assert_eq!(dropped, &format!("{begun_anew}: dropped"));
        assert_ne!(begun, begun_anew);
    });
}

#[test]
fn states_and_links_are_told() {
    on_paused_time(async {
        let (ill, vm) = running(vec![Act::Frame(0, welcome(false))], Ports::Silent).await;
        vm.kill().await.unwrap();
        tokio::time::sleep(SECOND).await;
        for words in [["created -> ", "starting"], ["link up", "new"], ["link down", ""]] {
            assert_eq!(with(&ill, &words).len(), 1, "{words:?} in {:?}", ill.told());
        }
    });
}

#[test]
fn it_is_told_whether_a_session_goes_on() {
    on_paused_time(async {
        for (resumed, word) in [(true, "resumed"), (false, "new")] {
            let first = vec![Act::Frame(0, welcome(false)), Act::Wait(SECOND / 2), Act::HangUp];
            let scripts = vec![first, vec![Act::Frame(0, welcome(resumed))]];
            let ill = Ill::playing(scripts, Ports::Silent);
            let _vm = ill.running(VmConfig::default()).await;
            tokio::time::sleep(SECOND * 3).await;
            let told = with(&ill, &["link up"]);
            let [first, second] = &told[..] else { panic!("{told:?}") };
            assert!(first.contains("session new"), "{first}");
            assert!(second.contains(&format!("session {word}")), "{second}");
        }
    });
}

#[test]
fn the_lives_of_a_machine_have_numbers_of_their_own() {
    on_paused_time(async {
        let (ill, vm) = running(vec![Act::Frame(0, welcome(false))], Ports::Silent).await;
        vm.kill().await.unwrap();
        vm.start().await.unwrap();
        let made = with(&ill, &["made life "]);
        let [first, second] = &made[..] else { panic!("{made:?}") };
        assert_ne!(first, second);
    });
}

#[test]
fn how_long_a_machine_stood_still_for_a_snapshot_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("1.snapshot");
    on_paused_time(async {
        let (ill, vm) = running(vec![Act::Frame(0, welcome(false))], Ports::Silent).await;
        vm.snapshot(SnapshotOptions::default().with_path(file)).await.unwrap();
        assert_eq!(with(&ill, &["paused for a snapshot"]), ["paused for a snapshot took 7ms"]);
    });
}

#[test]
fn streams_of_the_user_s_are_told_with_a_number_of_their_own() {
    on_paused_time(async {
        let (ill, vm) = running(vec![Act::Frame(0, welcome(false))], Ports::Stuck).await;
        let first = vm.connect(5_000).await.unwrap();
        let second = vm.connect(5_001).await.unwrap();
        drop((first, second));
        let connected = with(&ill, &["stream ", "Connected"]);
        assert_eq!(connected.len(), 2, "{:?}", ill.told());
        assert_eq!(connected.iter().collect::<BTreeSet<_>>().len(), 2, "{connected:?}");
        let dropped = with(&ill, &["stream ", "Dropped"]);
        let renamed: Vec<_> =
            connected.iter().map(|line| line.replace("Connected", "Dropped")).collect();
        assert_eq!(dropped, renamed);
        let number = |line: &String| line.split(' ').nth(1).map(str::to_owned);
        assert_ne!(number(&connected[0]), number(&connected[1]));
    });
}

#[test]
fn all_who_wait_for_a_stream_hear_of_the_end_of_the_machine() {
    on_paused_time(async {
        let (_ill, vm) = running(vec![Act::Frame(0, welcome(false))], Ports::Silent).await;
        // Each in a task of its own, as one task would be woken for all.
        let connect = |port| {
            let vm = vm.clone();
            tokio::spawn(async move { vm.connect(port).await })
        };
        let waiting = [5_000, 5_001, 5_002].map(connect);
        tokio::time::sleep(SECOND).await;
        let begun = tokio::time::Instant::now();
        vm.kill().await.unwrap();
        for outcome in futures_util::future::join_all(waiting).await {
            assert_eq!(outcome.unwrap().unwrap_err().kind(), &VmErrorKind::Interrupted);
        }
        assert!(begun.elapsed() < SECOND, "{:?}", begun.elapsed());
    });
}

#[test]
fn machines_are_counted_until_they_are_gone() {
    on_paused_time(async {
        let scripts = vec![vec![Act::Frame(0, welcome(false))]];
        let ill = Ill::playing(scripts, Ports::Silent);
        let backend = ill.backend();
        assert_eq!(backend.live(), 0);
        let vms = [0, 1].map(|_| backend.create(VmConfig::default()));
        let vms = futures_util::future::join_all(vms).await;
        assert_eq!(backend.live(), 2);
        vms[0].as_ref().unwrap().start().await.unwrap();
        drop(vms);
        tokio::time::sleep(SECOND).await;
        assert_eq!(backend.live(), 0);
    });
}

#[test]
fn a_machine_is_shown_with_its_name() {
    on_paused_time(async {
        let (_ill, vm) = running(vec![Act::Frame(0, welcome(false))], Ports::Stuck).await;
        assert!(format!("{vm:?}").contains(&vm.id().to_string()), "{vm:?}");
        let listener = vm.listen(4_242).await.unwrap();
        assert!(format!("{listener:?}").contains("4242"), "{listener:?}");
    });
}
