//! A machine that does not answer, or lies about its end.

use crate::{
    frames::welcome,
    hostile_agent::on_paused_time,
    machine::{Act, Behaviour, Ill, Ports},
};
use std::{io::ErrorKind, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, timeout},
};
use vm_trait::{VmConfig, VmErrorKind, VmInstance, VmState};

const REQUEST: Duration = Duration::from_secs(30);

async fn running(ports: Ports, mute: bool) -> Arc<dyn VmInstance> {
    let scripts = vec![vec![Act::Frame(0, welcome(false))]];
    Ill::new(Behaviour { scripts, ports, mute }).running(VmConfig::default()).await
}

#[test]
fn connect_and_listen_end_by_their_deadline() {
    on_paused_time(async {
        let vm = running(Ports::Silent, false).await;
        for port in [5_000, 5_001] {
            let begun = Instant::now();
            let (connected, listening) = tokio::join!(vm.connect(port), vm.listen(port));
            for error in [connected.err(), listening.err()] {
                let kind = error.expect("an error").kind().clone();
                assert_eq!(kind, VmErrorKind::Timeout { after: REQUEST });
            }
            assert_eq!(begun.elapsed(), REQUEST);
        }
    });
}

#[test]
fn their_deadline_stands_still_while_the_machine_is_paused() {
    on_paused_time(async {
        let vm = running(Ports::Silent, false).await;
        let begun = Instant::now();
        let pause = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            vm.pause().await.expect("pause");
            tokio::time::sleep(Duration::from_secs(100)).await;
            vm.resume().await.expect("resume");
        };
        let (connected, ()) = tokio::join!(vm.connect(5_000), pause);
        assert!(matches!(connected.unwrap_err().kind(), VmErrorKind::Timeout { .. }));
        assert_eq!(begun.elapsed(), REQUEST + Duration::from_secs(100));
    });
}

#[test]
fn a_stop_comes_before_what_is_not_answered() {
    on_paused_time(async {
        let vm = running(Ports::Silent, false).await;
        let kill = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            vm.kill().await.expect("kill");
        };
        let (connected, listening, ()) = tokio::join!(vm.connect(5_000), vm.listen(5_000), kill);
        assert_eq!(connected.unwrap_err().kind(), &VmErrorKind::Interrupted);
        assert_eq!(listening.unwrap_err().kind(), &VmErrorKind::Interrupted);
    });
}

#[test]
fn a_stream_that_does_not_move_ends_with_its_machine() {
    on_paused_time(async {
        let vm = running(Ports::Stuck, false).await;
        let stream = vm.connect(5_000).await.expect("connect");
        let mut listener = vm.listen(5_000).await.expect("listen");
        let (mut reader, mut writer) = tokio::io::split(stream);
        let mut byte = [0];
        let kill = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            vm.kill().await.expect("kill");
        };
        let much = vec![0; 100_000];
        let both = async {
            tokio::join!(reader.read(&mut byte), writer.write_all(&much), listener.accept(), kill)
        };
        let (read, written, accepted, ()) = timeout(REQUEST, both).await.expect("all of it ends");
        assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(written.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(accepted.unwrap_err().kind(), &VmErrorKind::Interrupted);
        assert_eq!(listener.accept().await.unwrap_err().kind(), &VmErrorKind::Interrupted);
        assert!(writer.shutdown().await.is_err() || writer.write(b"x").await.is_err());
    });
}

#[test]
fn a_machine_that_says_it_has_ended_and_goes_on_keeps_nobody_waiting() {
    on_paused_time(async {
        let vm = running(Ports::Ended, false).await;
        let mut listener = vm.listen(5_000).await.expect("listen");
        let waits = async { tokio::join!(vm.connect(5_000), listener.accept()) };
        let (connected, accepted) = timeout(REQUEST * 2, waits).await.expect("both end");
        assert!(matches!(connected.unwrap_err().kind(), VmErrorKind::Timeout { .. }));
        assert_eq!(accepted.unwrap_err().kind(), &VmErrorKind::Disconnected);
        vm.kill().await.expect("kill");
    });
}

#[test]
fn a_machine_that_answers_nothing_is_killed() {
    on_paused_time(async {
        let vm = running(Ports::Stuck, true).await;
        let error = timeout(REQUEST * 4, vm.pause()).await.expect("pause ends").unwrap_err();
        assert!(matches!(error.kind(), VmErrorKind::Timeout { .. }), "{error}");
        assert!(matches!(vm.state(), VmState::Crashed(_)), "{}", vm.state());
        timeout(REQUEST, vm.kill()).await.expect("kill ends").expect("kill");
    });
}
