//! Programs in the guest, as requests to the agent.

use super::{AgentClient, End, StreamGuard, kind_of, odd_answer};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use std::time::Duration;
use vm_guest_protocol::{
    Channel, ExecSpec, ProcessExit, Reply, Request, ResourceLimit, Started, TermSize, UserSpec,
};
use vm_planted_bugs::{Bug, planted};
use vm_trait::{
    ExecFailure, ExecOutput, ExecRequest, ExecStatus, GuestProcessHandle, Limit, Operation,
    OutputChannel, OutputOffsets, ProcessId, ProcessInfo, Resource, Signal, Stdin, TtySize, User,
    VmConfig, VmError, VmErrorKind, VmId, VmResult,
};

/// A timeout of this length is as good as none.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// From this patience with requests on it does not matter that the start of a program is told a moment late.
const LAZY_START_FROM: Duration = Duration::from_secs(1);

impl AgentClient {
    /// Runs a program to its end.
    pub(crate) async fn exec(
        &self,
        config: &VmConfig,
        request: ExecRequest,
    ) -> Result<ExecOutput, VmErrorKind> {
        let patience = self.patience(&request);
        let (mut spec, input, limit) = spec(config, request, false)?;
        spec.lazy_start = self.inner.parts.timeouts.request >= LAZY_START_FROM;
        let guard = self.open_program(spec, input)?;
        self.deadline(self.inner.parts.timeouts.request, guard.started()).await?;
        let mut stdout = Limited::new(limit);
        let mut stderr = Limited::new(limit);
        let collected = collect(&guard, &mut stdout, &mut stderr);
        let exit = self.deadline_if(patience, collected).await?;
        let elapsed = Duration::from_nanos(exit.elapsed_ns);
        let dropped = (stdout.dropped, stderr.dropped);
        let output =
            ExecOutput::new(status_of(&exit), stdout.into_bytes(), stderr.into_bytes(), elapsed);
        Ok(output.with_dropped(dropped.0, dropped.1))
    }

    /// Gives how long the end of a program is waited for. The agent ends it when its time is over; one that does not
    /// must not keep the host.
    fn patience(&self, request: &ExecRequest) -> Option<Duration> {
        let timeout = request.timeout.filter(|timeout| *timeout < FOR_EVER)?;
        Some(timeout + self.inner.parts.timeouts.request)
    }

    async fn deadline_if<T>(
        &self,
        after: Option<Duration>,
        work: impl Future<Output = Result<T, VmErrorKind>>,
    ) -> Result<T, VmErrorKind> {
        match after {
            Some(after) => self.deadline(after, work).await,
            None => work.await,
        }
    }

    /// Starts a program.
    pub(crate) async fn spawn(
        &self,
        vm: VmId,
        config: &VmConfig,
        request: ExecRequest,
    ) -> Result<ProcessHandle, VmErrorKind> {
        let patience = self.patience(&request);
        let (spec, input, _) = spec(config, request, true)?;
        let guard = self.open_program(spec, input)?;
        Ok(ProcessHandle { patience, ..self.handle(vm, guard).await? })
    }

    /// Takes up a process that the agent knows.
    pub(crate) async fn attach(
        &self,
        vm: VmId,
        process: ProcessId,
        offsets: OutputOffsets,
    ) -> Result<ProcessHandle, VmErrorKind> {
        let OutputOffsets { stdout, stderr } = offsets;
        let guard = self.open(Request::Attach { process: process.0, stdout, stderr })?;
        self.handle(vm, guard).await
    }

    pub(crate) async fn processes(&self) -> Result<Vec<ProcessInfo>, VmErrorKind> {
        match self.unary(Request::Processes).await? {
            Reply::Processes(entries) => Ok(entries
                .into_iter()
                .map(|entry| {
                    let status = entry.exit.as_ref().map(status_of);
                    ProcessInfo::new(ProcessId(entry.process), entry.pid, entry.program, status)
                })
                .collect()),
            _ => Err(odd_answer()),
        }
    }

