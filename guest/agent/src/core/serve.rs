//! What each frame of the host does.

use super::{
    AgentConfig, AgentCore, ConnId, Violation,
    error::{failed, refused},
    exec,
    file::{Read, Write},
    link::Link,
    process::{Origin, Process},
    stream::{Job, Outcome, Stream},
    tree,
};
use crate::os::{Errno, GuestOs};
use std::time::Duration;
use vm_guest_protocol::{
    Channel, ExecSpec, Frame, GuestError, GuestErrorKind, Hello, PROTOCOL_VERSION, Refusal, Reply,
    Request, Started, StreamId, TermSize, Welcome, encode,
};
use vm_planted_bugs::{Bug, planted};

/// How many streams a session has at most.
const MAX_STREAMS: usize = 1024;

impl AgentCore {
    /// Does what the frames of a connection say, as far as they are whole.
    pub(super) fn hear(&mut self, conn: ConnId, os: &mut dyn GuestOs) -> Result<(), Violation> {
        while let Some((stream, frame)) = self.link.next_frame(conn)? {
            if self.link.is_serving(conn) {
                self.frame(stream, frame, os)?;
            } else if let (0, Frame::Hello(hello)) = (stream, frame) {
                self.hello(conn, hello, os);
            } else {
                return Err(Violation::NoHello);
            }
        }
        Ok(())
    }

    fn hello(&mut self, conn: ConnId, mut hello: Hello, os: &mut dyn GuestOs) {
        if hello.version != PROTOCOL_VERSION {
            let refusal = Refusal::Version { agent: PROTOCOL_VERSION };
            self.link.refuse(conn, &Frame::Refused(refusal));
            return;
        }
        let resumed = hello.resume && self.session == Some(hello.session);
        self.link.serve(conn);
        if resumed {
            hello.live.sort_unstable();
            let kept = planted(Bug::StreamOutlivesLoss);
            let gone = |id: &&StreamId| !kept && hello.live.binary_search(id).is_err();
            let closed = self.streams.keys().filter(gone);
            for id in closed.copied().collect::<Vec<_>>() {
                self.close(id, os);
            }
        } else {
            self.end_session(os);
            self.session = Some(hello.session);
        }
        let welcome = Welcome { version: PROTOCOL_VERSION, resumed, uptime_ns: uptime_ns(os) };
        self.link.send(0, &Frame::Welcome(welcome));
        if resumed {
            self.suspend_streams();
        }
    }

    /// Lets every stream wait to be announced, and says how far standard input has come.
    fn suspend_streams(&mut self) {
        for (id, stream) in &mut self.streams {
            stream.announced = false;
            stream.end_sent = false;
            let credit = match &mut stream.job {
                Job::Process { id, .. } => self.processes.get_mut(*id).map(|process| {
                    process.suspend();
                    process.stdin_credit_now(&self.config)
                }),
                Job::Read(read) => {
                    read.out.suspend();
                    None
                }
                Job::Write(_) => Some(stream.intake.force_credit(self.config.window)),
                Job::Over(_) => None,
            };
            if let Some(credit) = credit {
                self.link.send(*id, &credit);
            }
        }
    }

    /// Drops all streams; processes go on.
    fn end_session(&mut self, os: &mut dyn GuestOs) {
        for (_, stream) in std::mem::take(&mut self.streams) {
            match stream.job {
                Job::Process { id, .. } => self.processes.orphan(id, &self.config),
                Job::Read(mut read) => read.close(os),
                Job::Write(write) => write.abort(os),
                Job::Over(_) => {}
            }
        }
    }

    fn frame(&mut self, id: StreamId, frame: Frame, os: &mut dyn GuestOs) -> Result<(), Violation> {
        if id == 0 {
            return Err(Violation::Unexpected);
        }
        match frame {
            Frame::Open(request) => {
                self.open(id, request, os);
                Ok(())
            }
            Frame::Data { channel: Channel::Stdin, offset, bytes } => {
                self.data(id, offset, &bytes, os)
            }
            Frame::Eof { channel: Channel::Stdin, offset } => self.eof(id, offset, os),
            Frame::Credit { channel: Channel::Stdout, consumed, window } => {
                self.credit(id, 0, consumed, window, os)
            }
            Frame::Credit { channel: Channel::Stderr, consumed, window } => {
                self.credit(id, 1, consumed, window, os)
            }
            Frame::Close => {
                self.close(id, os);
                Ok(())
            }
            _ => Err(Violation::Unexpected),
        }
    }

