//! Making a failing script small: operations, arguments and faults together.
//!
//! A script is data, and any part of a script is a script, so shrinking needs neither the strategies that drew it nor the
//! backend that failed: it tries smaller scripts, largest cuts first, and keeps those that fail in the same way.

use super::script::{Act, Call, Program, Script, Step};
use std::time::{Duration, Instant};

/// What shrinking came to.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// The smallest script found that fails.
    pub script: Script,
    /// How many scripts were tried.
    pub tried: u64,
    /// Whether nothing smaller was left to try.
    pub is_minimal: bool,
    /// How long it took.
    pub took: Duration,
}

/// Makes `script` smaller as long as `fails` says that what is left fails as it did, within a time.
pub fn shrink(script: &Script, limit: Duration, fails: &mut dyn FnMut(&Script) -> bool) -> Shrunk {
    let began = Instant::now();
    let mut search =
        Search { best: script.clone(), tried: 0, deadline: began.checked_add(limit), fails };
    let mut is_minimal = false;
    while !search.is_late() {
        let before = search.best.clone();
        search.cut_steps();
        search.cut_calls();
        search.simplify();
        if search.best == before {
            is_minimal = !search.is_late();
            break;
        }
    }
    Shrunk { script: search.best, tried: search.tried, is_minimal, took: began.elapsed() }
}

struct Search<'a> {
    best: Script,
    tried: u64,
    deadline: Option<Instant>,
    fails: &'a mut dyn FnMut(&Script) -> bool,
}

impl Search<'_> {
    fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    fn try_steps(&mut self, steps: Vec<Step>) -> bool {
        if self.is_late() || steps == self.best.steps {
            return false;
        }
        self.tried += 1;
        let script = Script { seed: self.best.seed, steps };
        let fails = (self.fails)(&script);
        if fails {
            self.best = script;
        }
        fails
    }

    /// Takes out stretches of steps, from halves down to single ones.
    fn cut_steps(&mut self) {
        let mut length = self.best.steps.len().div_ceil(2);
        while length > 0 {
            let mut end = self.best.steps.len();
            // From the end on: what comes late depends on what came early.
            while end > 0 {
                let start = end.saturating_sub(length);
                let mut steps = self.best.steps.clone();
                steps.drain(start..end.min(steps.len()));
                self.try_steps(steps);
                end = start.min(self.best.steps.len());
            }
            length /= 2;
        }
    }

    /// Takes calls out of those at the same time.
    fn cut_calls(&mut self) {
        for index in 0..self.best.steps.len() {
            let mut at = 0;
            while let Some(Step::Together(calls)) = self.best.steps.get(index)
                && at < calls.len()
            {
                let mut calls = calls.clone();
                calls.remove(at);
                let step = match calls.len() {
                    1 => Step::Do(Call { after_ms: 0, ..calls.remove(0) }),
                    _ => Step::Together(calls),
                };
                if !self.replace(index, step) {
                    at += 1;
                }
            }
        }
    }

    /// Puts simpler arguments in place of others.
    fn simplify(&mut self) {
        for index in 0..self.best.steps.len() {
            while let Some(step) = self.best.steps.get(index)
                && !self.is_late()
            {
                let simpler = simpler_steps(step);
                if !simpler.into_iter().any(|step| self.replace(index, step)) {
                    break;
                }
            }
        }
    }

    fn replace(&mut self, index: usize, step: Step) -> bool {
        let mut steps = self.best.steps.clone();
        if let Some(old) = steps.get_mut(index) {
            *old = step;
        }
        self.try_steps(steps)
    }
}

/// Lists simpler steps; every one is smaller by an order that ends.
fn simpler_steps(step: &Step) -> Vec<Step> {
    match step {
        Step::Do(call) => simpler_calls(call).into_iter().map(Step::Do).collect(),
        Step::Together(calls) => {
            let at = |index: usize| {
                let simpler = simpler_calls(&calls[index]).into_iter();
                simpler.map(move |call| {
                    let mut calls = calls.clone();
                    calls[index] = call;
                    Step::Together(calls)
                })
            };
            (0..calls.len()).flat_map(at).collect()
        }
        Step::Fault(fault) => {
            let mut simpler = Vec::new();
            if fault.amount_ms.is_some() {
                simpler.push(Step::Fault(super::script::Disturbance { amount_ms: None, ..*fault }));
            }
            if fault.skip > 0 {
                simpler.push(Step::Fault(super::script::Disturbance { skip: 0, ..*fault }));
            }
            simpler
        }
    }
}

fn simpler_calls(call: &Call) -> Vec<Call> {
    let mut simpler = Vec::new();
    if call.drop_after_us.is_some() {
        simpler.push(Call { drop_after_us: None, ..call.clone() });
    }
    if call.after_ms > 0 {
        simpler.push(Call { after_ms: 0, ..call.clone() });
    }
    simpler.extend(simpler_acts(&call.act).into_iter().map(|act| Call { act, ..call.clone() }));
    simpler
}

