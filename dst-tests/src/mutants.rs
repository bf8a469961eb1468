//! Whether the contract notices planted bugs: [`Hunt`] runs its clauses on the simulator against each of them.
//!
//! A clause that is known to catch a bug is run first; where it does not, all others are. A run that does not end counts
//! as a catch too: virtual deadlines end nearly all of them, the budget of [`vm_planted_bugs`] those that spin, and real
//! time the rest.

use crate::{
    clause::Clause,
    plan::{self, Plan},
    target::{Detail, SimTarget, Target},
};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};
use vm_planted_bugs::{Bug, NotArmed, plant};

mod catchers;
mod doc;

pub use catchers::catchers;
pub use doc::markdown;

/// How long a run may take in real time before it counts as one that will never end.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is to be hunted, and how.
#[derive(Clone, Debug)]
pub struct Hunt {
    /// The simulator, in one of its environments.
    pub target: Arc<SimTarget>,
    /// The bugs.
    pub bugs: Vec<Bug>,
    /// Up to how many seeds a bug has to hide from; the first is 0.
    pub seeds: u64,
    /// How many bugs are hunted at a time.
    pub jobs: usize,
    /// How much is run of each bug.
    pub reach: Reach,
    /// Ends the hunt early once it is set.
    pub interrupt: Arc<AtomicBool>,
}

/// How much is run of each bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The clauses that are known to catch it, up to the first catch.
    Known,
    /// Those, then all others, up to the first catch.
    FirstCatch,
    /// Every clause, so that those that catch nothing are found.
    EveryClause,
}

/// What came of one bug.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The bug's name.
    pub bug: &'static str,
    /// Where it was planted.
    pub area: &'static str,
    /// What is wrong, in one sentence.
    pub sentence: &'static str,
    /// The first catch, if there was one.
    pub caught: Option<Catch>,
    /// Every clause that caught it, where all were run; else the first.
    pub by: BTreeSet<&'static str>,
    /// How many runs there were.
    pub runs: u64,
    /// How often the bug's line was reached in them.
    pub reached: u64,
}

/// A clause that noticed a bug.
#[derive(Clone, Debug, Serialize)]
pub struct Catch {
    /// The clause's id.
    pub clause: &'static str,
    /// The seed.
    pub seed: u64,
    /// How many seeds the clause needed, this one included.
    pub seeds: u64,
    /// What it saw.
    pub broken: String,
}

/// What a hunt came to.
#[derive(Debug, Serialize)]
pub struct Bag {
    /// The bugs, in the order of the catalogue.
    pub outcomes: Vec<Outcome>,
    /// Clauses that caught no bug, where every clause was run. A bug that most clauses catch, because hardly anything goes
    /// well with it, counts for none of them.
    pub idle_clauses: Option<Vec<&'static str>>,
    /// Whether it was ended early.
    pub interrupted: bool,
    /// How long it took.
    pub seconds: f64,
}

impl Bag {
    /// Gives the bugs that no clause noticed.
    pub fn survivors(&self) -> impl Iterator<Item = &Outcome> {
        self.outcomes.iter().filter(|outcome| outcome.caught.is_none())
    }
}

