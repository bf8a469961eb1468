//! Virtual machines that are processes: nothing of them may be left, however they end.
//!
//! A program of its own in place of the usual test harness, because it is the agent too.
#![cfg(target_os = "linux")]
#![forbid(unsafe_code)]

use libtest_mimic::{Arguments, Failed, Trial};
use proptest::{prelude::*, test_runner::TestRunner};
use std::{
    env, fs,
    future::Future,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};
use vm_backend_process::{AgentProgram, ProcessHypervisor, SetupError, run_agent_if_asked};
use vm_core::{
    backend::{CoreBackend, CoreParts},
    env::TokioEnv,
    host_fs::StdFs,
    observe::NoObserver,
};
use vm_guest_agent::linux::proc_table::{self, ProcessRow};
use vm_trait::{
    CrashReason, ExecRequest, ExecStatus, Signal, StopOptions, Timeouts, TtySize, VmBackend,
    VmConfig, VmErrorKind, VmExit, VmId, VmInstance, VmInstanceExt, VmState,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Makes this program an owner that starts a VM in the directory named and then waits to be killed.
const OWNER_VARIABLE: &str = "TWINVM_TEST_OWNER";

fn main() -> ExitCode {
    run_agent_if_asked();
    if let Some(base) = env::var_os(OWNER_VARIABLE) {
        own_until_killed(Path::new(&base));
        return ExitCode::FAILURE;
    }
    let tests = [
        trial("programs_see_what_was_asked_and_no_more", programs_see_what_was_asked),
        trial("files_and_terminals_are_real", files_and_terminals_are_real),
        trial("a_kill_leaves_nothing", a_kill_leaves_nothing),
        trial("dropping_the_last_handle_leaves_nothing", dropping_leaves_nothing),
        trial("a_stop_leaves_nothing_and_a_start_begins_anew", a_stop_leaves_nothing),
        trial("a_killed_agent_is_a_crash_and_leaves_nothing", a_killed_agent_leaves_nothing),
        trial("a_wedged_agent_is_killed_with_all_it_started", a_wedged_agent_is_killed),
        trial("a_guest_that_keeps_forking_dies", a_guest_that_keeps_forking_dies),
        trial("many_machines_do_not_meet", many_machines_do_not_meet),
        trial("what_is_not_offered_is_refused", what_is_not_offered_is_refused),
        trial("timeouts_leave_no_grandchild", timeouts_leave_no_grandchild),
        trial("metrics_are_counted", metrics_are_counted),
        Trial::test("a_killed_owner_leaves_nothing", || done(a_killed_owner_leaves_nothing)),
        Trial::test("bad_directories_are_refused", || done(bad_directories_are_refused)),
        Trial::test("bytes_survive_both_ways", || done(bytes_survive_both_ways)),
    ];
    libtest_mimic::run(&Arguments::from_args(), tests.into()).exit_code()
}

/// A host for a test's machines, with a directory that is checked at the end.
struct Host {
    hypervisor: Arc<ProcessHypervisor>,
    backend: CoreBackend,
    base: PathBuf,
    // Dropped last.
    _dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = open_to_all(dir.path());
        let (hypervisor, backend) = backend_in(&base);
        Self { hypervisor, backend, base, _dir: dir }
    }

    async fn start(&self) -> Arc<dyn VmInstance> {
        let vm = self.backend.create(config()).await.unwrap();
        vm.start().await.unwrap();
        vm
    }

    fn scratch(&self, vm: &dyn VmInstance) -> String {
        self.hypervisor.scratch_dir(vm.id()).to_str().unwrap().to_owned()
    }

    fn agent(&self, vm: VmId) -> i32 {
        i32::try_from(self.hypervisor.agent_pid(vm).unwrap()).unwrap()
    }

    async fn is_empty(&self) {
        until("the directory to be empty", || {
            fs::read_dir(&self.base).unwrap().next().is_none().then_some(())
        })
        .await;
    }
}

fn config() -> VmConfig {
    let mut timeouts = Timeouts::default();
    timeouts.boot = PATIENCE;
    let path = env::var("PATH").unwrap_or_default();
    VmConfig::builder().with_timeouts(timeouts).with_env("PATH", path).build().unwrap()
}

fn backend_in(base: &Path) -> (Arc<ProcessHypervisor>, CoreBackend) {
    let hypervisor = ProcessHypervisor::with_base(AgentProgram::find().unwrap(), base).unwrap();
    let hypervisor = Arc::new(hypervisor);
    let mut seed = 0_u8;
    let random = move |bytes: &mut [u8]| {
        // Distinct is enough here.
        seed = seed.wrapping_add(1);
        bytes.fill(seed);
    };
    let backend = CoreBackend::new(CoreParts {
        hypervisor: hypervisor.clone(),
        env: Arc::new(TokioEnv::real(random)),
        fs: Arc::new(StdFs),
        snapshots: base.join("snapshots"),
        observer: Arc::new(NoObserver),
    });
    (hypervisor, backend)
}

