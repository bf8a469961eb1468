//! Simulated guest programs and their registry.

use super::{applets::Applet, syscalls::Syscalls, tree::BaseImage};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};
use std::{
    collections::BTreeMap,
    fmt,
    marker::PhantomData,
    sync::{Arc, OnceLock},
    time::Duration,
};

/// A simulated guest program: a state machine that the guest's scheduler steps. Its whole state is its value, so
/// that snapshot, restore and fork capture a running process exactly.
pub trait GuestProgram: Clone + Serialize + DeserializeOwned + Send + 'static {
    /// Goes on until there is nothing to do for now.
    ///
    /// A call that cannot be carried out yet fails with `AGAIN`; answer it with [`Step::Block`] and try again in
    /// the next step.
    fn step(&mut self, sys: &mut Syscalls<'_>) -> Step;

    /// Hears a signal that was caught with [`Syscalls::catch_signal`]. What the program was blocked on is given
    /// up, and `step` comes next.
    fn signal(&mut self, sys: &mut Syscalls<'_>, signal: u8) {
        let _ = (sys, signal);
    }
}

/// What a program wants after a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// To be stepped again.
    Continue,
    /// To be stepped when one of these has come.
    Block(WaitFor),
    /// To end with this code.
    Exit(u8),
}

/// What a blocked program waits for; any one of its parts ends the wait. With no part it waits for a signal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitFor {
    pub(super) readable: Vec<u32>,
    pub(super) writable: Vec<u32>,
    pub(super) child: bool,
    pub(super) until: Option<Duration>,
}

impl WaitFor {
    /// Waits for a signal alone.
    #[must_use]
    pub fn signal() -> Self {
        Self::default()
    }

    /// Waits until a descriptor has bytes, its end or an error.
    #[must_use]
    pub fn readable(fd: u32) -> Self {
        Self::default().or_readable(fd)
    }

    /// Waits until a descriptor takes bytes.
    #[must_use]
    pub fn writable(fd: u32) -> Self {
        Self::default().or_writable(fd)
    }

    /// Waits until a child has ended.
    #[must_use]
    pub fn child() -> Self {
        Self { child: true, ..Self::default() }
    }

    /// Waits until the guest's monotonic clock shows this.
    #[must_use]
    pub fn until(time: Duration) -> Self {
        Self { until: Some(time), ..Self::default() }
    }

    /// Waits for a descriptor to be readable too.
    #[must_use]
    pub fn or_readable(mut self, fd: u32) -> Self {
        self.readable.push(fd);
        self
    }

    /// Waits for a descriptor to be writable too.
    #[must_use]
    pub fn or_writable(mut self, fd: u32) -> Self {
        self.writable.push(fd);
        self
    }

    /// Waits for a child's end too.
    #[must_use]
    pub fn or_child(mut self) -> Self {
        self.child = true;
        self
    }

    /// Waits for a time too.
    #[must_use]
    pub fn or_until(mut self, time: Duration) -> Self {
        self.until = Some(self.until.map_or(time, |other| other.min(time)));
        self
    }
}

type Start = Arc<dyn Fn(&[String]) -> Box<dyn AnyProgram> + Send + Sync>;
type Decode = fn(&[u8]) -> Result<Box<dyn AnyProgram>, postcard::Error>;

/// The programs that a guest has beside the built-in commands.
#[derive(Clone, Default)]
pub struct ProgramRegistry {
    programs: BTreeMap<Arc<str>, Registered>,
    base: OnceLock<Arc<BaseImage>>,
}

#[derive(Clone)]
struct Registered {
    start: Start,
    decode: Decode,
}

impl ProgramRegistry {
    /// Makes a registry with no program but the built-in commands.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a program at an absolute path of every guest; `start` makes its first state out of the arguments, the
    /// program's own name first. A later registration at the same path replaces an earlier one.
    pub fn register<P: GuestProgram>(&mut self, path: &str, start: fn(&[String]) -> P) {
        self.base = OnceLock::new();
        self.programs.insert(
            path.into(),
            Registered {
                start: Arc::new(move |argv| Box::new(Typed(start(argv)))),
                decode: |bytes| Ok(Box::new(Typed(postcard::from_bytes::<P>(bytes)?))),
            },
        );
    }

    /// Lists the paths of the registered programs.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.programs.keys().map(|path| &**path)
    }

    pub(super) fn base(&self) -> Arc<BaseImage> {
        if self.programs.is_empty() {
            static PLAIN: OnceLock<Arc<BaseImage>> = OnceLock::new();
            return Arc::clone(PLAIN.get_or_init(|| Arc::new(BaseImage::build(&[]))));
        }
        let build = || {
            let paths: Vec<_> = self.programs.keys().map(ToString::to_string).collect();
            Arc::new(BaseImage::build(&paths))
        };
        Arc::clone(self.base.get_or_init(build))
    }

    pub(super) fn contains(&self, path: &str) -> bool {
        self.programs.contains_key(path)
    }

    /// Gives the registry with just the programs of a base image, so that saving again writes the same.
    pub(super) fn narrowed_to(self: Arc<Self>, base: &Arc<BaseImage>) -> Arc<Self> {
        if self.programs.len() == base.programs().len() {
            return self;
        }
        let keep = |path: &Arc<str>| base.programs().iter().any(|kept| **kept == **path);
        let programs = self.programs.iter().filter(|(path, _)| keep(path));
        let programs = programs.map(|(path, it)| (Arc::clone(path), it.clone())).collect();
        Arc::new(Self { programs, base: OnceLock::from(Arc::clone(base)) })
    }

    pub(super) fn start(&self, key: &str, argv: &[String]) -> Option<ProgramSlot> {
        if let Some((path, program)) = self.programs.get_key_value(key) {
            return Some(ProgramSlot::Registered {
                key: Arc::clone(path),
                program: (program.start)(argv),
            });
        }
        Applet::start(key, argv).map(|applet| ProgramSlot::Applet(Box::new(applet)))
    }

    /// Turns a decoded slot into a running one, or names the program that is missing or refuses its state.
    pub(super) fn revive(&self, slot: &mut ProgramSlot) -> Result<(), ReviveError> {
        if let ProgramSlot::Saved { key, state } = slot {
            let Some((path, program)) = self.programs.get_key_value(&**key) else {
                return Err(ReviveError::Unknown(key.to_string()));
            };
            let program = (program.decode)(state)
                .map_err(|error| ReviveError::Malformed(key.to_string(), error))?;
            *slot = ProgramSlot::Registered { key: Arc::clone(path), program };
        }
        Ok(())
    }
}