impl Hunt {
    /// Hunts, and calls `on_outcome` after every bug.
    ///
    /// # Errors
    /// [`NotArmed`] where this build has no bugs in it.
    pub fn run(&self, on_outcome: &mut dyn FnMut(&Outcome)) -> Result<Bag, NotArmed> {
        drop(plant(Bug::ALL[0])?);
        let began = Instant::now();
        let clauses = Plan::of(&*self.target, &[]).clauses;
        let board = Arc::new(Board::new(self.clone(), clauses.clone()));
        let (send, receive) = mpsc::channel();
        let mut hunters: Vec<_> = (0..self.jobs.max(1)).map(|_| board.hire(&send)).collect();
        let mut outcomes = Vec::new();
        while outcomes.len() < self.bugs.len() && hunters.iter().any(|it| !it.is_gone()) {
            match receive.recv_timeout(Duration::from_millis(250)) {
                Ok(outcome) => {
                    on_outcome(&outcome);
                    outcomes.push(outcome);
                }
                Err(RecvTimeoutError::Timeout) => {
                    // A thread cannot be ended from outside: it is left to spin, and another takes its place.
                    for hunter in &mut hunters {
                        if let Some(outcome) = hunter.give_up() {
                            on_outcome(&outcome);
                            outcomes.push(outcome);
                            *hunter = board.hire(&send);
                        }
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        outcomes.extend(receive.try_iter());
        let order: BTreeMap<_, _> =
            Bug::ALL.iter().zip(0..).map(|(it, at)| (it.name(), at)).collect();
        outcomes.sort_by_key(|outcome| order.get(outcome.bug).copied());
        let idle_clauses = (self.reach == Reach::EveryClause).then(|| {
            let most = clauses.len() / 2;
            let told = outcomes.iter().filter(|outcome| outcome.by.len() <= most);
            let busy: BTreeSet<_> = told.flat_map(|it| it.by.iter().copied()).collect();
            clauses.iter().map(|clause| clause.id).filter(|id| !busy.contains(id)).collect()
        });
        let interrupted = outcomes.len() < self.bugs.len();
        Ok(Bag { outcomes, idle_clauses, interrupted, seconds: began.elapsed().as_secs_f64() })
    }
}

/// What the hunters share.
struct Board {
    hunt: Hunt,
    clauses: Vec<&'static Clause>,
    next: Mutex<usize>,
}

/// A thread that hunts, and what it is at.
struct Hunter {
    desk: Arc<Mutex<Desk>>,
    gone: Arc<AtomicBool>,
}

#[derive(Default)]
struct Desk {
    busy: Option<(Bug, &'static Clause, u64, Instant)>,
    /// Nobody waits for it any more.
    dismissed: bool,
}

impl Board {
    fn new(hunt: Hunt, clauses: Vec<&'static Clause>) -> Self {
        Self { hunt, clauses, next: Mutex::new(0) }
    }

    fn take(&self) -> Option<Bug> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let bug = self.hunt.bugs.get(*next).copied().filter(|_| !self.is_interrupted())?;
        *next += 1;
        Some(bug)
    }

    fn is_interrupted(&self) -> bool {
        self.hunt.interrupt.load(Ordering::Relaxed)
    }

    fn hire(self: &Arc<Self>, send: &mpsc::Sender<Outcome>) -> Hunter {
        let (desk, gone) = (Arc::<Mutex<Desk>>::default(), Arc::<AtomicBool>::default());
        let hunter = Hunter { desk: desk.clone(), gone: gone.clone() };
        let (board, send) = (self.clone(), send.clone());
        let body = move || {
            while let Some(bug) = board.take() {
                let Some(outcome) = board.hunt_down(bug, &desk) else { break };
                if send.send(outcome).is_err() {
                    break;
                }
            }
            gone.store(true, Ordering::Relaxed);
        };
        if thread::Builder::new().name("mutants".to_owned()).spawn(body).is_err() {
            hunter.gone.store(true, Ordering::Relaxed);
        }
        hunter
    }

    /// Runs clauses against a bug; gives nothing where that was given up.
    fn hunt_down(&self, bug: Bug, desk: &Mutex<Desk>) -> Option<Outcome> {
        let mut outcome = Outcome::of(bug);
        let known = known(bug);
        let all = self.clauses.iter().copied();
        match self.hunt.reach {
            Reach::Known => self.pursue(bug, &known, &mut outcome, desk)?,
            Reach::FirstCatch => {
                self.pursue(bug, &known, &mut outcome, desk)?;
                let others = all.filter(|clause| known.iter().all(|it| it.id != clause.id));
                self.pursue(bug, &others.collect::<Vec<_>>(), &mut outcome, desk)?;
            }
            Reach::EveryClause => self.pursue(bug, &all.collect::<Vec<_>>(), &mut outcome, desk)?,
        }
        Some(outcome)
    }

    fn pursue(
        &self,
        bug: Bug,
        clauses: &[&'static Clause],
        outcome: &mut Outcome,
        desk: &Mutex<Desk>,
    ) -> Option<()> {
        for seed in 0..self.hunt.seeds {
            for clause in clauses {
                let over = match self.hunt.reach {
                    Reach::EveryClause => outcome.by.contains(clause.id),
                    Reach::Known | Reach::FirstCatch => outcome.caught.is_some(),
                };
                if over {
                    continue;
                }
                let interrupted = self.is_interrupted();
                with(desk, |desk| {
                    desk.busy = Some((bug, clause, seed, Instant::now()));
                    (!desk.dismissed && !interrupted).then_some(())
                })?;
                let planted = plant(bug).ok()?;
                let report = self.hunt.target.run(clause, seed, Detail::Fingerprint);
                outcome.reached += planted.reached();
                drop(planted);
                with(desk, |desk| (!desk.dismissed).then(|| desk.busy = None))?;
                outcome.runs += 1;
                if let Some(broken) = report.broken {
                    outcome.note(clause, seed, broken);
                }
            }
        }
        Some(())
    }
}

impl Hunter {
    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Counts a run that will not end as a catch.
    fn give_up(&mut self) -> Option<Outcome> {
        with(&self.desk, |desk| {
            let (bug, clause, seed, began) = desk.busy.filter(|_| !desk.dismissed)?;
            if began.elapsed() < PATIENCE {
                return None;
            }
            desk.dismissed = true;
            let mut outcome = Outcome::of(bug);
            let broken =
                format!("the run did not end within {PATIENCE:?} of real time: a livelock");
            outcome.note(clause, seed, broken);
            Some(outcome)
        })
    }
}

impl Outcome {
    fn of(bug: Bug) -> Self {
        Self {
            bug: bug.name(),
            area: bug.area().name(),
            sentence: bug.sentence(),
            caught: None,
            by: BTreeSet::new(),
            runs: 0,
            reached: 0,
        }
    }

    fn note(&mut self, clause: &'static Clause, seed: u64, broken: String) {
        self.by.insert(clause.id);
        let seeds = seed + 1;
        self.caught.get_or_insert(Catch { clause: clause.id, seed, seeds, broken });
    }
}

/// Gives the clauses that are known to catch a bug.
fn known(bug: Bug) -> Vec<&'static Clause> {
    catchers(bug).iter().filter_map(|id| plan::find(id)).collect()
}

fn with<T>(desk: &Mutex<Desk>, change: impl FnOnce(&mut Desk) -> T) -> T {
    change(&mut desk.lock().unwrap_or_else(PoisonError::into_inner))
}
