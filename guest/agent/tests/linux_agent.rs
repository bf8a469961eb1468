//! The agent's binary as an ordinary process, driven frame by frame.
#![cfg(target_os = "linux")]
#![forbid(unsafe_code)]

use bytes::{Bytes, BytesMut};
use std::{
    collections::BTreeMap,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};
use vm_guest_agent::linux::{launch, proc_table, stream_tool::Transport};
use vm_guest_protocol::{
    Channel, DEFAULT_WINDOW, Decoder, EntryKind, ExecSpec, Frame, GuestError, Hello, MAX_DATA,
    PROTOCOL_VERSION, ProcessExit, Reply, Request, StreamId, TermSize, encode,
};

const PATIENCE: Duration = Duration::from_secs(20);

fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < end, "waited too long for {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// An agent of a test's own, in a directory of its own.
struct Agent {
    child: Child,
    base: tempfile::TempDir,
}

impl Agent {
    fn start() -> Self {
        let base = tempfile::tempdir().unwrap();
        // So that an agent that is nobody can remove its own directory.
        std::fs::set_permissions(base.path(), std::fs::Permissions::from_mode(0o1777)).unwrap();
        let own = base.path().join("own");
        let mut command = Command::new(env!("CARGO_BIN_EXE_vm-guest-agent"));
        command
            .args(["--die-with-parent", "--listen-unix"])
            .arg(own.join("socket"))
            .arg("--own-dir")
            .arg(&own)
            .stdin(Stdio::piped());
        if rustix::process::geteuid().is_root() {
            command.args(["--user", "65534:65534"]);
        }
        let agent = Self { child: command.spawn().unwrap(), base };
        until("the socket", || UnixStream::connect(agent.socket()).ok());
        agent
    }

    fn own(&self) -> PathBuf {
        self.base.path().join("own")
    }

    fn socket(&self) -> PathBuf {
        self.own().join("socket")
    }

