//! [`Hypervisor`] and [`Machine`]: what is below the one implementation of the trait.
//!
//! A machine is one life of a virtual machine: it is made, boots or is loaded, and dies; starting again makes another.
//! Implementations do as they are told and report truthfully. Order, deadlines, pre-emption, cancellation and states
//! are decided above them.

use crate::image::Image;
use async_trait::async_trait;
use bytes::Bytes;
use std::{fmt, sync::Arc, time::Duration};
use tokio::io::{AsyncRead, AsyncWrite};
use vm_trait::{Capabilities, CrashReason, HostLimits, Inspection, VmConfig, VmId};

/// Makes machines of one kind.
#[async_trait]
pub trait Hypervisor: Send + Sync + fmt::Debug {
    /// Gives the short name of the backend; snapshots carry it.
    fn name(&self) -> &str;

    /// Gives the guest architecture as Rust names it (`x86_64`).
    fn arch(&self) -> &str;

    /// Gives what its machines can do.
    fn capabilities(&self) -> Capabilities;

    /// Gives the limits of this host.
    fn limits(&self) -> HostLimits;

    /// Checks what only this hypervisor can check of a configuration.
    ///
    /// # Errors
    /// [`MachineError::Config`].
    fn check(&self, _config: &VmConfig) -> Result<(), MachineError> {
        Ok(())
    }

    /// Makes a machine that does not run yet. The host's ports that the configuration maps are its own from then on, or
    /// from its boot or load on, to its end. When the future is dropped, nothing is left of it.
    ///
    /// # Errors
    /// [`MachineError::Exhausted`], [`MachineError::PortInUse`] and others.
    async fn create(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, MachineError>;
}

/// What a machine is made for.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// The VM whose life this is.
    pub vm: VmId,
    /// Counts the VM's lives, from 1.
    pub life: u64,
    /// The VM's configuration, already validated.
    pub config: Arc<VmConfig>,
    /// Whether a saved state will be loaded into it, so that it needs nothing to boot from.
    pub loads: bool,
}

/// One life of a virtual machine.
///
/// Dropping the last reference ends it and frees everything that can be freed without waiting.
#[async_trait]
pub trait Machine: Send + Sync + fmt::Debug {
    /// Enters the guest's kernel, and returns once guest code runs.
    ///
    /// # Errors
    /// When it cannot.
    async fn boot(&self) -> Result<(), MachineError>;

    /// Stops all vCPUs. When the future is dropped, the machine is in either state; `status` tells.
    ///
    /// # Errors
    /// When it cannot.
    async fn pause(&self) -> Result<(), MachineError>;

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// When it cannot.
    async fn resume(&self) -> Result<(), MachineError>;

    /// Ends the machine by force, in any condition, any number of times. When it returns, no guest code runs and
    /// nothing of the machine is left on the host.
    ///
    /// # Errors
    /// Only when the host would not remove it.
    async fn kill(&self) -> Result<(), MachineError>;

    /// Waits for the machine's end, for any number of callers, also when it has ended already.
    async fn wait(&self) -> MachineExit;

    /// Says what the machine really does.
    ///
    /// # Errors
    /// When it does not answer.
    async fn status(&self) -> Result<MachineStatus, MachineError>;

    /// Opens a stream to a vsock port of the guest; the agent's is
    /// [`AGENT_PORT`](vm_guest_protocol::AGENT_PORT). When the future is dropped, nothing is left of it.
    ///
    /// # Errors
    /// [`MachineError::NotListening`] while nothing in the guest listens there: the agent may later.
    async fn connect(&self, port: u32) -> Result<Box<dyn Link>, MachineError>;

    /// Takes the streams that the guest opens to a vsock port of the host, from now on and until the acceptor is
    /// dropped or the machine ends. Once it is dropped, the port is free again, and what nobody took is closed. When
    /// the future is dropped, nothing is left of it.
    ///
    /// # Errors
    /// [`MachineError::PortInUse`].
    async fn listen(&self, port: u32) -> Result<Box<dyn Acceptor>, MachineError>;

    /// Takes down the state of a paused machine as it is now. It is written out afterwards, when the machine may have gone
    /// on, or ended. When the future is dropped, nothing is left of it.
    ///
    /// # Errors
    /// When it cannot.
    async fn capture(&self, order: CaptureOrder) -> Result<Box<dyn Captured>, MachineError>;