    fn open(&mut self, id: StreamId, request: Request, os: &mut dyn GuestOs) {
        if self.streams.contains_key(&id) && !planted(Bug::RequestRunsAgain) {
            self.reopen(id);
        } else if self.streams.len() >= MAX_STREAMS {
            let error = GuestError::new(GuestErrorKind::OutOfResources);
            self.link.send(id, &Frame::Failed(error));
            return;
        } else {
            let job =
                self.begin(id, request, os).unwrap_or_else(|error| Job::Over(Err(error).into()));
            self.streams.insert(id, Stream::new(job));
        }
        self.send_started(id);
        self.flush(id, os);
    }

    /// Goes on with a stream on which the host has seen no answer, from its beginning.
    fn reopen(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.announced = true;
        stream.end_sent = false;
        match &mut stream.job {
            Job::Process { id, .. } => {
                if let Some(process) = self.processes.get_mut(*id) {
                    process.restart();
                }
            }
            Job::Read(read) => read.out.restart(),
            Job::Write(_) | Job::Over(_) => {}
        }
    }

    /// Says that the contents of a file come. Of a process, `flush` does.
    fn send_started(&mut self, id: StreamId) {
        let Some(Stream { job: Job::Read(_), .. }) = self.streams.get(&id) else { return };
        let started = Started { process: 0, pid: 0, stdout: 0, stderr: 0, tty: false, stdin: 0 };
        self.link.send(id, &Frame::Started(started));
    }

    /// Begins what a new stream is for.
    fn begin(
        &mut self,
        stream: StreamId,
        request: Request,
        os: &mut dyn GuestOs,
    ) -> Result<Job, GuestError> {
        let reply = match request {
            Request::Exec(spec) => return self.exec(stream, spec, os),
            Request::Attach { process, stdout, stderr } => {
                return self.attach(stream, process, (stdout, stderr), os);
            }
            Request::ReadFile { path } => {
                return Ok(Job::Read(Box::new(Read::file(path, os)?)));
            }
            Request::ListDir { path } => {
                let listing = tree::list(&path, os)?;
                return Ok(Job::Read(Box::new(Read::listing(path, &listing))));
            }
            Request::WriteFile { path, mode } => {
                let session = self.session.unwrap_or_default();
                let write = Write::begin(&path, mode, session, stream, os)?;
                return Ok(Job::Write(Box::new(write)));
            }
            Request::Processes => return Ok(Job::Over(Outcome::Processes)),
            Request::Ping => Reply::Pong { uptime_ns: uptime_ns(os) },
            Request::Stat { path } => {
                tree::check(&path)?;
                Reply::Stat(os.lstat(&path).map_err(|errno| failed(errno, &path))?)
            }
            other => {
                self.change(other, os)?;
                Reply::Empty
            }
        };
        Ok(Job::Over(Outcome::Done(reply)))
    }

    /// Carries out a request whose good end says nothing.
    fn change(&mut self, request: Request, os: &mut dyn GuestOs) -> Result<(), GuestError> {
        match request {
            Request::Signal { process, signal } => self.signal(process, signal, os),
            Request::Resize { process, size } => self.resize(process, size, os),
            Request::Detach { process } => self.detach(process),
            Request::CreateDir { path, mode, recursive } => {
                tree::create_dir(&path, mode, recursive, os)
            }
            Request::Remove { path, recursive } => tree::remove(&path, recursive, os),
            Request::Rename { from, to } => tree::rename(&from, &to, os),
            Request::SetClock { wall_ns } => {
                os.set_wall_clock(Duration::from_nanos(wall_ns)).map_err(|errno| failed(errno, ""))
            }
            Request::Reseed { .. } if planted(Bug::ReseedDoesNothing) => Ok(()),
            Request::Reseed { entropy } => os.reseed(&entropy).map_err(|errno| failed(errno, "")),
            Request::Shutdown { signal, grace_ns } => {
                check_signal(signal)?;
                self.shut_down(signal, Duration::from_nanos(grace_ns), os);
                Ok(())
            }
            _ => Err(GuestError::new(GuestErrorKind::Unsupported)),
        }
    }