    fn open_program(&self, spec: ExecSpec, input: Input) -> Result<StreamGuard, VmErrorKind> {
        self.open_with(Request::Exec(spec), |stream| match input {
            Input::None => stream.stdin.close(),
            Input::Open => {}
            Input::Bytes(bytes) => {
                stream.stdin.push(bytes);
                stream.stdin.close();
            }
        })
    }

    async fn handle(&self, vm: VmId, guard: StreamGuard) -> Result<ProcessHandle, VmErrorKind> {
        let started = self.deadline(self.inner.parts.timeouts.request, guard.started()).await?;
        Ok(ProcessHandle { vm, guard, started, patience: None })
    }
}

/// Takes a program's output in, to its end.
async fn collect(
    guard: &StreamGuard,
    stdout: &mut Limited,
    stderr: &mut Limited,
) -> Result<ProcessExit, VmErrorKind> {
    loop {
        let news = guard.wait(|stream| {
            if let (Some(end), true) = (&stream.end, planted(Bug::ExitOvertakesOutput)) {
                return Some(Err(end.clone()));
            }
            let news = (stream.stdout.take(), stream.stderr.take());
            match (&news, &stream.end) {
                ((None, None), None) => None,
                ((None, None), Some(end)) => Some(Err(end.clone())),
                _ => Some(Ok(news)),
            }
        });
        match news.await {
            Ok((out, err)) => {
                if let Some(chunk) = out {
                    stdout.push(chunk);
                    guard.grant(Channel::Stdout);
                }
                if let Some(chunk) = err {
                    stderr.push(chunk);
                    if !planted(Bug::StderrCreditForgotten) {
                        guard.grant(Channel::Stderr);
                    }
                }
            }
            Err(end) => return exit_of(end),
        }
    }
}

enum Input {
    None,
    Open,
    Bytes(Bytes),
}

/// Checks a request and puts it into the agent's terms.
fn spec(
    config: &VmConfig,
    request: ExecRequest,
    keep_open: bool,
) -> Result<(ExecSpec, Input, usize), VmErrorKind> {
    if request.program.is_empty() {
        return Err(VmErrorKind::invalid("program", "empty"));
    }
    let nul = |text: &String| text.contains('\0');
    let fields = [
        ("program", nul(&request.program)),
        ("args", request.args.iter().any(nul)),
        ("cwd", request.cwd.as_ref().is_some_and(nul)),
    ];
    if let Some((field, _)) = fields.iter().find(|(_, bad)| *bad) {
        return Err(VmErrorKind::invalid(*field, "a NUL byte cannot be passed to a program"));
    }
    vm_trait::config::check_env("env", &request.env)?;
    if request.timeout.is_some_and(|timeout| timeout.is_zero()) {
        return Err(VmErrorKind::invalid("timeout", "must be above zero"));
    }
    if request.tty.is_some_and(|size| size.rows == 0 || size.cols == 0) {
        return Err(VmErrorKind::invalid("tty", "rows and columns must be above zero"));
    }
    if let Some(cwd) = &request.cwd
        && !cwd.starts_with('/')
    {
        return Err(VmErrorKind::invalid("cwd", format!("`{cwd}` is not absolute")));
    }
    let mut env = config.env.clone();
    env.extend(request.env);
    if planted(Bug::MachineEnvironmentWins) {
        env.extend(config.env.clone());
    }
    let input = match request.stdin {
        Stdin::Empty => Input::None,
        Stdin::Bytes(bytes) => Input::Bytes(bytes),
        Stdin::Open if keep_open => Input::Open,
        Stdin::Open => Input::None,
    };
    let spec = ExecSpec {
        program: request.program,
        args: request.args,
        env: env.into_iter().collect(),
        cwd: request.cwd,
        user: request.user.map(|user| match user {
            User::Ids { uid, gid } => UserSpec::Ids { uid, gid },
            User::Name(name) => UserSpec::Name(name),
        }),
        tty: request.tty.map(|size| TermSize { rows: size.rows, cols: size.cols }),
        timeout_ns: request
            .timeout
            .map(|timeout| u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX)),
        stdin: !matches!(input, Input::None),
        limits: config.limits.iter().map(|(resource, limit)| limit_of(*resource, *limit)).collect(),
        lazy_start: false,
    };
    Ok((spec, input, request.output_limit))
}

