//! The session with an agent: how it begins, what keeps it, and when it is given up.

use crate::{
    frames::welcome,
    hostile_agent::on_paused_time,
    machine::{Act, Ill, Ports},
    scripted_agent::{SECOND, answers, impatient, started, told},
};
use futures_util::FutureExt;
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::time::Instant;
use vm_guest_protocol::{
    Channel, Frame, Hello, PROTOCOL_VERSION, ProcessExit, Refusal, Reply, Request, Welcome,
};
use vm_trait::{
    ExecRequest, Signal, StopOptions, VmBackend, VmConfig, VmErrorKind, VmEvent, VmInstance,
};

type Vm = Arc<dyn VmInstance>;

/// Gives a machine whose agent plays a script on each connection, after the machine was started.
async fn running(scripts: Vec<Vec<Act>>, config: VmConfig) -> (Arc<Ill>, Vm) {
    let ill = Ill::playing(scripts, Ports::Silent);
    let vm = ill.running(config).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    (ill, vm)
}

/// Gives a configuration with this much patience for a lost agent.
fn link_lost_after(link: Duration) -> VmConfig {
    let mut config = VmConfig::default();
    config.timeouts.link = link;
    config
}

fn hellos(ill: &Ill) -> Vec<Hello> {
    let hello = |(_, frame)| match frame {
        Frame::Hello(hello) => Some(hello),
        _ => None,
    };
    ill.sent().into_iter().filter_map(hello).collect()
}

fn exited() -> Frame {
    Frame::Exited(ProcessExit { code: Some(0), signal: None, timed_out: false, elapsed_ns: 1 })
}

fn whole(session: u128) -> bool {
    session >> 64 != 0 && session & u128::from(u64::MAX) != 0
}

#[test]
fn a_session_that_is_given_up_is_followed_by_one_of_another_name() {
    on_paused_time(async {
        let mut first = answers(vec![vec![started()]]);
        first.extend([Act::Wait(SECOND), Act::HangUp]);
        let silent = Vec::new();
        let last = vec![
            Act::Frame(0, welcome(false)),
            Act::Wait(SECOND),
            Act::Frame(2, Frame::Done(Reply::Empty)),
        ];
        let scripts = vec![first, silent.clone(), silent, last];
        let (ill, vm) = running(scripts, link_lost_after(SECOND * 10)).await;
        let process = vm.spawn(ExecRequest::new("x")).await.unwrap();
        tokio::time::sleep(SECOND * 8).await;
        assert!(process.wait().now_or_never().is_none(), "the agent may still come back");
        let error = process.wait().await.unwrap_err();
        assert_eq!(error.kind(), &VmErrorKind::Disconnected);
        vm.ping().await.expect("what is asked for in between waits for the next session");
        let hellos = hellos(&ill);
        let [first, second, third, fourth] = &hellos[..] else { panic!("{hellos:?}") };
        assert!(!first.resume && second.resume && third.resume && !fourth.resume, "{hellos:?}");
        assert!(first.session == second.session && first.session == third.session);
        assert_ne!(first.session, fourth.session);
        assert!(whole(first.session) && whole(fourth.session), "{hellos:?}");
    });
}

