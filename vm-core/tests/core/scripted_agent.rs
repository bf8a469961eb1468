//! An agent that says what it should, and what the host makes of it.

use crate::{
    frames::welcome,
    hostile_agent::on_paused_time,
    machine::{Act, Ill, Ports},
};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use vm_guest_protocol::{
    Channel, EntryKind, Frame, GuestError, GuestErrorKind, ListedDir, MAX_DATA, ProcessEntry,
    ProcessExit, Reply, Started,
};
use vm_trait::{
    CreateDirOptions, EventStream, ExecFailure, ExecRequest, ExecStatus, GuestFileError, ProcessId,
    RemoveOptions, VmConfig, VmErrorKind, VmEvent, VmInstance, WriteOptions,
};

pub(crate) const SECOND: Duration = Duration::from_secs(1);

pub(crate) fn started() -> Frame {
    Frame::Started(Started { process: 9, pid: 77, stdout: 0, stderr: 0, tty: false, stdin: 0 })
}

fn failed(path: &str) -> Frame {
    let path = path.to_owned();
    Frame::Failed(GuestError { kind: GuestErrorKind::Other, errno: 5, path })
}

/// Gives a machine that runs, whose agent shakes hands and then plays a script on each connection.
async fn running(scripts: Vec<Vec<Act>>) -> Arc<dyn VmInstance> {
    running_with(scripts, Ports::Silent, VmConfig::default()).await
}

/// The same for another configuration, and other ends of connections to other ports.
async fn running_with(
    scripts: Vec<Vec<Act>>,
    ports: Ports,
    config: VmConfig,
) -> Arc<dyn VmInstance> {
    let vm = Ill::playing(scripts, ports).running(config).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    vm
}

/// Gives a configuration in which requests have a second.
pub(crate) fn impatient() -> VmConfig {
    let mut config = VmConfig::default();
    config.timeouts.request = SECOND;
    config
}

/// Takes what was told up to now.
pub(crate) fn told(events: &mut EventStream) -> Vec<VmEvent> {
    let mut told = Vec::new();
    while let Some(Some(event)) = events.next().now_or_never() {
        told.push(event);
    }
    told
}

/// Gives a script that answers each request with some frames on its stream.
pub(crate) fn answers(answers: Vec<Vec<Frame>>) -> Vec<Act> {
    let mut script = vec![Act::Frame(0, welcome(false))];
    for (stream, frames) in (1_u32..).zip(answers) {
        // What was sent before has arrived by then.
        script.extend([Act::Wait(Duration::from_millis(1)), Act::Listen]);
        script.extend(frames.into_iter().map(|frame| Act::Frame(stream, frame)));
    }
    script
}

#[test]
fn a_machine_runs_once_hands_are_shaken() {
    on_paused_time(async {
        let begun = tokio::time::Instant::now();
        let script = vec![Act::Wait(SECOND * 2), Act::Frame(0, welcome(false))];
        let _vm = running(vec![script]).await;
        assert!(begun.elapsed() >= SECOND * 2);
    });
}

#[test]
fn a_program_is_what_the_agent_says_it_is() {
    let bytes = |offset| Frame::Data { channel: Channel::Stdout, offset, bytes: "out".into() };
    let exit = ProcessExit { code: Some(3), signal: None, timed_out: false, elapsed_ns: 1 };
    let eof = |channel, offset| Frame::Eof { channel, offset };
    let rest = vec![
        bytes(0),
        bytes(3),
        eof(Channel::Stdout, 6),
        eof(Channel::Stderr, 0),
        Frame::Exited(exit),
    ];
    on_paused_time(async {
        let mut script = answers(vec![vec![started()]]);
        script.push(Act::Wait(SECOND));
        script.extend(rest.into_iter().map(|frame| Act::Frame(1, frame)));
        let vm = running(vec![script]).await;
        let process = vm.spawn(ExecRequest::new("x")).await.unwrap();
        assert_eq!((process.id(), process.pid()), (ProcessId(9), 77));
        let mut output = Vec::new();
        while let Some(bytes) = process.read_stdout().await.unwrap() {
            output.extend_from_slice(&bytes);
        }
        assert_eq!(output, b"outout");
        assert_eq!(process.read_stderr().await.unwrap(), None);
        assert_eq!(process.offsets().stdout, 6);
        assert_eq!(process.wait().await.unwrap(), ExecStatus::Exited(3));
    });
}