    fn exec(
        &mut self,
        stream: StreamId,
        spec: ExecSpec,
        os: &mut dyn GuestOs,
    ) -> Result<Job, GuestError> {
        if self.processes.is_full() {
            return Err(refused(GuestErrorKind::OutOfResources, &spec.program));
        }
        let origin = Origin {
            program: spec.program.clone(),
            tty: spec.tty.is_some(),
            stdin: spec.stdin,
            lazy: spec.lazy_start && !spec.stdin,
            timeout: spec.timeout_ns.map(Duration::from_nanos),
        };
        let now = os.monotonic();
        let spawned = exec::spawn(spec, os)?;
        let id = self.processes.add(Process::new(spawned, origin, stream, now));
        Ok(Job::Process { id, keep: false })
    }

    fn attach(
        &mut self,
        stream: StreamId,
        id: u64,
        (stdout, stderr): (u64, u64),
        os: &mut dyn GuestOs,
    ) -> Result<Job, GuestError> {
        let gone = || GuestError::new(GuestErrorKind::NoSuchProcess);
        let process = self.processes.get_mut(id).ok_or_else(gone)?;
        if let Some(old) = process.reader.take()
            && let Some(other) = self.streams.get_mut(&old)
        {
            other.intake = process.intake();
            other.finish(Err(gone()));
            self.flush(old, os);
        }
        self.processes.attach(id, stream, stdout, stderr);
        Ok(Job::Process { id, keep: false })
    }

    fn process(&mut self, id: u64) -> Result<&mut Process, GuestError> {
        let gone = || GuestError::new(GuestErrorKind::NoSuchProcess);
        self.processes.get_mut(id).ok_or_else(gone)
    }

    fn signal(&mut self, id: u64, signal: u8, os: &mut dyn GuestOs) -> Result<(), GuestError> {
        check_signal(signal)?;
        let process = self.process(id)?;
        if process.has_ended() {
            if planted(Bug::SignalToEndedFails) {
                return Err(GuestError::new(GuestErrorKind::InvalidArgument));
            }
            return Ok(());
        }
        match os.signal_group(process.child(), signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(failed(errno, "")),
        }
    }

    fn resize(&mut self, id: u64, size: TermSize, os: &mut dyn GuestOs) -> Result<(), GuestError> {
        let process = self.process(id)?;
        if !process.has_tty() {
            return Err(GuestError::new(GuestErrorKind::InvalidArgument));
        }
        if process.has_ended() {
            return Ok(());
        }
        os.resize(process.child(), size).map_err(|errno| failed(errno, ""))
    }

    fn detach(&mut self, id: u64) -> Result<(), GuestError> {
        let reader = self.process(id)?.reader;
        let stream = reader.and_then(|reader| self.streams.get_mut(&reader));
        if let Some(Stream { job: Job::Process { keep, .. }, .. }) = stream {
            *keep = true;
        }
        Ok(())
    }