fn open_to_all(dir: &Path) -> PathBuf {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o1777)).unwrap();
    dir.canonicalize().unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn trial<T>(name: &str, test: impl FnOnce(Host) -> T + Send + 'static) -> Trial
where
    T: Future<Output = ()>,
{
    Trial::test(name, || {
        done(|| {
            runtime().block_on(async {
                tokio::time::timeout(3 * PATIENCE, test(Host::new())).await.unwrap();
            });
        })
    })
}

#[expect(clippy::unnecessary_wraps, reason = "a panic is how these tests fail")]
fn done(test: impl FnOnce()) -> Result<(), Failed> {
    test();
    Ok(())
}

async fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < end, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

/// A number of seconds for `sleep` by which its process can be told from all others.
fn token() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{}", 1_000_000_000_u64 + u64::from(std::process::id()) * 1000 + u64::from(next))
}

/// Lists the live processes that have `token` as an argument.
fn with_argument(token: &str) -> Vec<ProcessRow> {
    let has = |row: &ProcessRow| {
        command_line(row).split(|byte| *byte == 0).any(|argument| argument == token.as_bytes())
    };
    proc_table::processes().into_iter().filter(|row| !row.ended && has(row)).collect()
}

/// Gives a program and its arguments, each with a zero byte behind it; nothing of one that is gone.
fn command_line(row: &ProcessRow) -> Vec<u8> {
    fs::read(format!("/proc/{}/cmdline", row.pid)).unwrap_or_default()
}

/// A script that leaves processes in every relation to the agent that there is, and says when.
fn scatter(token: &str) -> String {
    format!(
        "trap '' HUP TERM; sleep {token} & (sleep {token} &) ; (setsid sleep {token} &) ; \
         (setsid setsid sleep {token} >/dev/null 2>&1 </dev/null &) ; \
         mkdir -m 0 locked; echo; exec sleep {token}"
    )
}

const SCATTERED: usize = 5;

/// Waits until every program of [`scatter`] runs. Only the sleepers count: a `setsid` that has forked is there twice
/// for a moment, so counting whatever has the token can reach the number before the last program has begun.
async fn all_scattered(token: &str) {
    let sleeps = |row: &ProcessRow| command_line(row).starts_with(b"sleep\0");
    until("the guest's processes", || {
        let sleepers = with_argument(token).iter().filter(|row| sleeps(row)).count();
        (sleepers == SCATTERED).then_some(())
    })
    .await;
}

async fn scattered(host: &Host, vm: &dyn VmInstance) -> String {
    let token = token();
    let request = ExecRequest::new("/bin/sh").args(["-c", &scatter(&token)]);
    let process = vm.spawn(request.cwd(host.scratch(vm))).await.unwrap();
    process.detach().await.unwrap();
    all_scattered(&token).await;
    token
}

async fn programs_see_what_was_asked(host: Host) {
    let vm = host.start().await;
    let path = env::var("PATH").unwrap();
    let output = vm.exec(ExecRequest::new("env").env("B", "x y")).await.unwrap();
    assert_eq!(output.stdout_text(), format!("B=x y\nPATH={path}\n"));
    let script = "pwd; id -u; echo err >&2; ls /proc/$$/fd; kill -9 $$";
    let request = ExecRequest::new("sh").args(["-c", script]).cwd(host.scratch(&*vm));
    let output = vm.exec(request).await.unwrap();
    let user = rustix::process::geteuid();
    let user = if user.is_root() { 65_534 } else { user.as_raw() };
    let wanted = format!("{}\n{user}\n0\n1\n2\n", host.scratch(&*vm));
    assert_eq!((output.stdout_text(), output.stderr_text()), (wanted, "err\n".to_owned()));
    assert_eq!(output.status, ExecStatus::Signaled(Signal(9)));
    for code in [0, 1, 127, 255] {
        let output = vm.sh(&format!("exit {code}")).await.unwrap();
        assert_eq!(output.status, ExecStatus::Exited(code));
    }
}