    fn scratch(&self, name: &str) -> String {
        self.own().join(launch::SCRATCH).join(name).to_str().unwrap().to_owned()
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    fn descendants(&self) -> Vec<proc_table::ProcessRow> {
        let below = proc_table::descendants(&proc_table::processes(), self.pid());
        below.into_iter().filter(|row| !row.ended).collect()
    }

    fn hang_up(&mut self) -> ExitStatus {
        drop(self.child.stdin.take());
        until("the agent's end", || self.child.try_wait().unwrap())
    }

    fn dial(&self, session: u128) -> Client {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut client = Client { stream, decoder: Decoder::default(), next: 1 };
        client.send(
            0,
            &Frame::Hello(Hello {
                version: PROTOCOL_VERSION,
                session,
                resume: false,
                live: vec![],
            }),
        );
        let (_, welcome) = client.receive();
        assert!(matches!(welcome, Frame::Welcome(_)), "{welcome:?}");
        client
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

struct Client {
    stream: UnixStream,
    decoder: Decoder,
    next: StreamId,
}

#[derive(Debug)]
struct Ran {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit: ProcessExit,
}

impl Client {
    fn send(&mut self, stream: StreamId, frame: &Frame) {
        let mut bytes = BytesMut::new();
        encode(stream, frame, &mut bytes);
        self.stream.write_all(&bytes).unwrap();
    }

    fn try_receive(&mut self) -> Option<(StreamId, Frame)> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            let mut buffer = [0; 70_000];
            match self.stream.read(&mut buffer).unwrap() {
                0 => return None,
                read => self.decoder.feed(&buffer[..read]),
            }
        }
    }

    fn receive(&mut self) -> (StreamId, Frame) {
        self.try_receive().expect("the agent closed the connection")
    }

    fn open(&mut self, request: Request) -> StreamId {
        let stream = self.next;
        self.next += 1;
        self.send(stream, &Frame::Open(request));
        stream
    }

    /// Receives the next frame that belongs to `stream`.
    fn receive_on(&mut self, stream: StreamId) -> Frame {
        loop {
            let (id, frame) = self.receive();
            if id == stream {
                return frame;
            }
        }
    }

    /// Receives on until the request has ended.
    fn end_of(&mut self, stream: StreamId) -> Frame {
        loop {
            let frame = self.receive_on(stream);
            if matches!(frame, Frame::Done(_) | Frame::Failed(_)) {
                return frame;
            }
        }
    }

    fn call(&mut self, request: Request) -> Frame {
        let stream = self.open(request);
        self.end_of(stream)
    }

    fn write_file(&mut self, path: &str, bytes: &[u8]) -> Frame {
        let stream = self.open(Request::WriteFile { path: path.to_owned(), mode: None });
        assert!(bytes.len() <= DEFAULT_WINDOW as usize);
        for (n, piece) in bytes.chunks(MAX_DATA).enumerate() {
            let (offset, bytes) = ((n * MAX_DATA) as u64, Bytes::copy_from_slice(piece));
            self.send(stream, &Frame::Data { channel: Channel::Stdin, offset, bytes });
        }
        let offset = bytes.len() as u64;
        self.send(stream, &Frame::Eof { channel: Channel::Stdin, offset });
        self.end_of(stream)
    }

    /// Runs a program to its end, sending `stdin` as far as it is taken, and consuming all output at once.
    fn run(&mut self, spec: ExecSpec, stdin: &[u8]) -> Result<Ran, GuestError> {
        let takes_input = spec.stdin;
        let stream = self.open(Request::Exec(spec));
        let (mut sent, mut allowed) = (0_usize, DEFAULT_WINDOW as usize);
        let mut eof_sent = !takes_input;
        let mut outputs: BTreeMap<Channel, Vec<u8>> = BTreeMap::new();
        loop {
            while takes_input && sent < stdin.len().min(allowed) {
                let to = stdin.len().min(allowed).min(sent + MAX_DATA);
                let bytes = Bytes::copy_from_slice(&stdin[sent..to]);
                let offset = sent as u64;
                self.send(stream, &Frame::Data { channel: Channel::Stdin, offset, bytes });
                sent = to;
            }
            if !eof_sent && sent == stdin.len() {
                self.send(stream, &Frame::Eof { channel: Channel::Stdin, offset: sent as u64 });
                eof_sent = true;
            }
            match self.receive_on(stream) {
                Frame::Data { channel, offset, bytes } => {
                    let output = outputs.entry(channel).or_default();
                    assert_eq!(offset, output.len() as u64);
                    output.extend_from_slice(&bytes);
                    let consumed = output.len() as u64;
                    let window = DEFAULT_WINDOW;
                    self.send(stream, &Frame::Credit { channel, consumed, window });
                }
                Frame::Credit { consumed, window, .. } => {
                    allowed = usize::try_from(consumed).unwrap() + window as usize;
                }
                Frame::Exited(exit) => {
                    self.send(stream, &Frame::Close);
                    let mut take = |channel| outputs.remove(&channel).unwrap_or_default();
                    let (stdout, stderr) = (take(Channel::Stdout), take(Channel::Stderr));
                    return Ok(Ran { stdout, stderr, exit });
                }
                Frame::Failed(error) => return Err(error),
                _ => {}
            }
        }
    }
}

fn sh(script: &str) -> ExecSpec {
    ExecSpec {
        program: "/bin/sh".to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        env: vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
        ..ExecSpec::default()
    }
}

#[test]
fn programs_run_as_the_agents_user_with_what_was_asked_and_nothing_more() {
    let agent = Agent::start();
    let mut client = agent.dial(1);
    let spec = ExecSpec {
        program: "env".to_owned(),
        args: vec![],
        env: vec![
            ("PATH".to_owned(), "/usr/bin:/bin".to_owned()),
            ("A".to_owned(), "b c".to_owned()),
        ],
        ..ExecSpec::default()
    };
    let ran = client.run(spec, b"").unwrap();
    assert_eq!(String::from_utf8(ran.stdout).unwrap(), "PATH=/usr/bin:/bin\nA=b c\n");
    let mut spec = sh("id -u; id -G; pwd; ls /proc/self/fd | wc -l; printf err >&2; exit 7");
    spec.cwd = Some(agent.scratch("").trim_end_matches('/').to_owned());
    let ran = client.run(spec.clone(), b"").unwrap();
    let id = if rustix::process::geteuid().is_root() {
        "65534".to_owned()
    } else {
        rustix::process::geteuid().as_raw().to_string()
    };
    let text = String::from_utf8(ran.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines[0], lines[2]), (id.as_str(), spec.cwd.as_deref().unwrap()), "{text}");
    if rustix::process::geteuid().is_root() {
        assert_eq!(lines[1], "65534", "no supplementary groups");
    }
    // Three standard ones, and the one that ls lists the directory with.
    assert_eq!(lines[3].trim(), "4");
    assert_eq!((ran.stderr.as_slice(), ran.exit.code), (&b"err"[..], Some(7)));
    assert!(client.run(ExecSpec { program: "nothing-here".to_owned(), ..spec }, b"").is_err());
}

