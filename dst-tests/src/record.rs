//! What is kept of a run that broke a promise: its timeline, bounded.

use crate::{
    clause::Clause,
    target::{Detail, RunReport, Target},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::VecDeque,
    sync::{Arc, mpsc},
    thread,
};
use vm_core::timeline::{Mark, TimelineLine};

/// How many lines of the beginning and of the end of a run are kept.
const FIRST_LINES: usize = 1000;
const LAST_LINES: usize = 3000;
/// How many bytes of a line's text are kept.
const TEXT_BYTES: usize = 1000;

/// What is kept of a run that broke a promise.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RunRecord {
    /// What happened; at most 4,001 lines, the remark on a gap among them. Empty where the target writes nothing down.
    pub lines: Vec<TimelineLine>,
    /// Where it comes from a second run of the seed: what that one broke, or why there is nothing of it.
    pub second: Option<SecondRun>,
}

/// What a second run of a seed came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", content = "broken", rename_all = "snake_case")]
pub enum SecondRun {
    /// It kept the promise, which the first run broke.
    Kept,
    /// It broke it too, and says how.
    Broken(String),
    /// It did not end within the target's patience, or was not tried because the first run had not ended.
    Endless,
}

impl RunRecord {
    /// Keeps the record that a run made itself.
    #[must_use]
    pub fn of_run(lines: Vec<TimelineLine>) -> Self {
        Self { lines: bounded(lines), second: None }
    }

    /// Runs the seed again, with everything written down, frames included.
    #[must_use]
    pub fn of_second_run(target: &Arc<dyn Target>, clause: &'static Clause, seed: u64) -> Self {
        match run_patiently(target, (clause, seed), Detail::Frames) {
            Some(RunReport { broken, timeline, .. }) => {
                let second = broken.map_or(SecondRun::Kept, SecondRun::Broken);
                Self { lines: bounded(timeline), second: Some(second) }
            }
            None => Self { lines: Vec::new(), second: Some(SecondRun::Endless) },
        }
    }
}

/// Runs one clause with one seed, and gives `None` where that does not end within the target's patience.
///
/// A run that will not end cannot be ended from outside: its thread is left to spin.
#[must_use]
pub fn run_patiently(
    target: &Arc<dyn Target>,
    (clause, seed): (&'static Clause, u64),
    detail: Detail,
) -> Option<RunReport> {
    let (send, receive) = mpsc::channel();
    let (runs_on, patience) = (target.clone(), target.patience());
    thread::spawn(move || {
        // Nobody listens any more to a run that took too long.
        let _ = send.send(runs_on.run(clause, seed, detail));
    });
    receive.recv_timeout(patience).ok()
}

/// Lines of a run, of which only the first and the last are kept.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    first: Vec<TimelineLine>,
    last: VecDeque<TimelineLine>,
    left_out: u64,
}

impl Lines {
    pub(crate) fn push(&mut self, mut line: TimelineLine) {
        shorten(&mut line.text);
        if self.first.len() < FIRST_LINES {
            self.first.push(line);
            return;
        }
        if self.last.len() == LAST_LINES {
            self.last.pop_front();
            self.left_out += 1;
        }
        self.last.push_back(line);
    }

    /// Gives what was kept, with a remark where something is missing.
    pub(crate) fn take(&mut self) -> Vec<TimelineLine> {
        let Self { first: mut lines, last, left_out } = std::mem::take(self);
        if left_out > 0 {
            let at = last.front().map(|line| line.at).unwrap_or_default();
            let text = format!("{left_out} lines are left out here");
            lines.push(TimelineLine { at, vm: None, mark: Mark::Note, text });
        }
        lines.extend(last);
        lines
    }
}

/// Keeps the ends of a record that is too long; what is between frames goes on being told before frames are.
fn bounded(mut lines: Vec<TimelineLine>) -> Vec<TimelineLine> {
    if lines.len() > FIRST_LINES + LAST_LINES {
        lines.retain(|line| !matches!(line.mark, Mark::Frame { .. }));
    }
    let mut kept = Lines::default();
    lines.into_iter().for_each(|line| kept.push(line));
    kept.take()
}

fn shorten(text: &mut String) {
    if text.len() > TEXT_BYTES {
        text.truncate(text.floor_char_boundary(TEXT_BYTES));
        text.push('…');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn line(number: usize, mark: Mark) -> TimelineLine {
        let at = Duration::from_micros(u64::try_from(number).unwrap());
        TimelineLine { at, vm: None, mark, text: number.to_string() }
    }

    #[test]
    fn a_long_record_keeps_its_ends_and_says_what_is_missing() {
        let all = (0..10_000).map(|number| line(number, Mark::Stream)).collect();
        let record = RunRecord::of_run(all);
        assert_eq!(record.lines.len(), FIRST_LINES + 1 + LAST_LINES);
        assert_eq!(record.lines[0].text, "0");
        assert_eq!(record.lines[FIRST_LINES].text, "6000 lines are left out here");
        assert_eq!(record.lines.last().unwrap().text, "9999");
        assert!(record.lines.is_sorted_by_key(|line| line.at));
    }

    #[test]
    fn frames_go_first() {
        let mark = |number| match number % 100 {
            0 => Mark::Console,
            _ => Mark::Frame { sent: true },
        };
        let record = RunRecord::of_run((0..10_000).map(|it| line(it, mark(it))).collect());
        assert_eq!(record.lines.len(), 100);
        assert!(record.lines.iter().all(|line| line.mark == Mark::Console));
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let text = "é".repeat(5000);
        let record = RunRecord::of_run(vec![TimelineLine { text, ..line(0, Mark::Console) }]);
        let kept = &record.lines[0].text;
        assert!(kept.len() <= TEXT_BYTES + "…".len() && kept.ends_with("é…"));
    }
}