fn simpler_acts(act: &Act) -> Vec<Act> {
    let mut simpler = Vec::new();
    match act {
        Act::Write { path, text, times, mode } => {
            let with = |text: String, times, mode| {
                let path = path.clone();
                Act::Write { path, text, times, mode }
            };
            if mode.is_some() {
                simpler.push(with(text.clone(), *times, None));
            }
            let texts = simpler_texts(text, *times).into_iter();
            simpler.extend(texts.map(|(text, times)| with(text, times, *mode)));
        }
        Act::Exchange { port, text, times } => {
            let texts = simpler_texts(text, *times).into_iter();
            simpler.extend(texts.map(|(text, times)| Act::Exchange { port: *port, text, times }));
        }
        Act::Exec { program, timeout_ms, output_limit } if output_limit.is_some() => {
            let (program, timeout_ms) = (program.clone(), *timeout_ms);
            simpler.push(Act::Exec { program, timeout_ms, output_limit: None });
        }
        Act::Exec { program: Program::Mirror { text, times }, timeout_ms, output_limit } => {
            let texts = simpler_texts(text, *times).into_iter();
            simpler.extend(texts.map(|(text, times)| Act::Exec {
                program: Program::Mirror { text, times },
                timeout_ms: *timeout_ms,
                output_limit: *output_limit,
            }));
        }
        Act::Reap { process, signal } if *signal != 9 => {
            simpler.push(Act::Reap { process: *process, signal: 9 });
        }
        Act::Spawn { process, nonce } if *nonce > 0 => {
            simpler.push(Act::Spawn { process: *process, nonce: 0 });
        }
        Act::Stop { grace_ms, signal } if (*grace_ms, *signal) != (0, 15) => {
            simpler.push(Act::Kill);
            simpler.push(Act::Stop { grace_ms: 0, signal: 15 });
        }
        Act::Stop { .. } => simpler.push(Act::Kill),
        Act::Snapshot { into, tracked, base } => {
            if base.is_some() {
                simpler.push(Act::Snapshot { into: *into, tracked: *tracked, base: None });
            } else if *tracked {
                simpler.push(Act::Snapshot { into: *into, tracked: false, base: None });
            }
        }
        Act::Restore { from, resume: false } => {
            simpler.push(Act::Restore { from: *from, resume: true });
        }
        Act::Revive { from, resume: false } => {
            simpler.push(Act::Revive { from: *from, resume: true });
        }
        Act::Fork { into } if into.len() > 1 => {
            simpler.extend((0..into.len()).map(|left| {
                let mut into = into.clone();
                into.remove(left);
                Act::Fork { into }
            }));
        }
        Act::MakeDir { path, recursive, mode } => {
            let with = |recursive, mode| Act::MakeDir { path: path.clone(), recursive, mode };
            simpler.extend(recursive.then(|| with(false, *mode)));
            simpler.extend(mode.map(|_| with(*recursive, None)));
        }
        Act::Remove { path, recursive: true } => {
            simpler.push(Act::Remove { path: path.clone(), recursive: false });
        }
        Act::Spoil { from, at } if *at > 0 => simpler.push(Act::Spoil { from: *from, at: 0 }),
        _ => {}
    }
    simpler
}

/// Lists texts that are shorter than this one times over.
fn simpler_texts(text: &str, times: u32) -> Vec<(String, u32)> {
    let mut simpler = Vec::new();
    if times > 1 {
        simpler.extend([1, times / 2, times - 1].map(|times| (text.to_owned(), times)));
    }
    if text.len() > 1 {
        simpler.push(("x".to_owned(), times));
    }
    simpler
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::generate::{self, Profile};
    use vm_core::fault::FaultKind;
    use vm_trait::Capabilities;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn what_matters_is_all_that_is_left() {
        let profile = Profile::of(Capabilities::all(), FaultKind::ALL.to_vec(), true);
        let mut shrunk = 0;
        for seed in 0..100 {
            let script = generate::script(seed, &profile);
            // It fails where a pause comes before a write.
            let mut fails = |script: &Script| {
                let calls: Vec<_> = script.steps.iter().flat_map(Step::calls).collect();
                let pause = calls.iter().position(|call| call.act == Act::Pause);
                let write = calls.iter().rposition(|call| matches!(call.act, Act::Write { .. }));
                pause.zip(write).is_some_and(|(pause, write)| pause < write)
            };
            if fails(&script) {
                let found = shrink(&script, MINUTE, &mut fails);
                assert_eq!(found.script.size(), 2, "{:?}", found.script);
                assert!(found.is_minimal);
                let calls: Vec<_> = found.script.steps.iter().flat_map(Step::calls).collect();
                assert!(
                    matches!(&calls[1].act, Act::Write { text, times: 0 | 1, .. } if text.len() <= 1)
                );
                shrunk += 1;
            }
        }
        assert!(shrunk > 10, "{shrunk} of the scripts fail");
    }

    #[test]
    fn no_time_leaves_the_script_as_it_is() {
        let profile = Profile::of(Capabilities::all(), Vec::new(), true);
        let script = generate::script(1, &profile);
        let shrunk = shrink(&script, Duration::ZERO, &mut |_| true);
        assert_eq!((shrunk.script, shrunk.is_minimal), (script, false));
    }
}