#[test]
fn metrics_count_what_runs_and_what_went_over_the_link() {
    let entry = |process, exit| ProcessEntry { process, pid: 1, program: "x".to_owned(), exit };
    let exit = ProcessExit { code: Some(0), signal: None, timed_out: false, elapsed_ns: 1 };
    let all = vec![entry(1, None), entry(2, Some(exit)), entry(3, None)];
    on_paused_time(async {
        let answer = vec![Frame::Done(Reply::Processes(all))];
        let vm = running(vec![answers(vec![answer.clone(), answer])]).await;
        tokio::time::sleep(SECOND).await;
        assert_eq!(vm.processes().await.unwrap().len(), 3);
        let metrics = vm.metrics().await.unwrap();
        assert_eq!(metrics.processes, Some(2));
        assert!(metrics.boot.is_some());
        assert!(metrics.uptime.is_some_and(|uptime| uptime >= SECOND));
        assert_eq!(metrics.paused, Some(Duration::ZERO));
        assert!(metrics.agent_bytes_sent > Some(0));
        assert!(metrics.agent_bytes_received > Some(0));
        assert_eq!(metrics.agent_reconnects, Some(0));
    });
}

#[test]
fn the_time_that_a_machine_stands_still_is_counted() {
    on_paused_time(async {
        let answer = vec![Frame::Done(Reply::Processes(Vec::new()))];
        let vm = running(vec![answers(vec![answer])]).await;
        vm.pause().await.unwrap();
        tokio::time::sleep(SECOND * 3).await;
        vm.resume().await.unwrap();
        tokio::time::sleep(SECOND * 2).await;
        let paused = vm.metrics().await.unwrap().paused.unwrap();
        assert!((SECOND * 3..SECOND * 4).contains(&paused), "{paused:?}");
    });
}

#[test]
fn every_reader_hears_of_what_happens_and_one_that_left_is_not_waited_for() {
    on_paused_time(async {
        let vm = running(vec![vec![Act::Frame(0, welcome(false))]]).await;
        let (mut first, gone, mut second) = (vm.events(), vm.events(), vm.events());
        drop(gone);
        vm.pause().await.unwrap();
        let mut third = vm.events();
        vm.resume().await.unwrap();
        tokio::time::sleep(SECOND).await;
        let (first, second, third) = (told(&mut first), told(&mut second), told(&mut third));
        assert_eq!(first, second);
        assert!(second.len() > third.len() && !third.is_empty(), "{second:?} {third:?}");
    });
}

#[test]
fn a_listener_knows_its_port() {
    on_paused_time(async {
        let script = vec![Act::Frame(0, welcome(false))];
        let vm = running_with(vec![script], Ports::Stuck, VmConfig::default()).await;
        assert_eq!(vm.listen(4242).await.unwrap().port(), 4242);
    });
}

#[test]
fn a_long_listing_arrives_whole() {
    let name = "x".repeat(3 << 19);
    let entries = vec![(name.clone(), EntryKind::File)];
    let bytes = ListedDir { entries }.to_bytes();
    let mut script = answers(vec![vec![started()]]);
    let mut offset = 0;
    for chunk in bytes.chunks(MAX_DATA) {
        let bytes = Bytes::copy_from_slice(chunk);
        let data = Frame::Data { channel: Channel::Stdout, offset, bytes };
        offset += chunk.len() as u64;
        // Meanwhile the host makes room for the next.
        script.extend([Act::Frame(1, data), Act::Wait(Duration::from_millis(1))]);
    }
    let end = [Frame::Eof { channel: Channel::Stdout, offset }, Frame::Done(Reply::Empty)];
    script.extend(end.map(|frame| Act::Frame(1, frame)));
    on_paused_time(async {
        let vm = running(vec![script]).await;
        let listed = vm.list_dir("/").await.unwrap();
        assert!(matches!(&listed[..], [entry] if entry.name == name), "{} entries", listed.len());
    });
}

#[test]
fn an_agent_that_forgets_a_time_limit_does_not_keep_the_host() {
    const DAYS: Duration = Duration::from_secs(10 * 24 * 3600);
    on_paused_time(async {
        for limit in [SECOND, DAYS] {
            let mut config = impatient();
            // It says nothing all that time, and is not taken for dead.
            config.timeouts.link = DAYS * 10;
            let scripts = vec![answers(vec![vec![started()]])];
            let vm = running_with(scripts, Ports::Silent, config).await;
            let process = vm.spawn(ExecRequest::new("x").timeout(limit)).await.unwrap();
            let begun = tokio::time::Instant::now();
            let error = process.wait().await.unwrap_err();
            assert!(matches!(error.kind(), VmErrorKind::Timeout { .. }), "{error}");
            let waited = begun.elapsed();
            assert!((limit + SECOND..limit + SECOND * 2).contains(&waited), "{waited:?}");
        }
    });
}

#[test]
fn time_that_a_machine_stands_still_does_not_count_against_a_request() {
    let late = [Act::Wait(SECOND * 3), Act::Frame(1, Frame::Done(Reply::Empty))];
    let script = [answers(vec![vec![]]), late.into()].concat();
    on_paused_time(async {
        let vm = running_with(vec![script], Ports::Silent, impatient()).await;
        let asking = vm.clone();
        let ping = tokio::spawn(async move { asking.ping().await });
        tokio::time::sleep(Duration::from_millis(10)).await;
        vm.pause().await.unwrap();
        tokio::time::sleep(SECOND * 5).await;
        vm.resume().await.unwrap();
        ping.await.unwrap().unwrap();
    });
}