pub(super) enum ReviveError {
    Unknown(String),
    Malformed(String, postcard::Error),
}

impl fmt::Debug for ProgramRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.programs.keys()).finish()
    }
}

/// A program behind a pointer.
pub(super) trait AnyProgram: Send {
    fn step(&mut self, sys: &mut Syscalls<'_>) -> Step;
    fn signal(&mut self, sys: &mut Syscalls<'_>, signal: u8);
    fn encode(&self) -> Result<Vec<u8>, postcard::Error>;
    fn boxed_clone(&self) -> Box<dyn AnyProgram>;
}

struct Typed<P>(P);

impl<P: GuestProgram> AnyProgram for Typed<P> {
    fn step(&mut self, sys: &mut Syscalls<'_>) -> Step {
        self.0.step(sys)
    }

    fn signal(&mut self, sys: &mut Syscalls<'_>, signal: u8) {
        self.0.signal(sys, signal);
    }

    fn encode(&self) -> Result<Vec<u8>, postcard::Error> {
        postcard::to_allocvec(&self.0)
    }

    fn boxed_clone(&self) -> Box<dyn AnyProgram> {
        Box::new(Self(self.0.clone()))
    }
}

/// What a process runs.
#[derive(Default)]
pub(super) enum ProgramSlot {
    /// Nothing: it has ended, or it is being stepped just now.
    #[default]
    Empty,
    /// A built-in command.
    Applet(Box<Applet>),
    /// A registered program.
    Registered { key: Arc<str>, program: Box<dyn AnyProgram> },
    /// A registered program that was decoded and not yet looked up.
    Saved { key: Arc<str>, state: Vec<u8> },
}

impl ProgramSlot {
    pub(super) fn step(&mut self, sys: &mut Syscalls<'_>) -> Step {
        match self {
            Self::Applet(applet) => applet.step(sys),
            Self::Registered { program, .. } => program.step(sys),
            Self::Empty | Self::Saved { .. } => Step::Exit(127),
        }
    }

    pub(super) fn signal(&mut self, sys: &mut Syscalls<'_>, signal: u8) {
        match self {
            Self::Applet(applet) => applet.signal(sys, signal),
            Self::Registered { program, .. } => program.signal(sys, signal),
            Self::Empty | Self::Saved { .. } => {}
        }
    }
}

impl Clone for ProgramSlot {
    fn clone(&self) -> Self {
        match self {
            Self::Empty => Self::Empty,
            Self::Applet(applet) => Self::Applet(applet.clone()),
            Self::Registered { key, program } => {
                Self::Registered { key: Arc::clone(key), program: program.boxed_clone() }
            }
            Self::Saved { key, state } => {
                Self::Saved { key: Arc::clone(key), state: state.clone() }
            }
        }
    }
}

impl fmt::Debug for ProgramSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("Empty"),
            Self::Applet(applet) => f.debug_tuple("Applet").field(applet).finish(),
            Self::Registered { key, .. } | Self::Saved { key, .. } => {
                f.debug_tuple("Registered").field(key).finish()
            }
        }
    }
}

/// How a slot is encoded.
#[derive(Serialize, Deserialize)]
enum Encoded<'a> {
    Empty,
    Applet(AppletRef<'a>),
    Registered(Arc<str>, Vec<u8>),
}

/// An applet that is borrowed when encoded and owned when decoded.
enum AppletRef<'a> {
    Borrowed(&'a Applet),
    Owned(Box<Applet>, PhantomData<&'a ()>),
}

impl Serialize for AppletRef<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Borrowed(applet) => applet.serialize(serializer),
            Self::Owned(applet, _) => applet.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for AppletRef<'_> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Box::<Applet>::deserialize(deserializer).map(|applet| Self::Owned(applet, PhantomData))
    }
}

impl Serialize for ProgramSlot {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Empty => Encoded::Empty,
            Self::Applet(applet) => Encoded::Applet(AppletRef::Borrowed(applet)),
            Self::Registered { key, program } => Encoded::Registered(
                Arc::clone(key),
                program.encode().map_err(serde::ser::Error::custom)?,
            ),
            Self::Saved { key, state } => Encoded::Registered(Arc::clone(key), state.clone()),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ProgramSlot {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match Encoded::deserialize(deserializer)? {
            Encoded::Empty | Encoded::Applet(AppletRef::Borrowed(_)) => Self::Empty,
            Encoded::Applet(AppletRef::Owned(applet, _)) => Self::Applet(applet),
            Encoded::Registered(key, state) => Self::Saved { key, state },
        })
    }
}
