//! Networks of machines with TSI, and without any, seen from the host. They take a KVM that runs guests, and libkrunfw's kernel:
//! `TWINVM_KERNEL=$(lab/libkrunfw) lab/test vm-backend-libkrun launcher --ignored`

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use vm_backend_libkrun::KrunBackend;
use vm_trait::{
    ExecRequest, KernelConfig, NetworkConfig, RootConfig, StopOptions, VmBackend, VmConfig,
    VmErrorKind, VmInstance,
};

/// A guest boots in some seconds in the lab.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn run<F: Future<Output = ()>>(test: impl FnOnce() -> F) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(PATIENCE, test()).await.expect("it hangs") });
}

fn backend() -> impl VmBackend {
    let launcher = env!("CARGO_BIN_EXE_vm-krun-launcher");
    KrunBackend::builder().with_launcher(launcher).build().unwrap()
}

pub(crate) fn config(network: NetworkConfig) -> VmConfig {
    let root = std::env::var_os("TWINVM_ROOT").map(PathBuf::from).expect("TWINVM_ROOT is set");
    let mut config = VmConfig::default();
    config.network = network;
    config.root = RootConfig::directory(root);
    config
}

pub(crate) async fn started(backend: &dyn VmBackend, config: VmConfig) -> Arc<dyn VmInstance> {
    let vm = backend.create(config).await.unwrap();
    if let Err(error) = vm.start().await {
        panic!("{error}\n{}", String::from_utf8_lossy(&vm.console()));
    }
    vm
}

pub(crate) async fn sh(vm: &Arc<dyn VmInstance>, script: &str) -> String {
    let request = ExecRequest::new("/bin/sh").args(["-c", script]);
    let output = vm.exec(request.timeout(Duration::from_secs(30))).await.unwrap();
    format!("{}{}", output.stdout_text(), output.stderr_text())
}

/// A port that nobody has.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What a connection to the loopback address brings, if there is one.
pub(crate) fn fetched(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    stream.write_all(b"GET /word HTTP/1.0\r\n\r\n").ok()?;
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    (!text.is_empty()).then_some(text)
}

pub(crate) fn fetched_soon(port: u16) -> Option<String> {
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        if let Some(text) = fetched(port) {
            return Some(text);
        }
        thread::sleep(Duration::from_millis(100));
    }
    None
}

/// A server on the host's loopback address that says a word to everybody.
fn host_server(word: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().write_all(word.as_bytes());
        }
    });
    port
}

pub(crate) const SERVE: &str =
    "mkdir -p /srv && echo from the guest > /srv/word && httpd -p 80 -h /srv && echo served";

#[test]
#[ignore = "takes libkrunfw and a KVM that runs guests"]
fn a_guest_with_tsi_is_reached_and_reaches_its_host() {
    run(|| async {
        let (mapped, there) = (free_port(), host_server("from the host"));
        let vm = started(&backend(), config(NetworkConfig::tsi().with_port(mapped, 80))).await;
        assert_eq!(fetched(mapped), None, "nobody listens in the guest yet");
        assert_eq!(sh(&vm, SERVE).await, "served\n");
        let text = tokio::task::spawn_blocking(move || fetched_soon(mapped)).await.unwrap();
        assert!(text.as_ref().is_some_and(|it| it.contains("from the guest")), "{text:?}");
        let heard = sh(&vm, &format!("nc 127.0.0.1 {there} </dev/null")).await;
        assert_eq!(heard, "from the host");
        // Other addresses of the host lead nowhere.
        assert!(TcpStream::connect(("127.0.0.2", mapped)).is_err());
        // The guest's ports are its own, mapped or not, and the others are nobody else's.
        let own = |port| format!("wget -q -O - http://127.0.0.1:{port}/word");
        assert_eq!(sh(&vm, &own(80)).await, "from the guest\n");
        let unmapped = free_port();
        let serve = format!("httpd -p {unmapped} -h /srv && {}", own(unmapped));
        assert_eq!(sh(&vm, &serve).await, "from the guest\n");
        assert_eq!(fetched(unmapped), None);
        // The agent's link is another kind of socket.
        assert!(vm.ping().await.is_ok());
        vm.pause().await.unwrap();
        vm.resume().await.unwrap();
        let text = tokio::task::spawn_blocking(move || fetched_soon(mapped)).await.unwrap();
        assert!(text.is_some_and(|it| it.contains("from the guest")));
        // Another machine cannot have the port, and this one can have it again.
        let other = backend().create(config(NetworkConfig::tsi().with_port(mapped, 81))).await;
        let other = other.unwrap().start().await.map_err(|error| error.kind().clone());
        assert_eq!(other, Err(VmErrorKind::PortInUse { port: u32::from(mapped) }));
        vm.stop(StopOptions::default()).await.unwrap();
        vm.start().await.unwrap();
        assert_eq!(sh(&vm, SERVE).await, "served\n");
        let text = tokio::task::spawn_blocking(move || fetched_soon(mapped)).await.unwrap();
        assert!(text.is_some_and(|it| it.contains("from the guest")));
        vm.kill().await.unwrap();
        assert_eq!(fetched(mapped), None);
    });
}

#[test]
#[ignore = "takes libkrunfw and a KVM that runs guests"]
fn a_guest_without_network_reaches_nothing_whatever_its_kernel_can() {
    run(|| async {
        let there = host_server("from the host");
        let mut config = config(NetworkConfig::None);
        // As a guest would that has its kernel do what nobody asked for.
        config.kernel = KernelConfig::default().with_cmdline("tsi_hijack");
        let vm = started(&backend(), config).await;
        let heard = sh(&vm, &format!("timeout 10 nc 127.0.0.1 {there} </dev/null; echo $?")).await;
        assert!(!heard.contains("from the host") && !heard.ends_with("\n0\n"), "{heard}");
        sh(&vm, "mkdir -p /srv && echo from the guest > /srv/word && httpd -p 8091 -h /srv").await;
        assert_eq!(fetched(8091), None);
        vm.kill().await.unwrap();
    });
}