async fn files_and_terminals_are_real(host: Host) {
    let vm = host.start().await;
    let path = format!("{}/file", host.scratch(&*vm));
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    vm.write(&path, bytes.clone()).await.unwrap();
    assert!(fs::read(&path).unwrap() == bytes);
    assert!(vm.read_file(&path).await.unwrap() == bytes);
    let names = vm.list_dir(&host.scratch(&*vm)).await.unwrap();
    assert_eq!(names.len(), 1, "no temporary file is left: {names:?}");
    let request = ExecRequest::new("stty").arg("size").tty(TtySize { rows: 31, cols: 77 });
    assert_eq!(vm.exec(request).await.unwrap().stdout_text(), "31 77\r\n");
}

async fn a_kill_leaves_nothing(host: Host) {
    let vm = host.start().await;
    let token = scattered(&host, &*vm).await;
    vm.kill().await.unwrap();
    assert_eq!(with_argument(&token), [], "right after the kill");
    assert_eq!(vm.state(), VmState::Stopped);
    host.is_empty().await;
}

async fn dropping_leaves_nothing(host: Host) {
    let vm = host.start().await;
    let token = scattered(&host, &*vm).await;
    drop(vm);
    until("the guest's end", || with_argument(&token).is_empty().then_some(())).await;
    host.is_empty().await;
}

async fn a_stop_leaves_nothing(host: Host) {
    let vm = host.start().await;
    for _ in 0..3 {
        let token = scattered(&host, &*vm).await;
        let grace = StopOptions::default().with_grace(Duration::from_millis(100));
        vm.stop(grace).await.unwrap();
        assert_eq!(with_argument(&token), []);
        assert_eq!(vm.state(), VmState::Stopped);
        host.is_empty().await;
        vm.start().await.unwrap();
        assert!(vm.list_dir(&host.scratch(&*vm)).await.unwrap().is_empty());
    }
    vm.kill().await.unwrap();
}

async fn a_killed_agent_leaves_nothing(host: Host) {
    let vm = host.start().await;
    let token = scattered(&host, &*vm).await;
    let agent = proc_table::process(host.agent(vm.id())).unwrap();
    agent.signal(9).unwrap();
    let exit = vm.wait().await;
    assert_eq!(exit, VmExit::Crashed(CrashReason::VmmDied));
    assert_eq!(vm.state(), VmState::Crashed(CrashReason::VmmDied));
    until("the guest's end", || with_argument(&token).is_empty().then_some(())).await;
    host.is_empty().await;
    vm.start().await.unwrap();
    assert!(vm.sh("exit").await.unwrap().status.success());
}

async fn a_wedged_agent_is_killed(host: Host) {
    let vm = host.start().await;
    let token = scattered(&host, &*vm).await;
    let agent = proc_table::process(host.agent(vm.id())).unwrap();
    // SIGSTOP.
    agent.signal(19).unwrap();
    vm.kill().await.unwrap();
    assert_eq!(with_argument(&token), []);
    assert_eq!(proc_table::process(agent.pid), None);
    host.is_empty().await;
}

async fn a_guest_that_keeps_forking_dies(host: Host) {
    let vm = host.start().await;
    let token = token();
    // Chains without end, in which each process starts the next one in a session of its own and ends.
    let script = "sleep 0.002; setsid sh -c \"$0\" \"$0\" \"$1\" >/dev/null 2>&1 </dev/null &";
    for _ in 0..8 {
        let output = vm.exec(ExecRequest::new("sh").args(["-c", script, script, &token])).await;
        assert!(output.unwrap().status.success());
    }
    let agent = host.agent(vm.id());
    let mut seen = std::collections::BTreeSet::new();
    until("many processes to have been", || {
        seen.extend(with_argument(&token).iter().map(|row| row.pid));
        (seen.len() > 50).then_some(())
    })
    .await;
    vm.kill().await.unwrap();
    assert_eq!(with_argument(&token), []);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(with_argument(&token), []);
    assert_eq!(proc_table::process(agent), None);
    host.is_empty().await;
}

async fn many_machines_do_not_meet(host: Host) {
    let mut machines = Vec::new();
    for _ in 0..12 {
        machines.push(host.start().await);
    }
    let all = machines.iter().enumerate().map(|(n, vm)| {
        let path = format!("{}/mine", host.scratch(&**vm));
        async move {
            vm.write(&path, n.to_string()).await.unwrap();
            let output = vm.run("cat", [path.as_str()]).await.unwrap();
            assert_eq!(output.stdout_text(), n.to_string());
        }
    });
    futures_util::future::join_all(all).await;
    let kept = machines.split_off(6);
    let gone: Vec<i32> = machines.iter().map(|vm| host.agent(vm.id())).collect();
    drop(machines);
    until("half of them to be gone", || {
        gone.iter().all(|pid| proc_table::process(*pid).is_none()).then_some(())
    })
    .await;
    for vm in &kept {
        vm.ping().await.unwrap();
    }
    futures_util::future::join_all(kept.iter().map(|vm| vm.kill())).await;
    host.is_empty().await;
}