#[test]
fn an_agent_of_another_version_is_told_as_such_at_once() {
    on_paused_time(async {
        let refused = Frame::Refused(Refusal::Version { agent: 4711 });
        let scripts = vec![vec![Act::Frame(0, refused)]];
        let ill = Ill::playing(scripts, Ports::Silent);
        let vm = ill.backend().create(VmConfig::default()).await.unwrap();
        let begun = Instant::now();
        let error = vm.start().await.unwrap_err();
        assert!(error.to_string().contains("4711"), "{error}");
        assert!(begun.elapsed() < SECOND, "{:?}", begun.elapsed());
        assert_eq!(ill.dials.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn a_welcome_of_another_version_is_none() {
    on_paused_time(async {
        let other = Welcome { version: PROTOCOL_VERSION + 1, resumed: false, uptime_ns: 1 };
        let odd = vec![Act::Frame(0, Frame::Welcome(other))];
        let right = vec![Act::Frame(0, welcome(false))];
        let (ill, _vm) = running(vec![odd, right], VmConfig::default()).await;
        assert_eq!(ill.dials.load(Ordering::Relaxed), 2);
    });
}

#[test]
fn an_agent_that_does_not_answer_is_dialled_again_in_half_the_time_that_a_link_has() {
    on_paused_time(async {
        let begun = Instant::now();
        let scripts = vec![Vec::new(), vec![Act::Frame(0, welcome(false))]];
        let _running = running(scripts, link_lost_after(SECOND * 10)).await;
        assert!((SECOND * 5..SECOND * 7).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    });
}

#[test]
fn an_agent_that_is_heard_of_is_not_asked_whether_it_lives() {
    on_paused_time(async {
        let mut script = answers(vec![vec![started()]]);
        for offset in 0..60 {
            let bytes = "x".into();
            let data = Frame::Data { channel: Channel::Stdout, offset, bytes };
            script.extend([Act::Wait(SECOND), Act::Frame(1, data)]);
        }
        let (ill, vm) = running(vec![script], link_lost_after(SECOND * 10)).await;
        let _process = vm.spawn(ExecRequest::new("x")).await.unwrap();
        tokio::time::sleep(SECOND * 60).await;
        assert_eq!(ill.dials.load(Ordering::Relaxed), 1);
        assert!(!ill.opened().contains(&Request::Ping), "{:?}", ill.opened());
    });
}

#[test]
fn an_agent_that_stands_still_is_not_taken_for_dead() {
    on_paused_time(async {
        let script = answers(vec![vec![started()]]);
        let (ill, vm) = running(vec![script], link_lost_after(SECOND * 10)).await;
        let _process = vm.spawn(ExecRequest::new("x")).await.unwrap();
        vm.pause().await.unwrap();
        tokio::time::sleep(SECOND * 60).await;
        assert_eq!(ill.dials.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn a_request_that_is_not_answered_ends_though_the_machine_was_paused() {
    on_paused_time(async {
        let (_ill, vm) = running(vec![vec![Act::Frame(0, welcome(false))]], impatient()).await;
        let asking = vm.clone();
        let ping = tokio::spawn(async move { asking.ping().await });
        tokio::time::sleep(SECOND / 2).await;
        vm.pause().await.unwrap();
        tokio::time::sleep(SECOND * 5).await;
        vm.resume().await.unwrap();
        let resumed = Instant::now();
        let error = ping.await.unwrap().unwrap_err();
        assert!(matches!(error.kind(), VmErrorKind::Timeout { .. }), "{error}");
        assert!(resumed.elapsed() <= SECOND, "{:?}", resumed.elapsed());
    });
}

#[test]
fn frames_of_streams_that_nobody_opened_end_the_connection() {
    on_paused_time(async {
        for stream in [0, 77] {
            let odd = Act::Frame(stream, Frame::Done(Reply::Empty));
            let first = vec![Act::Frame(0, welcome(false)), Act::Wait(SECOND), odd];
            let scripts = vec![first, vec![Act::Frame(0, welcome(false))]];
            let (ill, _vm) = running(scripts, VmConfig::default()).await;
            tokio::time::sleep(SECOND * 2).await;
            assert_eq!(ill.dials.load(Ordering::Relaxed), 2, "stream {stream}");
        }
    });
}

#[test]
fn what_has_ended_is_not_taken_up_again_on_the_next_connection() {
    on_paused_time(async {
        let mut first = answers(vec![vec![started(), exited()]]);
        first.extend([Act::Wait(SECOND), Act::HangUp]);
        let scripts = vec![first, vec![Act::Frame(0, welcome(true))]];
        let (ill, vm) = running(scripts, VmConfig::default()).await;
        let process = vm.spawn(ExecRequest::new("x")).await.unwrap();
        assert!(process.wait().await.unwrap().success());
        tokio::time::sleep(SECOND * 3).await;
        let sent = ill.sent();
        let anew = sent.iter().rposition(|(_, frame)| matches!(frame, Frame::Hello(_))).unwrap();
        assert_eq!(hellos(&ill).len(), 2);
        assert_eq!(sent[anew + 1..], []);
    });
}

#[test]
fn the_end_of_a_machine_is_not_told_as_a_lost_agent() {
    on_paused_time(async {
        let (_ill, vm) = running(vec![vec![Act::Frame(0, welcome(false))]], impatient()).await;
        let mut events = vm.events();
        vm.kill().await.unwrap();
        tokio::time::sleep(SECOND).await;
        let told = told(&mut events);
        assert!(!told.is_empty() && !told.contains(&VmEvent::AgentLost), "{told:?}");
    });
}

#[test]
fn programs_may_start_late_where_requests_have_time() {
    on_paused_time(async {
        for (request, lazy) in [(SECOND / 2, false), (SECOND, true)] {
            let mut config = VmConfig::default();
            config.timeouts.request = request;
            let script = answers(vec![vec![started(), exited()]]);
            let (ill, vm) = running(vec![script], config).await;
            let _ = vm.exec(ExecRequest::new("x")).now_or_never();
            tokio::time::sleep(Duration::from_millis(100)).await;
            let asked = ill.opened();
            assert!(
                matches!(&asked[..], [Request::Exec(spec)] if spec.lazy_start == lazy),
                "{request:?}: {asked:?}"
            );
        }
    });
}

#[test]
fn a_process_that_has_ended_takes_signals_and_one_that_is_unknown_does_not() {
    on_paused_time(async {
        let unknown = || {
            Frame::Failed(vm_guest_protocol::GuestError::new(
                vm_guest_protocol::GuestErrorKind::NoSuchProcess,
            ))
        };
        for ended in [true, false] {
            let first = if ended { vec![started(), exited()] } else { vec![started()] };
            let script = answers(vec![first, vec![unknown()]]);
            let (_ill, vm) = running(vec![script], VmConfig::default()).await;
            let process = vm.spawn(ExecRequest::new("x")).await.unwrap();
            tokio::time::sleep(SECOND).await;
            assert_eq!(process.signal(Signal::TERM).await.is_ok(), ended);
        }
    });
}

#[test]
fn output_ends_and_input_closes_while_the_program_runs_on() {
    on_paused_time(async {
        let eof = Frame::Eof { channel: Channel::Stdout, offset: 0 };
        let script = answers(vec![vec![started(), eof]]);
        let (_ill, vm) = running(vec![script], VmConfig::default()).await;
        let process = vm.spawn(ExecRequest::new("x").open_stdin()).await.unwrap();
        let read = tokio::time::timeout(SECOND, process.read_stdout());
        assert_eq!(read.await.expect("the output has ended").unwrap(), None);
        process.close_stdin().await.unwrap();
        let error = process.write_stdin("x").await.unwrap_err();
        assert!(
            matches!(error.kind(), VmErrorKind::InvalidConfig { field, .. } if field == "stdin"),
            "{error}"
        );
    });
}

#[test]
fn a_stop_asks_the_guest_for_less_than_its_grace_and_without_grace_for_nothing() {
    on_paused_time(async {
        for grace in [SECOND * 10, Duration::ZERO] {
            let script = vec![Act::Frame(0, welcome(false))];
            let (ill, vm) = running(vec![script], VmConfig::default()).await;
            vm.stop(StopOptions { grace, ..StopOptions::default() }).await.unwrap();
            let shutdown = |request| match request {
                Request::Shutdown { grace_ns, .. } => Some(Duration::from_nanos(grace_ns)),
                _ => None,
            };
            let asked: Vec<_> = ill.opened().into_iter().filter_map(shutdown).collect();
            match asked[..] {
                [asked] => assert!(!asked.is_zero() && asked < grace, "{asked:?} of {grace:?}"),
                [] => assert!(grace.is_zero(), "the guest was not asked"),
                _ => panic!("{asked:?}"),
            }
        }
    });
}
