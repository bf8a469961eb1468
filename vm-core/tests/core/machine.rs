//! A machine whose agent plays a script.

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::watch,
};
use vm_core::{
    backend::{CoreBackend, CoreParts},
    env::TokioEnv,
    host_fs::StdFs,
    machine::{
        Acceptor, CaptureOrder, Captured, Generation, Hypervisor, Link, Machine, MachineError,
        MachineExit, MachineSpec, MachineStats, MachineStatus, SectionSink, Sections,
    },
    observe::{Observer, Occurrence},
    timeline::describe,
};
use vm_guest_protocol::{AGENT_PORT, Channel, Frame, Request, encode};
use vm_trait::{Capabilities, Capability, HostLimits, Mib, VmBackend, VmConfig, VmId, VmInstance};

/// What the agent does next on a connection.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// Sends these bytes.
    Bytes(Vec<u8>),
    /// Sends a frame on a stream.
    Frame(u32, Frame),
    /// Waits.
    Wait(Duration),
    /// Waits until the host has sent something.
    Listen,
    /// Sends frames on a stream that never end.
    Flood(u32, Vec<u8>),
    /// Hangs up.
    HangUp,
}

/// What becomes of a connection to another port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ports {
    /// It is never answered.
    Silent,
    /// It is made, and moves nothing.
    Stuck,
    /// The machine says that it has ended, and goes on.
    Ended,
}

/// How the machines of a test behave.
#[derive(Clone, Debug)]
pub(crate) struct Behaviour {
    /// The scripts of the connections to the agent; the last one is played again and again.
    pub(crate) scripts: Vec<Vec<Act>>,
    pub(crate) ports: Ports,
    /// Every call of the machine but `kill` hangs.
    pub(crate) mute: bool,
}

#[derive(Debug)]
pub(crate) struct Ill {
    behaviour: Behaviour,
    /// The most bytes that the host took on one connection.
    pub(crate) most_taken: Arc<AtomicUsize>,
    /// How many connections the host made.
    pub(crate) dials: Arc<AtomicUsize>,
    /// How often a machine was told to run on.
    pub(crate) resumes: Arc<AtomicUsize>,
    capabilities: Capabilities,
    /// The frames that the host sent.
    sent: Mutex<Vec<(u32, Frame)>>,
    /// Everything else that the core told of its work, and which lives it had machines made for.
    told: Mutex<Vec<String>>,
}

impl Ill {
    pub(crate) fn new(behaviour: Behaviour) -> Arc<Self> {
        Self::able(behaviour, Capabilities::all().without(Capability::GuestKernel))
    }

    /// Makes one that does what it is told, with agents that play these scripts.
    pub(crate) fn playing(scripts: Vec<Vec<Act>>, ports: Ports) -> Arc<Self> {
        Self::new(Behaviour { scripts, ports, mute: false })
    }

    /// Makes one that claims these capabilities alone.
    pub(crate) fn able(behaviour: Behaviour, capabilities: Capabilities) -> Arc<Self> {
        Arc::new(Self {
            behaviour,
            capabilities,
            sent: Mutex::default(),
            told: Mutex::default(),
            most_taken: Arc::default(),
            dials: Arc::default(),
            resumes: Arc::default(),
        })
    }

    /// Gives a machine that runs.
    pub(crate) async fn running(self: &Arc<Self>, config: VmConfig) -> Arc<dyn VmInstance> {
        let vm = self.backend().create(config).await.expect("create");
        vm.start().await.expect("it comes up");
        vm
    }

    /// Gives the frames that the host sent, with their streams.
    pub(crate) fn sent(&self) -> Vec<(u32, Frame)> {
        self.sent.lock().unwrap().clone()
    }

    /// Gives what the host asked the agent for, in order.
    pub(crate) fn opened(&self) -> Vec<Request> {
        let request = |(_, frame)| match frame {
            Frame::Open(request) => Some(request),
            _ => None,
        };
        self.sent().into_iter().filter_map(request).collect()
    }

    /// Gives what else the core told of its work.
    pub(crate) fn told(&self) -> Vec<String> {
        self.told.lock().unwrap().clone()
    }

    pub(crate) fn backend(self: &Arc<Self>) -> CoreBackend {
        self.backend_in("/nowhere")
    }