fn limit_of(resource: Resource, Limit { soft, hard }: Limit) -> ResourceLimit {
    let amount = |limit: Option<u64>| limit.unwrap_or(ResourceLimit::NONE);
    ResourceLimit { resource: resource.number(), soft: amount(soft), hard: amount(hard) }
}

fn exit_of(end: End) -> Result<ProcessExit, VmErrorKind> {
    match end {
        End::Exited(exit) => Ok(exit),
        End::Failed(error) => Err(kind_of(&error)),
        End::Cut(kind) => Err(kind),
        End::Done(_) => Err(odd_answer()),
    }
}

fn status_of(exit: &ProcessExit) -> ExecStatus {
    let timed_out = exit.timed_out && !planted(Bug::TimeoutLooksLikeSignal);
    match (timed_out, exit.signal, exit.code) {
        (true, ..) => ExecStatus::TimedOut,
        (false, Some(signal), _) => ExecStatus::Signaled(Signal(signal)),
        (false, None, code) => ExecStatus::Exited(code.unwrap_or(0)),
    }
}

/// Output up to a limit.
struct Limited {
    limit: usize,
    first: Bytes,
    kept: BytesMut,
    dropped: u64,
}

impl Limited {
    fn new(limit: usize) -> Self {
        Self { limit, first: Bytes::new(), kept: BytesMut::new(), dropped: 0 }
    }

    fn push(&mut self, mut chunk: Bytes) {
        let length = self.first.len() + self.kept.len();
        let limit = self.limit.saturating_add(usize::from(planted(Bug::OneByteOverLimit)));
        let room = limit.saturating_sub(length).min(chunk.len());
        self.dropped += (chunk.len() - room) as u64;
        chunk.truncate(room);
        if chunk.is_empty() {
        } else if length == 0 {
            self.first = chunk;
        } else {
            if self.kept.is_empty() {
                self.kept.extend_from_slice(&self.first);
                self.first = Bytes::new();
            }
            self.kept.extend_from_slice(&chunk);
        }
    }

    fn into_bytes(self) -> Bytes {
        if self.kept.is_empty() { self.first } else { self.kept.freeze() }
    }
}

/// A running process. Dropping it closes its stream, which kills the process unless it was detached.
#[derive(Debug)]
pub(crate) struct ProcessHandle {
    vm: VmId,
    guard: StreamGuard,
    started: Started,
    /// How long its end is waited for at a time, where it has a timeout.
    patience: Option<Duration>,
}

impl ProcessHandle {
    pub(crate) fn boxed(self) -> Box<dyn GuestProcessHandle> {
        Box::new(self)
    }

    fn error(&self, kind: VmErrorKind) -> VmError {
        VmError::new(Operation::Spawn, kind).with_vm(self.vm)
    }

    /// Makes a request about this process, to be carried out exactly once.
    async fn ask(&self, request: Request) -> VmResult<()> {
        match self.guard.client.unary(request).await {
            Ok(_) => Ok(()),
            Err(VmErrorKind::ExecFailed { failure: ExecFailure::NoSuchProcess })
                if self.has_ended() =>
            {
                Ok(())
            }
            Err(kind) => Err(self.error(kind)),
        }
    }

    fn has_ended(&self) -> bool {
        self.guard.update(|stream| matches!(stream.end, Some(End::Exited(_)))).unwrap_or(true)
    }
}

#[async_trait]
impl GuestProcessHandle for ProcessHandle {
    fn id(&self) -> ProcessId {
        ProcessId(self.started.process)
    }

    fn pid(&self) -> u32 {
        self.started.pid
    }

    fn offsets(&self) -> OutputOffsets {
        let offsets = self.guard.update(|stream| OutputOffsets {
            stdout: stream.stdout.position(),
            stderr: stream.stderr.position(),
        });
        offsets.unwrap_or_default()
    }

