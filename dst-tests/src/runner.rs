//! Running clauses under many seeds on all cores.

use crate::{
    plan::{Ignored, Plan},
    record::RunRecord,
    seeds::Seeds,
    shard::Shard,
    summary::{Failure, Summary},
    target::{Detail, RunReport, Target},
};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

/// Of how many failures a session that records keeps the record.
const RECORDED_FAILURES: usize = 30;
/// How long second runs may take in all, beyond what the last takes.
const SECOND_RUNS: Duration = Duration::from_secs(600);

/// What is to be run, and how.
#[derive(Clone, Debug)]
pub struct Session {
    /// The target.
    pub target: Arc<dyn Target>,
    /// Its clauses.
    pub plan: Plan,
    /// The seeds, each for every clause.
    pub seeds: Seeds,
    /// How many runs go on at a time; the target may set a lower limit.
    pub jobs: usize,
    /// Runs everything twice and compares the fingerprints.
    pub twice: bool,
    /// Runs only this part.
    pub shard: Shard,
    /// Keeps what happened in the runs that break a promise, up to 30 of them: on a deterministic target by running them
    /// again, so that nothing is slower while promises are kept.
    pub record: bool,
    /// Ends the session early once it is set.
    pub interrupt: Arc<AtomicBool>,
}

/// How far a session is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Runs that have ended.
    pub done: u64,
    /// Runs in all.
    pub all: u64,
    /// Of those that have ended, how many broke a promise.
    pub failed: u64,
    /// The run that has just ended, if one has.
    pub last: Option<LastRun>,
}

/// A run that has ended.
#[derive(Clone, Copy, Debug)]
pub struct LastRun {
    /// The clause's id.
    pub clause: &'static str,
    /// The seed.
    pub seed: u64,
    /// How long it took, in real time.
    pub took: Duration,
    /// Whether the promise was broken.
    pub failed: bool,
}

impl Session {
    /// Plans to run `plan` on `target`, as many runs at a time as the target allows, or one on every core.
    #[must_use]
    pub fn new(target: Arc<dyn Target>, plan: Plan, seeds: Seeds) -> Self {
        let jobs = target.parallel_runs().unwrap_or_else(cores);
        let (shard, interrupt) = (Shard::WHOLE, Arc::default());
        Self { target, plan, seeds, jobs, twice: false, shard, record: false, interrupt }
    }

    /// Counts the runs.
    #[must_use]
    pub fn runs(&self) -> u64 {
        self.shard.runs(self.seeds, self.clauses())
    }

    /// Runs everything, and calls `on_progress` after every run, and now and then between them.
    pub fn run(&self, on_progress: &mut dyn FnMut(Progress)) -> Summary {
        let began = Instant::now();
        let ignored = self.plan.ignored.iter();
        let ignored = ignored.map(|Ignored { clause, reason }| (*clause, reason.as_str()));
        let mut summary = Summary::new(&*self.target, self.seeds, &self.plan.clauses, ignored);
        summary.twice = self.twice;
        summary.shard = self.shard;
        self.pool().drain(self, &mut summary, on_progress);
        summary.interrupted = summary.items < self.runs();
        summary.seconds = began.elapsed().as_secs_f64();
        summary.sort_failures();
        if self.record {
            self.record_failures(&mut summary);
        }
        summary
    }

    fn clauses(&self) -> u64 {
        u64::try_from(self.plan.clauses.len()).unwrap_or(u64::MAX)
    }

    /// Puts a record beside failures that have none.
    fn record_failures(&self, summary: &mut Summary) {
        let began = Instant::now();
        let ranked = summary.ranked_failures().into_iter().take(RECORDED_FAILURES);
        let chosen: Vec<_> = ranked.map(|failure| (failure.clause, failure.seed)).collect();
        let mut recorded = Vec::new();
        for failure in &mut summary.failures {
            if !chosen.contains(&(failure.clause, failure.seed)) {
                // Of more than are shown, only the text is kept.
                failure.record = None;
            } else if failure.record.is_none() {
                recorded.push(failure);
            }
        }
        for failure in recorded {
            let interrupted = self.interrupt.load(Ordering::Relaxed);
            if interrupted || began.elapsed() > SECOND_RUNS {
                return;
            }
            let clause = self.plan.clauses.iter().find(|clause| clause.id == failure.clause);
            failure.record =
                clause.map(|clause| RunRecord::of_second_run(&self.target, clause, failure.seed));
        }
    }

    fn add_to(&self, summary: &mut Summary, item: Item, reports: &[RunReport], took: Duration) {
        let clause = (item.clause, self.plan.clauses[item.clause]);
        summary.add(&*self.target, clause, item.seed, reports, took);
    }

    fn pool(&self) -> Pool {
        let work = Arc::new(Work { session: self.clone(), next: AtomicU64::new(0) });
        let limit = self.target.parallel_runs().unwrap_or(usize::MAX);
        let most = usize::try_from(self.runs()).unwrap_or(usize::MAX);
        let jobs = self.jobs.min(limit).min(most);
        let (send, receive) = mpsc::channel();
        let mut pool = Pool { work, send, receive, workers: Vec::new() };
        (0..jobs).for_each(|_| pool.hire());
        pool
    }
}