async fn what_is_not_offered_is_refused(host: Host) {
    let vm = host.start().await;
    let refused = vm.pause().await.unwrap_err();
    assert!(matches!(refused.kind(), VmErrorKind::Unsupported { .. }), "{refused}");
    let request = ExecRequest::new("id").user(vm_trait::User::Ids { uid: 4242, gid: 4242 });
    let refused = vm.exec(request).await.unwrap_err();
    let kind = refused.kind();
    assert!(
        matches!(kind, VmErrorKind::Unsupported { .. } | VmErrorKind::ExecFailed { .. }),
        "{refused}"
    );
    assert_eq!(vm.state(), VmState::Running);
}

async fn timeouts_leave_no_grandchild(host: Host) {
    let vm = host.start().await;
    let token = token();
    let script = format!("sleep {token} & sleep {token} | sleep {token}");
    let request = ExecRequest::new("sh").args(["-c", &script]).timeout(Duration::from_millis(200));
    let output = vm.exec(request).await.unwrap();
    assert_eq!(output.status, ExecStatus::TimedOut);
    until("the grandchildren's end", || with_argument(&token).is_empty().then_some(())).await;
}

async fn metrics_are_counted(host: Host) {
    let vm = host.start().await;
    let before = vm.metrics().await.unwrap();
    assert!(before.memory_used_bytes.unwrap() > 100_000, "{before:?}");
    let burn = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done";
    assert!(vm.sh(burn).await.unwrap().status.success());
    let after = vm.metrics().await.unwrap();
    assert!(after.cpu_time.unwrap() > before.cpu_time.unwrap() + Duration::from_millis(20));
}

fn bytes_survive_both_ways() {
    let runtime = runtime();
    let host = runtime.block_on(async { Host::new() });
    let vm = runtime.block_on(host.start());
    let bytes = prop::collection::vec(any::<u8>(), 0..400_000);
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 16,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&bytes, |bytes| {
            let request = ExecRequest::new("cat").stdin(bytes.clone()).output_limit(1 << 20);
            let output = runtime.block_on(vm.exec(request)).unwrap();
            prop_assert!(output.stdout == bytes);
            Ok(())
        })
        .unwrap();
    runtime.block_on(vm.kill()).unwrap();
}

fn bad_directories_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |base: &Path| {
        let result = ProcessHypervisor::with_base(AgentProgram::ThisProgram, base);
        matches!(result, Err(SetupError::BaseDirectory { .. }))
    };
    assert!(refused(&dir.path().join("missing")));
    let long = dir.path().join("x".repeat(100));
    fs::create_dir(&long).unwrap();
    open_to_all(&long);
    assert!(refused(&long));
    let private = dir.path().join("private");
    fs::create_dir(&private).unwrap();
    fs::set_permissions(&private, fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(refused(&private), rustix::process::geteuid().is_root());
}

fn own_until_killed(base: &Path) {
    runtime().block_on(async {
        let (hypervisor, backend) = backend_in(base);
        let vm = backend.create(config()).await.unwrap();
        vm.start().await.unwrap();
        let token = token();
        let scratch = hypervisor.scratch_dir(vm.id());
        let request = ExecRequest::new("/bin/sh").args(["-c", &scatter(&token)]);
        let request = request.cwd(scratch.to_str().unwrap());
        let _process = vm.spawn(request).await.unwrap();
        all_scattered(&token).await;
        let agent = hypervisor.agent_pid(vm.id()).unwrap();
        let line = format!("{token} {agent}\n");
        std::io::Write::write_all(&mut std::io::stdout(), line.as_bytes()).unwrap();
        std::future::pending::<()>().await;
    });
}

fn a_killed_owner_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let base = open_to_all(dir.path());
    let mut owner = Command::new(env::current_exe().unwrap())
        .env(OWNER_VARIABLE, &base)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(owner.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let (token, agent) = line.trim().split_once(' ').expect(&line);
    let agent: i32 = agent.parse().unwrap();
    assert_eq!(with_argument(token).len(), SCATTERED);
    assert!(fs::read_dir(&base).unwrap().next().is_some());
    owner.kill().unwrap();
    owner.wait().unwrap();
    runtime().block_on(async {
        until("the guest's end", || with_argument(token).is_empty().then_some(())).await;
        until("the agent's end", || {
            proc_table::process(agent).is_none_or(|row| row.ended).then_some(())
        })
        .await;
        until("the directory to be empty", || {
            fs::read_dir(&base).unwrap().next().is_none().then_some(())
        })
        .await;
    });
}