    /// Puts a saved state into a machine that was not booted; it is then paused, and all the connections its guest
    /// had are gone. With `track`, changes are kept track of from there on, as [`Generation::LOADED`].
    ///
    /// Sections are verified; images need not be. What decodes one must ask for verified [`content`](Image::content); the
    /// guest may see what is not verified yet, and nothing leaves the machine before it was.
    ///
    /// # Errors
    /// [`MachineError::Incompatible`], [`MachineError::Corrupt`] and others; the machine can then only be killed.
    async fn load(&self, sections: &Sections, track: bool) -> Result<(), MachineError>;

    /// Makes copies of a paused machine, one for each spec, each paused, with none of the connections of this one,
    /// with private disks, and without the host's ports that the configuration maps, which this one keeps.
    async fn fork(&self, specs: &[MachineSpec]) -> Vec<Result<Arc<dyn Machine>, MachineError>>;

    /// Looks at a paused machine from outside.
    ///
    /// # Errors
    /// [`MachineError::Unsupported`], or when the machine does not answer.
    async fn inspect(&self) -> Result<Inspection, MachineError> {
        Err(MachineError::Unsupported("inspect".to_owned()))
    }

    /// Gives what can be counted.
    ///
    /// # Errors
    /// When the machine does not answer.
    async fn stats(&self) -> Result<MachineStats, MachineError>;

    /// Gives the last bytes of the console, also after the end.
    fn console(&self) -> Bytes;
}

/// What is to be captured of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CaptureOrder {
    /// Of images, only what changed since then; without it, all of them.
    pub since: Option<Generation>,
    /// Whether changes are to be kept track of from here on.
    pub track: bool,
}

/// A moment of a machine's life from which on it keeps track of what changes in its images. A machine knows at least its
/// last eight, the oldest go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(pub u64);

impl Generation {
    /// When it was loaded.
    pub const LOADED: Self = Self(0);

    /// How many a machine knows.
    pub const KEPT: usize = 8;
}

/// A machine's state as it was once. Dropped, it leaves nothing.
#[async_trait]
pub trait Captured: Send + fmt::Debug {
    /// Names the moment of the capture, where changes since then are kept track of.
    fn generation(&self) -> Option<Generation>;

    /// Writes it, section by section. When the future is dropped, it cannot be written any more.
    ///
    /// # Errors
    /// When it cannot, or with the error of the sink.
    async fn write(&mut self, sections: &mut dyn SectionSink) -> Result<(), MachineError>;
}

/// Takes streams that a guest opens. While nobody asks it for one, at most [`BACKLOG`] wait; more are refused.
#[async_trait]
pub trait Acceptor: Send + fmt::Debug {
    /// Waits for the next stream. When the future is dropped, no stream is lost.
    ///
    /// # Errors
    /// [`MachineError::Ended`].
    async fn accept(&mut self) -> Result<Box<dyn Link>, MachineError>;
}

/// How many streams that a guest opened wait on a port of the host until they are taken: 16, as
/// [`GuestListener::accept`](vm_trait::GuestListener::accept) promises.
pub const BACKLOG: usize = 16;

/// A byte stream between the host and a program in the guest.
pub trait Link: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Link for T {}

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineStatus {
    /// It was made and not booted or loaded.
    Fresh,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// It has ended.
    Ended,
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineExit {
    /// The guest powered off.
    PoweredOff,
    /// It was killed from above.
    Killed,
    /// It crashed.
    Crashed(CrashReason),
    /// What runs it died or could not go on: why, for people. Its VM is then Crashed with
    /// [`VmmDied`](CrashReason::VmmDied).
    Failed(String),
}

impl MachineExit {
    /// Gives the reason with which its VM is Crashed; `None` where it is Stopped.
    #[must_use]
    pub fn crash(&self) -> Option<CrashReason> {
        match self {
            Self::PoweredOff => None,
            Self::Killed | Self::Failed(_) => Some(CrashReason::VmmDied),
            Self::Crashed(reason) => Some(reason.clone()),
        }
    }
}

/// What a machine counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MachineStats {
    /// CPU time used.
    pub cpu_time: Option<Duration>,
    /// Memory that the guest uses, in bytes.
    pub memory_used_bytes: Option<u64>,
    /// Exits to the VMM.
    pub vm_exits: Option<u64>,
}