#[test]
fn megabytes_go_in_and_out_at_once() {
    let agent = Agent::start();
    let bytes: Vec<u8> =
        (0..8_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]).collect();
    let ran = agent.dial(1).run(ExecSpec { stdin: true, ..sh("exec cat") }, &bytes).unwrap();
    assert!(ran.stdout == bytes, "{} bytes came back", ran.stdout.len());
    assert_eq!(ran.exit.code, Some(0));
}

#[test]
fn timeouts_reach_grandchildren() {
    let agent = Agent::start();
    let mut spec = sh("sleep 1000 & sleep 1000 & wait");
    spec.timeout_ns = Some(300_000_000);
    let ran = agent.dial(1).run(spec, b"").unwrap();
    assert!(ran.exit.timed_out, "{ran:?}");
    assert!((300_000_000..5_000_000_000).contains(&ran.exit.elapsed_ns), "{ran:?}");
    until("all to be gone", || agent.descendants().is_empty().then_some(()));
}

#[test]
fn a_terminal_has_its_size() {
    let agent = Agent::start();
    let mut spec = sh(
        "test -t 0 && test -t 1 && test -t 2 && stty size && tty >/dev/null && : </dev/tty && echo ok",
    );
    spec.tty = Some(TermSize { rows: 21, cols: 43 });
    let ran = agent.dial(1).run(spec, b"").unwrap();
    assert_eq!(String::from_utf8(ran.stdout).unwrap(), "21 43\r\nok\r\n");
}

#[test]
fn signals_reach_processes() {
    let agent = Agent::start();
    let mut client = agent.dial(1);
    let stream = client.open(Request::Exec(sh(
        "trap 'echo caught; exit 9' USR1; echo ready; while :; do sleep 0.01; done",
    )));
    let (mut output, mut process) = (Vec::new(), 0);
    let exit = loop {
        match client.receive_on(stream) {
            Frame::Started(started) => process = started.process,
            Frame::Data { channel: Channel::Stdout, bytes, .. } => {
                output.extend_from_slice(&bytes);
                if output == b"ready\n" {
                    client.open(Request::Signal { process, signal: 10 });
                }
            }
            Frame::Exited(exit) => break exit,
            _ => {}
        }
    };
    assert_eq!((output.as_slice(), exit.code), (&b"ready\ncaught\n"[..], Some(9)));
}

#[test]
fn files_are_replaced_whole() {
    let agent = Agent::start();
    let mut client = agent.dial(1);
    let path = agent.scratch("file");
    for size in [0, 1, 4095, 4096, 4097, 200_000] {
        let bytes: Vec<u8> = (0..size).map(|n: usize| n.to_le_bytes()[0]).collect();
        assert_eq!(client.write_file(&path, &bytes), Frame::Done(Reply::Empty));
        assert!(std::fs::read(&path).unwrap() == bytes);
    }
    let Frame::Done(Reply::Stat(stat)) = client.call(Request::Stat { path: path.clone() }) else {
        panic!("no stat");
    };
    assert_eq!((stat.kind, stat.size), (EntryKind::File, 200_000));
    // A connection that is lost half-way leaves the old content and nothing beside it.
    let mut other = agent.dial(2);
    let stream = other.open(Request::WriteFile { path: path.clone(), mode: None });
    let bytes = Bytes::from_static(b"half");
    other.send(stream, &Frame::Data { channel: Channel::Stdin, offset: 0, bytes });
    drop(other);
    let mut third = agent.dial(3);
    assert!(matches!(third.call(Request::Ping), Frame::Done(Reply::Pong { .. })));
    assert_eq!(std::fs::read(&path).unwrap().len(), 200_000);
    let dir = Path::new(&path).parent().unwrap();
    until("the temporary file to go", || {
        (std::fs::read_dir(dir).unwrap().count() == 1).then_some(())
    });
}

#[test]
fn what_is_no_frame_ends_the_connection_and_not_the_agent() {
    let agent = Agent::start();
    for bytes in [&[0xff; 64][..], b"GET / HTTP/1.1\r\n\r\n", &[0, 0, 0, 0, 0, 0, 0, 0, 99]] {
        let mut stream = UnixStream::connect(agent.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        let mut rest = Vec::new();
        // Unread bytes of ours make it a reset in place of an end.
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty());
    }
    let idle: Vec<_> = (0..64).map(|_| UnixStream::connect(agent.socket())).collect();
    assert_eq!(agent.dial(1).run(sh("exit 4"), b"").unwrap().exit.code, Some(4));
    drop(idle);
}