#[test]
fn errors_without_a_path_are_of_programs_and_others_of_files() {
    on_paused_time(async {
        let vm = running(vec![answers(vec![vec![failed("")], vec![failed("/a")]])]).await;
        let error = vm.exec(ExecRequest::new("x")).await.unwrap_err();
        let wanted = ExecFailure::Other { errno: 5 };
        assert!(
            matches!(error.kind(), VmErrorKind::ExecFailed { failure } if *failure == wanted),
            "{error}"
        );
        let error = vm.read_file("/a").await.unwrap_err();
        let wanted = GuestFileError::Io { errno: 5 };
        assert!(
            matches!(error.kind(), VmErrorKind::GuestFile { error, .. } if *error == wanted),
            "{error}"
        );
    });
}

#[test]
fn errors_of_different_kinds_are_told_apart() {
    use GuestErrorKind as K;
    let kinds = [
        K::NotFound,
        K::PermissionDenied,
        K::AlreadyExists,
        K::NotADirectory,
        K::IsADirectory,
        K::DirectoryNotEmpty,
        K::OutOfSpace,
        K::ReadOnly,
        K::InvalidPath,
        K::ProgramNotFound,
        K::ProgramNotExecutable,
        K::BadWorkingDirectory,
        K::UnknownUser,
        K::UserNotPermitted,
        K::NoSuchProcess,
        K::OutOfResources,
        K::InvalidArgument,
        K::Unsupported,
        K::Other,
    ];
    let answer = |kind| vec![Frame::Failed(GuestError { kind, errno: 5, path: "/a".to_owned() })];
    on_paused_time(async move {
        let vm = running(vec![answers(kinds.map(answer).into())]).await;
        let mut seen = BTreeSet::new();
        for kind in kinds {
            // The agent listens anew by then.
            tokio::time::sleep(Duration::from_millis(10)).await;
            let error = vm.read_file("/a").await.unwrap_err();
            assert!(seen.insert(format!("{:?}", error.kind())), "{kind:?} is told as {error}");
        }
    });
}

#[test]
fn what_the_agent_refuses_fails() {
    on_paused_time(async {
        let refused = vec![failed("/a")];
        let vm = running(vec![answers(vec![refused; 9])]).await;
        let mut outcomes = Vec::new();
        for operation in 0..9 {
            // The agent listens anew by then.
            tokio::time::sleep(Duration::from_millis(10)).await;
            outcomes.push(match operation {
                0 => vm.ping().await.map(drop),
                1 => vm.processes().await.map(drop),
                2 => vm.read_file("/a").await.map(drop),
                3 => vm.write_file("/a", "x".into(), WriteOptions::default()).await,
                4 => vm.stat("/a").await.map(drop),
                5 => vm.list_dir("/a").await.map(drop),
                6 => vm.create_dir("/a", CreateDirOptions::default()).await,
                7 => vm.remove("/a", RemoveOptions::default()).await,
                _ => vm.rename("/a", "/b").await,
            });
        }
        for (operation, outcome) in outcomes.into_iter().enumerate() {
            let error = outcome.expect_err(&format!("operation {operation}"));
            let wanted = GuestFileError::Io { errno: 5 };
            assert!(
                matches!(error.kind(), VmErrorKind::GuestFile { error, .. } if *error == wanted),
                "operation {operation}: {error}"
            );
        }
    });
}

#[test]
fn a_lost_link_is_told_counted_and_made_anew() {
    on_paused_time(async {
        let first = vec![Act::Frame(0, welcome(false)), Act::Wait(SECOND), Act::HangUp];
        let vm = running(vec![first, vec![Act::Frame(0, welcome(true))]]).await;
        let mut events = vm.events();
        tokio::time::sleep(SECOND * 3).await;
        assert_eq!(told(&mut events), [VmEvent::AgentLost, VmEvent::AgentBack]);
    });
}

#[test]
fn the_input_of_a_program_whose_agent_was_lost_cannot_be_closed() {
    on_paused_time(async {
        let mut first = answers(vec![vec![started()]]);
        first.extend([Act::Wait(SECOND), Act::HangUp]);
        let vm = running(vec![first, vec![Act::Frame(0, welcome(false))]]).await;
        let process = vm.spawn(ExecRequest::new("x").open_stdin()).await.unwrap();
        tokio::time::sleep(SECOND * 3).await;
        let error = process.close_stdin().await.unwrap_err();
        assert!(matches!(error.kind(), VmErrorKind::Disconnected), "{error}");
        let error = process.wait().await.unwrap_err();
        assert!(matches!(error.kind(), VmErrorKind::Disconnected), "{error}");
    });
}