/// Where a machine's state goes.
#[async_trait]
pub trait SectionSink: Send {
    /// Begins a section; the one before it ends.
    ///
    /// # Errors
    /// [`MachineError::HostIo`].
    async fn begin(&mut self, name: &str) -> Result<(), MachineError>;

    /// Appends to the section.
    ///
    /// # Errors
    /// [`MachineError::HostIo`].
    async fn write(&mut self, bytes: Bytes) -> Result<(), MachineError>;

    /// Begins an image of `total` bytes, to be given in ascending order by [`write_at`](Self::write_at) and
    /// [`zeros_at`](Self::zeros_at); the section before it ends. What neither says is zeros, or in a capture since some
    /// generation what it was then.
    ///
    /// # Errors
    /// [`MachineError::HostIo`].
    async fn begin_image(&mut self, name: &str, total: u64) -> Result<(), MachineError>;

    /// Says what stands at an offset of the image. Whole pages at page boundaries can be mapped later.
    ///
    /// # Errors
    /// [`MachineError::HostIo`]; [`MachineError::Failed`] for an offset that was passed or lies outside.
    async fn write_at(&mut self, offset: u64, bytes: Bytes) -> Result<(), MachineError>;

    /// Says that there are zeros at an offset of the image.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    async fn zeros_at(&mut self, offset: u64, length: u64) -> Result<(), MachineError>;
}

/// A machine's state by section: those of bytes, verified, and images, which need not be.
#[derive(Clone, Debug, Default)]
pub struct Sections {
    pub(crate) plain: Vec<(String, Bytes)>,
    pub(crate) images: Vec<(String, Image)>,
}

impl Sections {
    /// Gives a section's bytes.
    ///
    /// # Errors
    /// [`MachineError::Corrupt`] where there is none of that name.
    pub fn get(&self, name: &str) -> Result<&Bytes, MachineError> {
        self.find(name)
            .ok_or_else(|| MachineError::Corrupt(format!("there is no section `{name}`")))
    }

    /// Gives a section's bytes, if there is one of that name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Bytes> {
        self.plain.iter().find(|(known, _)| known == name).map(|(_, bytes)| bytes)
    }

    /// Gives an image.
    ///
    /// # Errors
    /// [`MachineError::Corrupt`] where there is none of that name.
    pub fn image(&self, name: &str) -> Result<&Image, MachineError> {
        let found = self.images.iter().find(|(known, _)| known == name).map(|(_, image)| image);
        found.ok_or_else(|| MachineError::Corrupt(format!("there is no image `{name}`")))
    }

    /// Walks through the sections of bytes in the order in which they were written.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Bytes)> {
        self.plain.iter().map(|(name, bytes)| (name.as_str(), bytes))
    }

    /// Verifies all images, as [`Image::verify`] does.
    ///
    /// # Errors
    /// [`MachineError::Corrupt`], [`MachineError::HostIo`].
    pub async fn verify(&self) -> Result<(), MachineError> {
        for (_, image) in &self.images {
            image.verify().await?;
        }
        Ok(())
    }
}

/// How a machine failed; mapped to [`VmErrorKind`](vm_trait::VmErrorKind) in one place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// A field of the configuration cannot be had here.
    #[error("invalid {field}: {reason}")]
    Config {
        /// The field.
        field: String,
        /// Why not.
        reason: String,
    },
    /// This kind of machine cannot do it.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The host ran out of something.
    #[error("out of {0}")]
    Exhausted(String),
    /// Nothing in the guest listens on the port.
    #[error("nothing in the guest listens on the port")]
    NotListening,
    /// The port of the host has a listener already, of the machine or of another.
    #[error("port {0} has a listener already")]
    PortInUse(u32),
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
    /// A state that cannot be used here.
    #[error("{field} is {found}, wanted {wanted}")]
    Incompatible {
        /// Which field differs.
        field: String,
        /// What the state says.
        found: String,
        /// What is needed.
        wanted: String,
    },
    /// A state that makes no sense.
    #[error("damaged state: {0}")]
    Corrupt(String),
    /// The host's file system failed.
    #[error("host file {path}: {reason}")]
    HostIo {
        /// The file.
        path: String,
        /// What it answered.
        reason: String,
    },
    /// The machine could not do what it was told.
    #[error("{0}")]
    Failed(String),
}