    fn data(
        &mut self,
        id: StreamId,
        offset: u64,
        bytes: &[u8],
        os: &mut dyn GuestOs,
    ) -> Result<(), Violation> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        if let Job::Process { id: process, .. } = stream.job {
            let Some(process) = self.processes.get_mut(process) else { return Ok(()) };
            process.stdin_data(offset, bytes, os)?;
            if !process.owes_start()
                && let Some(credit) = process.stdin_credit(&self.config)
            {
                self.link.send(id, &credit);
            }
            return Ok(());
        }
        let known = stream.intake.data(offset, bytes.len())?;
        stream.intake.take_all();
        let mut failure = None;
        if let Job::Write(write) = &mut stream.job
            && known < bytes.len()
            && let Err(error) = write.append(&bytes[known..], os)
        {
            write.abort(os);
            failure = Some(error);
        }
        if let Some(credit) = stream.intake.credit(self.config.window, false) {
            self.link.send(id, &credit);
        }
        if let Some(error) = failure {
            stream.finish(Err(error));
            self.flush(id, os);
        }
        Ok(())
    }

    fn eof(&mut self, id: StreamId, offset: u64, os: &mut dyn GuestOs) -> Result<(), Violation> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        if let Job::Process { id: process, .. } = stream.job {
            let Some(process) = self.processes.get_mut(process) else { return Ok(()) };
            process.stdin_end(offset, os)?;
            if !process.owes_start()
                && let Some(credit) = process.stdin_credit(&self.config)
            {
                self.link.send(id, &credit);
            }
            return Ok(());
        }
        stream.intake.end(offset)?;
        if matches!(stream.job, Job::Write(_)) {
            let over = Job::Over(Outcome::Done(Reply::Empty));
            if let Job::Write(write) = std::mem::replace(&mut stream.job, over)
                && let Err(error) = write.commit(os)
            {
                stream.finish(Err(error));
            }
            self.flush(id, os);
        }
        Ok(())
    }

    fn credit(
        &mut self,
        id: StreamId,
        output: usize,
        consumed: u64,
        window: u32,
        os: &mut dyn GuestOs,
    ) -> Result<(), Violation> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        if !stream.announced {
            stream.announced = true;
            stream.end_sent = false;
        }
        match &mut stream.job {
            Job::Process { id, .. } => {
                if let Some(process) = self.processes.get_mut(*id) {
                    process.outs[output].credit(consumed, window)?;
                    let now = os.monotonic();
                    process.pump(os, now, &self.config);
                }
            }
            Job::Read(read) if output == 0 => read.out.credit(consumed, window)?,
            _ => {}
        }
        self.flush(id, os);
        Ok(())
    }

    fn close(&mut self, id: StreamId, os: &mut dyn GuestOs) {
        let Some(stream) = self.streams.remove(&id) else { return };
        match stream.job {
            Job::Process { id, keep: true } => self.processes.orphan(id, &self.config),
            Job::Process { id, keep: false } => self.processes.doom(id, os),
            Job::Read(mut read) => read.close(os),
            Job::Write(write) => write.abort(os),
            Job::Over(_) => {}
        }
    }

    /// Sends what a stream has to say.
    pub(super) fn flush(&mut self, id: StreamId, os: &mut dyn GuestOs) {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.announced) else {
            return;
        };
        match &mut stream.job {
            Job::Process { id: process, .. } => {
                if let Some(process) = self.processes.get_mut(*process)
                    && flush_process(&mut self.link, &self.config, (id, stream), process)
                {
                    self.cursor = id;
                }
            }
            Job::Read(read) => {
                let Some(out) = self.link.out() else { return };
                if read.pump(id, self.config.window_bytes(), out, os) {
                    self.link.congested = true;
                    self.cursor = id;
                } else if read.is_over() && !stream.end_sent {
                    let end = match &read.error {
                        None => Frame::Done(Reply::Empty),
                        Some(error) => Frame::Failed(error.clone()),
                    };
                    self.link.send(id, &end);
                    stream.end_sent = true;
                }
            }
            Job::Over(outcome) if !stream.end_sent => {
                let processes = &self.processes;
                let end = outcome.frame(|| Reply::Processes(processes.entries()));
                self.link.send(id, &end);
                stream.end_sent = true;
            }
            Job::Write(_) | Job::Over(_) => {}
        }
    }
}

/// Sends what a process has to say to the stream that reads it. Says whether the connection became too full for it.
pub(super) fn flush_process(
    link: &mut Link,
    config: &AgentConfig,
    (stream_id, stream): (StreamId, &mut Stream),
    process: &mut Process,
) -> bool {
    let Some(out) = link.out() else { return false };
    if !stream.announced {
        return false;
    }
    if let Job::Process { id, .. } = stream.job
        && process.start_to_send()
    {
        encode(stream_id, &process.started_frame(id), out);
    }
    if process.owes_start() {
        return false;
    }
    let full = process.outs[0].flush(stream_id, Channel::Stdout, out)
        || process.outs[1].flush(stream_id, Channel::Stderr, out);
    if let Some(credit) = process.stdin_credit(config) {
        link.send(stream_id, &credit);
    }
    if !stream.end_sent
        && let Some(exit) = process.end_to_send()
    {
        link.send(stream_id, &Frame::Exited(exit.clone()));
        stream.end_sent = true;
    }
    link.congested |= full;
    full
}

fn check_signal(signal: u8) -> Result<(), GuestError> {
    if (1..=64).contains(&signal) {
        Ok(())
    } else {
        Err(GuestError::new(GuestErrorKind::InvalidArgument))
    }
}

fn uptime_ns(os: &dyn GuestOs) -> u64 {
    u64::try_from(os.monotonic().as_nanos()).unwrap_or(u64::MAX)
}