#[test]
fn an_idle_agent_uses_no_cpu() {
    let agent = Agent::start();
    let mut client = agent.dial(1);
    // One with its output closed, one whose input nobody reads, one host that is slow to read.
    client.open(Request::Exec(sh("exec >&- 2>&-; exec sleep 1000")));
    let silent = client.open(Request::Exec(ExecSpec { stdin: true, ..sh("exec sleep 1000") }));
    let bytes = Bytes::from(vec![0; MAX_DATA]);
    client.send(silent, &Frame::Data { channel: Channel::Stdin, offset: 0, bytes: bytes.clone() });
    let offset = MAX_DATA as u64;
    client.send(silent, &Frame::Data { channel: Channel::Stdin, offset, bytes });
    client.open(Request::Exec(sh("exec cat /dev/zero")));
    thread::sleep(Duration::from_millis(500));
    let ticks = || proc_table::process(agent.pid()).unwrap().cpu_ticks;
    let before = ticks();
    thread::sleep(Duration::from_secs(1));
    let used = ticks() - before;
    assert!(used <= 5, "{used} ticks in a second");
}

#[test]
fn orphans_are_reaped() {
    let agent = Agent::start();
    let mut client = agent.dial(1);
    let ran = client
        .run(sh("for n in 1 2 3 4 5 6 7 8; do (setsid sleep 0.1 >/dev/null 2>&1 &) ; done"), b"")
        .unwrap();
    assert_eq!(ran.exit.code, Some(0));
    until("the orphans to be gone", || {
        let rows = proc_table::processes();
        proc_table::descendants(&rows, agent.pid()).is_empty().then_some(())
    });
}

#[test]
fn a_hung_up_owner_ends_all_that_was_started() {
    let mut agent = Agent::start();
    let mut client = agent.dial(1);
    let script = "mkdir -m 0 locked; trap '' TERM HUP; (setsid sleep 1000 &) ; (setsid setsid sleep 1000 &) ; echo; sleep 1000";
    let mut spec = sh(script);
    spec.cwd = Some(agent.scratch("").trim_end_matches('/').to_owned());
    let stream = client.open(Request::Exec(spec));
    while !matches!(client.receive_on(stream), Frame::Data { .. }) {}
    until("the daemons", || (agent.descendants().len() >= 4).then_some(()));
    let all = agent.descendants();
    let status = agent.hang_up();
    assert_eq!(status.code(), Some(i32::from(launch::EXIT_OWNER_GONE)));
    for row in all {
        let now = proc_table::process(row.pid).filter(|now| now.started == row.started);
        assert_eq!(now, None);
    }
    assert!(!agent.own().exists());
}

#[test]
fn a_shutdown_ends_the_agent_well() {
    let mut agent = Agent::start();
    let mut client = agent.dial(1);
    let stream = client.open(Request::Exec(sh("trap '' TERM; echo; while :; do sleep 1; done")));
    while !matches!(client.receive_on(stream), Frame::Data { .. }) {}
    let request = Request::Shutdown { signal: 15, grace_ns: 200_000_000 };
    assert_eq!(client.call(request), Frame::Done(Reply::Empty));
    let status = until("the agent's end", || agent.child.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    assert!(!agent.own().exists());
}

#[test]
fn a_bad_command_line_is_explained() {
    for arguments in [
        &[][..],
        &["--listen-unix"],
        &["--listen-unix", "/x", "--user", "root"],
        &["--listen-unix", "/x", "--mark", "x"],
        &["--what"],
        &["stray", "--listen-unix", "/x"],
    ] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_vm-guest-agent")).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(i32::from(launch::EXIT_USAGE)), "{arguments:?}");
        assert!(String::from_utf8(output.stderr).unwrap().contains(launch::USAGE));
    }
    let output = Command::new(env!("CARGO_BIN_EXE_vm-guest-agent"))
        .args(["--listen-unix", "/no/such/directory/socket"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(i32::from(launch::EXIT_SETUP)));
    assert!(!output.stderr.is_empty());
}

#[test]
fn the_binary_called_by_the_name_of_a_tool_is_that_tool() {
    let dir = tempfile::tempdir().unwrap();
    // Whatever the machine has, nothing listens there.
    for (transport, port) in [(Transport::Vsock, "4294967290"), (Transport::Tcp, "0")] {
        let tool = dir.path().join(transport.tool());
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_vm-guest-agent"), &tool).unwrap();
        let failed = format!("{}: port {port}: ", transport.tool());
        for (arguments, code, said) in [
            (&[][..], 2, transport.usage()),
            (&["connect", "port"], 2, transport.usage()),
            (&["listen", "--echo"], 2, transport.usage()),
            (&["connect", port], 1, &failed),
        ] {
            let output = Command::new(&tool).args(arguments).output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{arguments:?}");
            assert!(String::from_utf8(output.stderr).unwrap().contains(said));
            assert!(output.stdout.is_empty());
        }
    }
}