    async fn read(&self, channel: OutputChannel) -> VmResult<Option<Bytes>> {
        let channel = match channel {
            OutputChannel::Stdout => Channel::Stdout,
            OutputChannel::Stderr => Channel::Stderr,
        };
        let taken = self.guard.wait(|stream| {
            let end = stream.end.clone();
            let incoming = stream.channel_mut(channel);
            match (incoming.take(), end) {
                (Some(chunk), _) => Some(Ok(Some(chunk))),
                (None, _) if incoming.at_end() => Some(Ok(None)),
                (None, Some(end)) => Some(exit_of(end).map(|_| None)),
                (None, None) => None,
            }
        });
        let taken = taken.await.map_err(|kind| self.error(kind))?;
        if taken.is_some() {
            self.guard.grant(channel);
        }
        Ok(taken)
    }

    async fn write_stdin(&self, bytes: Bytes) -> VmResult<()> {
        let mut bytes = bytes;
        let taken = self.guard.wait(|stream| match &stream.end {
            Some(End::Cut(kind)) => Some(Err(kind.clone())),
            // The program is gone: what it would have read is dropped.
            Some(_) => Some(Ok(None)),
            None if stream.stdin.is_closed() => Some(Err(VmErrorKind::invalid(
                "stdin",
                "it is closed; ask for `open_stdin` and write before `close_stdin`",
            ))),
            None if stream.stdin.has_room() => Some(Ok(Some(std::mem::take(&mut bytes)))),
            None => None,
        });
        match taken.await {
            Ok(Some(bytes)) => {
                self.guard.update(|stream| stream.stdin.push(bytes));
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(kind) => Err(self.error(kind)),
        }
    }

    async fn close_stdin(&self) -> VmResult<()> {
        let cut = self.guard.update(|stream| {
            stream.stdin.close();
            match &stream.end {
                Some(End::Cut(kind)) => Some(kind.clone()),
                _ => None,
            }
        });
        cut.flatten().map_or(Ok(()), |kind| Err(self.error(kind)))
    }

    async fn signal(&self, signal: Signal) -> VmResult<()> {
        if !(1..=64).contains(&signal.0) {
            let kind = VmErrorKind::invalid("signal", format!("{} is not 1 to 64", signal.0));
            return Err(self.error(kind));
        }
        self.ask(Request::Signal { process: self.started.process, signal: signal.0 }).await
    }

    async fn resize(&self, size: TtySize) -> VmResult<()> {
        if !self.started.tty {
            return Err(self.error(VmErrorKind::invalid("tty", "the process has no terminal")));
        }
        if size.rows == 0 || size.cols == 0 {
            let kind = VmErrorKind::invalid("tty", "rows and columns must be above zero");
            return Err(self.error(kind));
        }
        let size = TermSize { rows: size.rows, cols: size.cols };
        self.ask(Request::Resize { process: self.started.process, size }).await
    }

    async fn wait(&self) -> VmResult<ExecStatus> {
        let ended = async { Ok(self.guard.wait(|stream| stream.end.clone()).await) };
        let ended = self.guard.client.deadline_if(self.patience, ended).await;
        let exit = ended.and_then(exit_of).map_err(|kind| self.error(kind))?;
        Ok(status_of(&exit))
    }

    async fn detach(&self) -> VmResult<()> {
        if planted(Bug::DetachIsForgotten) {
            return Ok(());
        }
        self.ask(Request::Detach { process: self.started.process }).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_stays_open_only_for_who_can_write_to_it() {
        let config = VmConfig::default();
        let of = |stdin, keep_open| {
            let mut request = ExecRequest::new("x");
            request.stdin = stdin;
            let (spec, input, _) = spec(&config, request, keep_open).unwrap();
            (spec.stdin, matches!(input, Input::Open), matches!(input, Input::Bytes(_)))
        };
        assert_eq!(of(Stdin::Open, true), (true, true, false));
        assert_eq!(of(Stdin::Open, false), (false, false, false));
        assert_eq!(of(Stdin::Empty, true), (false, false, false));
        assert_eq!(of(Stdin::Bytes("x".into()), false), (true, false, true));
    }
}
