//! The host's loopback ports by themselves, and what only a simulated host leads: from one guest into another.

use crate::{SimBackend, SimTcpStream};
use bytes::Bytes;
use proptest::prelude::*;
use std::{future::Future, io::ErrorKind, sync::Arc, time::Duration};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vm_trait::{
    Capability, ExecRequest, ExecStatus, ForkOptions, GuestProcess, NetworkConfig, OutputOffsets,
    VmBackend, VmConfig, VmErrorKind, VmInstance,
};

fn in_tokio<F: Future>(run: F) -> F::Output {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true).build().unwrap().block_on(run)
}

fn sim() -> SimBackend {
    SimBackend::builder().seed(3).build().unwrap()
}

async fn started(sim: &SimBackend, network: NetworkConfig) -> Arc<dyn VmInstance> {
    let config = VmConfig::builder().with_network(network).build().unwrap();
    let vm = sim.create(config).await.unwrap();
    vm.start().await.unwrap();
    vm
}

async fn tcp(vm: &Arc<dyn VmInstance>, words: &[&str]) -> GuestProcess {
    let words = words.iter().map(|word| (*word).to_owned());
    vm.spawn(ExecRequest::new("tcp").args(words).open_stdin()).await.unwrap()
}

async fn echo(vm: &Arc<dyn VmInstance>, port: &str) -> GuestProcess {
    let echo = tcp(vm, &["listen", "--echo", port]).await;
    assert_eq!(echo.read_stderr().await.unwrap().unwrap(), "listening\n");
    echo
}

/// Waits for a tool's end, and gives how it ended and what it wrote.
async fn finished(process: &GuestProcess) -> (ExecStatus, Vec<u8>) {
    let mut out = Vec::new();
    while let Some(bytes) = process.read_stdout().await.unwrap() {
        out.extend_from_slice(&bytes);
    }
    (process.wait().await.unwrap(), out)
}

async fn rest(mut stream: SimTcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.unwrap();
    all
}

#[test]
fn programs_of_the_host_reach_each_other_and_leave_nothing() {
    in_tokio(async {
        let sim = sim();
        let host = sim.host();
        assert_eq!(host.connect(80).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        let mut listener = host.listen(80).await.unwrap();
        assert_eq!(host.listen(80).await.unwrap_err().kind(), ErrorKind::AddrInUse);
        assert_ne!(host.listen(0).await.unwrap().port(), 0);
        let mut near = host.connect(80).await.unwrap();
        let mut far = listener.accept().await.unwrap();
        near.write_all(b"there").await.unwrap();
        near.shutdown().await.unwrap();
        far.write_all(b"back").await.unwrap();
        let mut came = [0; 5];
        far.read_exact(&mut came).await.unwrap();
        assert_eq!(&came, b"there");
        drop(far);
        assert_eq!(rest(near).await, b"back");
        // One that nobody took ends with the listener.
        let waiting = host.connect(80).await.unwrap();
        drop(listener);
        assert_eq!(rest(waiting).await, b"");
        assert_eq!(host.connect(80).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert!(sim.ledger().is_clear(), "{}", sim.ledger());
    });
}

#[test]
fn a_lost_host_has_no_listeners_and_no_ports_of_machines() {
    in_tokio(async {
        let sim = sim();
        let host = sim.host();
        let mut listener = host.listen(80).await.unwrap();
        let vm = started(&sim, NetworkConfig::tsi().with_port(81, 2_000)).await;
        host.crash();
        assert_eq!(listener.accept().await.unwrap_err().kind(), ErrorKind::ConnectionAborted);
        let again = [host.listen(80).await.unwrap(), host.listen(81).await.unwrap()];
        drop(listener);
        assert_eq!(host.listen(80).await.unwrap_err().kind(), ErrorKind::AddrInUse);
        drop((again, vm));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(sim.ledger().is_clear(), "{}", sim.ledger());
    });
}

#[test]
fn a_port_that_leads_nowhere_is_refused_by_tsi_and_ended_by_passt() {
    in_tokio(async {
        let sim = sim();
        let _tsi = started(&sim, NetworkConfig::tsi().with_port(80, 2_000)).await;
        let _passt = started(&sim, NetworkConfig::passt().with_port(81, 2_000)).await;
        let host = sim.host();
        assert_eq!(host.connect(80).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(rest(host.connect(81).await.unwrap()).await, b"");
    });
}

#[test]
fn faults_of_the_network_are_refused_where_there_is_none() {
    in_tokio(async {
        let bare = SimBackend::builder().without(Capability::NetworkTsi);
        let plan =
            crate::FaultPlan::none().with_probability(vm_core::fault::FaultKind::NetSlow, 0.1);
        assert!(bare.clone().faults(plan.clone()).build().is_ok());
        let bare = bare.without(Capability::NetworkPasst);
        assert!(bare.clone().faults(plan).build().is_err());
        let config = VmConfig::builder().with_network(NetworkConfig::tsi()).build().unwrap();
        let refused = bare.build().unwrap().create(config).await.unwrap_err();
        assert!(matches!(refused.kind(), VmErrorKind::Unsupported { .. }), "{refused}");
    });
}

#[test]
fn a_connection_within_a_guest_goes_on_in_its_child() {
    in_tokio(async {
        let sim = sim();
        let vm = started(&sim, NetworkConfig::None).await;
        let _echo = echo(&vm, "2000").await;
        let within = tcp(&vm, &["connect", "2000"]).await;
        within.write_stdin("before").await.unwrap();
        assert_eq!(within.read_stdout().await.unwrap().unwrap(), "before");
        let child = vm.fork(ForkOptions::new(1)).await.unwrap().remove(0).unwrap();
        let offsets = OutputOffsets::default();
        let copied = child.attach_process(within.id(), offsets).await.unwrap();
        for (process, word) in [(&within, "source"), (&copied, "child")] {
            process.write_stdin(word).await.unwrap();
            process.close_stdin().await.unwrap();
            let (status, out) = finished(process).await;
            assert_eq!(status, ExecStatus::Exited(0));
            assert!(out.ends_with(word.as_bytes()), "{}", String::from_utf8_lossy(&out));
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Through the sockets of one guest, its host, a mapped port and an echo in another guest, and back.
    #[test]
    fn a_guest_reaches_another_through_its_port(bytes in prop::collection::vec(any::<u8>(), 0..200_000)) {
        in_tokio(async {
            let sim = sim();
            let server = started(&sim, NetworkConfig::passt().with_port(80, 2_000)).await;
            let client = started(&sim, NetworkConfig::tsi()).await;
            let _echo = echo(&server, "2000").await;
            let tool = tcp(&client, &["connect", "80"]).await;
            tool.write_stdin(Bytes::from(bytes.clone())).await.unwrap();
            tool.close_stdin().await.unwrap();
            let (status, out) = finished(&tool).await;
            prop_assert_eq!(status, ExecStatus::Exited(0));
            prop_assert!(out == bytes, "{} bytes of {}", out.len(), bytes.len());
            let other = tcp(&client, &["connect", "127.0.0.1", "81"]).await;
            prop_assert_eq!(finished(&other).await.0, ExecStatus::Exited(1));
            drop((server, client, tool, other, _echo));
            tokio::time::sleep(Duration::from_secs(1)).await;
            prop_assert!(sim.ledger().is_clear(), "{}", sim.ledger());
            Ok(())
        })?;
    }
}