    /// Gives a backend that keeps its snapshots there.
    pub(crate) fn backend_in(self: &Arc<Self>, snapshots: impl Into<PathBuf>) -> CoreBackend {
        let mut last = 1_u8;
        let random = move |bytes: &mut [u8]| {
            for byte in bytes {
                last = last.wrapping_mul(37).wrapping_add(11);
                *byte = last;
            }
        };
        CoreBackend::new(CoreParts {
            hypervisor: self.clone(),
            env: Arc::new(TokioEnv::seeded(Duration::from_secs(1_000_000_000), random)),
            fs: Arc::new(StdFs),
            snapshots: snapshots.into(),
            observer: self.clone(),
        })
    }
}

impl Observer for Ill {
    fn record(&self, _: VmId, occurrence: &Occurrence<'_>) {
        match occurrence {
            Occurrence::Frame { sent: true, stream, frame } => {
                self.sent.lock().unwrap().push((*stream, (*frame).clone()));
            }
            other => self.told.lock().unwrap().push(describe(other)),
        }
    }
}

#[async_trait]
impl Hypervisor for Ill {
    fn name(&self) -> &str {
        "ill"
    }

    fn arch(&self) -> &str {
        "none"
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn limits(&self) -> HostLimits {
        HostLimits { max_vcpus: 1, max_memory: Mib(1024) }
    }

    async fn create(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, MachineError> {
        self.told.lock().unwrap().push(format!("made life {}", spec.life));
        Ok(Arc::new(IllMachine {
            scripts: Mutex::new(self.behaviour.scripts.iter().cloned().collect()),
            ports: self.behaviour.ports,
            mute: self.behaviour.mute,
            status: watch::Sender::new(MachineStatus::Fresh),
            most_taken: self.most_taken.clone(),
            dials: self.dials.clone(),
            resumes: self.resumes.clone(),
            captures: AtomicU64::default(),
        }))
    }
}

#[derive(Debug)]
struct IllMachine {
    scripts: Mutex<VecDeque<Vec<Act>>>,
    ports: Ports,
    mute: bool,
    status: watch::Sender<MachineStatus>,
    most_taken: Arc<AtomicUsize>,
    dials: Arc<AtomicUsize>,
    resumes: Arc<AtomicUsize>,
    captures: AtomicU64,
}

impl IllMachine {
    async fn obey(&self, status: MachineStatus) -> Result<(), MachineError> {
        if self.mute {
            std::future::pending::<()>().await;
        }
        self.status.send_replace(status);
        Ok(())
    }

    fn script(&self) -> Vec<Act> {
        let mut scripts = self.scripts.lock().unwrap();
        let script = scripts.pop_front().unwrap_or_default();
        if scripts.is_empty() {
            scripts.push_back(script.clone());
        }
        script
    }
}

/// A state without sections.
#[derive(Debug)]
struct Nothing(Option<Generation>);

#[async_trait]
impl Captured for Nothing {
    fn generation(&self) -> Option<Generation> {
        self.0
    }

    async fn write(&mut self, _: &mut dyn SectionSink) -> Result<(), MachineError> {
        Ok(())
    }
}

#[async_trait]
impl Machine for IllMachine {
    async fn boot(&self) -> Result<(), MachineError> {
        self.status.send_replace(MachineStatus::Running);
        Ok(())
    }

    async fn pause(&self) -> Result<(), MachineError> {
        self.obey(MachineStatus::Paused).await
    }

    async fn resume(&self) -> Result<(), MachineError> {
        self.resumes.fetch_add(1, Ordering::Relaxed);
        self.obey(MachineStatus::Running).await
    }

    async fn kill(&self) -> Result<(), MachineError> {
        self.status.send_replace(MachineStatus::Ended);
        Ok(())
    }

    async fn wait(&self) -> MachineExit {
        let mut status = self.status.subscribe();
        let _ = status.wait_for(|status| *status == MachineStatus::Ended).await;
        MachineExit::Killed
    }

    async fn status(&self) -> Result<MachineStatus, MachineError> {
        if self.mute {
            std::future::pending::<()>().await;
        }
        Ok(*self.status.borrow())
    }

    async fn connect(&self, port: u32) -> Result<Box<dyn Link>, MachineError> {
        if port != AGENT_PORT {
            return match self.ports {
                Ports::Silent => std::future::pending().await,
                Ports::Ended => Err(MachineError::Ended),
                Ports::Stuck => {
                    let (host, guest) = duplex(64);
                    tokio::spawn(async move {
                        std::future::pending::<()>().await;
                        drop(guest);
                    });
                    Ok(Box::new(host))
                }
            };
        }
        self.dials.fetch_add(1, Ordering::Relaxed);
        let (host, guest) = duplex(4096);
        tokio::spawn(play(guest, self.script(), self.most_taken.clone()));
        Ok(Box::new(host))
    }

    async fn listen(&self, _: u32) -> Result<Box<dyn Acceptor>, MachineError> {
        match self.ports {
            Ports::Silent => std::future::pending().await,
            ports => Ok(Box::new(IllAcceptor(ports))),
        }
    }

    async fn capture(&self, order: CaptureOrder) -> Result<Box<dyn Captured>, MachineError> {
        self.obey(MachineStatus::Paused).await?;
        tokio::time::sleep(Duration::from_millis(7)).await;
        let taken = self.captures.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(Nothing(order.track.then_some(Generation(taken)))))
    }

    async fn load(&self, _: &Sections, _: bool) -> Result<(), MachineError> {
        self.obey(MachineStatus::Paused).await
    }

    async fn fork(&self, specs: &[MachineSpec]) -> Vec<Result<Arc<dyn Machine>, MachineError>> {
        specs.iter().map(|_| Err(MachineError::Unsupported("fork".to_owned()))).collect()
    }

    async fn stats(&self) -> Result<MachineStats, MachineError> {
        let status = *self.status.borrow();
        self.obey(status).await?;
        Ok(MachineStats::default())
    }

    fn console(&self) -> Bytes {
        Bytes::from_static(b"ill\n")
    }
}

#[derive(Debug)]
struct IllAcceptor(Ports);

#[async_trait]
impl Acceptor for IllAcceptor {
    async fn accept(&mut self) -> Result<Box<dyn Link>, MachineError> {
        match self.0 {
            Ports::Ended => Err(MachineError::Ended),
            Ports::Silent | Ports::Stuck => std::future::pending().await,
        }
    }
}

/// Plays a script on a connection, while everything that the host sends is swallowed.
async fn play(link: DuplexStream, script: Vec<Act>, most_taken: Arc<AtomicUsize>) {
    let (mut reader, mut writer) = tokio::io::split(link);
    let (heard, mut hears) = watch::channel(0_usize);
    let swallow = tokio::spawn(async move {
        let mut sink = vec![0; 4096];
        while let Ok(read) = reader.read(&mut sink).await {
            if read == 0 {
                return;
            }
            heard.send_modify(|all| *all += read);
        }
    });
    let mut taken = 0;
    for act in script {
        let sent = match act {
            Act::Bytes(bytes) => send(&mut writer, &bytes, &mut taken).await,
            Act::Frame(stream, frame) => {
                send(&mut writer, &framed(stream, &frame), &mut taken).await
            }
            Act::Wait(time) => {
                tokio::time::sleep(time).await;
                true
            }
            Act::Listen => {
                let before = *hears.borrow();
                hears.wait_for(|all| *all > before).await.is_ok()
            }
            Act::Flood(stream, pattern) => {
                let mut offset = 0;
                loop {
                    let frame = flood(stream, offset, &pattern);
                    offset += pattern.len() as u64;
                    if !send(&mut writer, &frame, &mut taken).await {
                        break false;
                    }
                    most_taken.fetch_max(taken, Ordering::Relaxed);
                }
            }
            Act::HangUp => false,
        };
        most_taken.fetch_max(taken, Ordering::Relaxed);
        if !sent {
            swallow.abort();
            return;
        }
    }
    // It says no more, and listens on.
    let _ = swallow.await;
}

async fn send(writer: &mut (impl AsyncWriteExt + Unpin), bytes: &[u8], taken: &mut usize) -> bool {
    let sent = writer.write_all(bytes).await.is_ok();
    *taken += if sent { bytes.len() } else { 0 };
    sent
}

/// Gives a frame of [`Act::Flood`] as it is sent.
pub(crate) fn flood(stream: u32, offset: u64, pattern: &[u8]) -> BytesMut {
    let bytes = Bytes::copy_from_slice(pattern);
    framed(stream, &Frame::Data { channel: Channel::Stdout, offset, bytes })
}

fn framed(stream: u32, frame: &Frame) -> BytesMut {
    let mut bytes = BytesMut::new();
    encode(stream, frame, &mut bytes);
    bytes
}