/// Counts the cores that this process may use.
#[must_use]
pub fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// What the workers share.
struct Work {
    session: Session,
    next: AtomicU64,
}

/// A run: the index of the clause and the seed.
#[derive(Clone, Copy)]
struct Item {
    clause: usize,
    seed: u64,
}

impl Work {
    fn take(&self) -> Option<Item> {
        if self.session.interrupt.load(Ordering::Relaxed) {
            return None;
        }
        let session = &self.session;
        let clauses = session.clauses();
        let all = session.seeds.count.saturating_mul(clauses);
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= all {
                return None;
            }
            // All clauses of a seed before the next seed, so that what an interrupted session ran is even.
            let (seed, clause) = (index / clauses, index % clauses);
            if session.shard.has(seed, clause) {
                let clause = usize::try_from(clause).ok()?;
                return Some(Item { clause, seed: session.seeds.at(seed) });
            }
        }
    }

    fn run(&self, item: Item) -> Vec<RunReport> {
        let times = if self.session.twice { 2 } else { 1 };
        let clause = self.session.plan.clauses[item.clause];
        let target = &self.session.target;
        let detail = match self.session.record {
            true if !target.is_deterministic() => Detail::Record,
            _ => Detail::Fingerprint,
        };
        let run = |_| {
            let mut report = target.run(clause, item.seed, detail);
            if report.broken.is_none() {
                report.timeline = Vec::new();
            }
            report
        };
        (0..times).map(run).collect()
    }
}

/// What a worker does now, so that one that is stuck can be told.
#[derive(Default)]
struct Desk {
    busy: Mutex<Option<(Item, Instant)>>,
    dismissed: AtomicBool,
}

enum Message {
    Done { worker: usize, item: Item, reports: Vec<RunReport>, took: Duration },
    Left { worker: usize },
}

struct Pool {
    work: Arc<Work>,
    send: mpsc::Sender<Message>,
    receive: mpsc::Receiver<Message>,
    workers: Vec<(Arc<Desk>, bool)>,
}

impl Pool {
    fn hire(&mut self) {
        let worker = self.workers.len();
        let desk = Arc::new(Desk::default());
        self.workers.push((desk.clone(), true));
        let (work, send) = (self.work.clone(), self.send.clone());
        let body = move || {
            while !desk.dismissed.load(Ordering::Relaxed) {
                let Some(item) = work.take() else { break };
                let began = Instant::now();
                desk.set(Some((item, began)));
                let reports = work.run(item);
                desk.set(None);
                let took = began.elapsed();
                if send.send(Message::Done { worker, item, reports, took }).is_err() {
                    return;
                }
            }
            let _ = send.send(Message::Left { worker });
        };
        let spawned = thread::Builder::new().name("contract".to_owned()).spawn(body);
        if spawned.is_err() {
            self.workers[worker].1 = false;
        }
    }

    fn drain(
        mut self,
        session: &Session,
        summary: &mut Summary,
        on_progress: &mut dyn FnMut(Progress),
    ) {
        let all = session.runs();
        while self.workers.iter().any(|(_, present)| *present) {
            let mut last = None;
            match self.receive.recv_timeout(Duration::from_millis(250)) {
                Ok(Message::Done { worker, item, reports, took }) => {
                    // What a worker says after it was given up has been counted already.
                    if self.workers[worker].1 {
                        let failed_before = summary.failed;
                        session.add_to(summary, item, &reports, took);
                        let clause = session.plan.clauses[item.clause].id;
                        let failed = summary.failed > failed_before;
                        last = Some(LastRun { clause, seed: item.seed, took, failed });
                    }
                }
                Ok(Message::Left { worker }) => self.workers[worker].1 = false,
                Err(RecvTimeoutError::Timeout) => self.dismiss_stuck(session, summary),
                Err(RecvTimeoutError::Disconnected) => break,
            }
            on_progress(Progress { done: summary.items, all, failed: summary.failed, last });
        }
    }

    /// Gives up workers whose run will not end. A thread cannot be ended from outside, so it is left to spin, and
    /// another takes its place.
    fn dismiss_stuck(&mut self, session: &Session, summary: &mut Summary) {
        let patience = session.target.patience();
        for worker in 0..self.workers.len() {
            let (desk, present) = &self.workers[worker];
            let Some((item, began)) = desk.get().filter(|_| *present) else { continue };
            if began.elapsed() < patience {
                continue;
            }
            desk.dismissed.store(true, Ordering::Relaxed);
            self.workers[worker].1 = false;
            let broken =
                format!("the run did not end within {patience:?} of real time: a livelock");
            let report = RunReport { broken: Some(broken), given_up: true, ..RunReport::default() };
            session.add_to(summary, item, &[report], began.elapsed());
            self.hire();
        }
    }
}

impl Desk {
    fn set(&self, what: Option<(Item, Instant)>) {
        *self.busy.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    fn get(&self) -> Option<(Item, Instant)> {
        *self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives a failure as it is shown to people: the promise, what was seen, and the one line that replays it.
#[must_use]
pub fn failure_text(failure: &Failure) -> String {
    format!(
        "{} with seed {:#x}\n  promise: {}\n  broken:  {}\n  replay:  {}",
        failure.clause, failure.seed, failure.promise, failure.broken, failure.replay
    )
}
