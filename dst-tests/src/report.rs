//! What a session came to: here as text for people, below as a page and as XML for CI systems.

use crate::{
    runner::failure_text,
    shard::Shard,
    summary::{ClauseSummary, Summary},
};
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use std::collections::BTreeMap;
use vm_core::fault::FaultKind;

pub mod html;
pub mod junit;

/// How many failures are shown.
const SHOWN_FAILURES: usize = 20;
/// How many kinds of fault are named in a row of the table of groups.
const NAMED_KINDS: usize = 3;

/// Gives the whole report, but for its last line.
#[must_use]
pub fn text(summary: &Summary, width: Option<u16>) -> String {
    let mut parts = vec![groups(summary, width)];
    if summary.faults_fired.values().any(|times| *times > 0) {
        parts.push(faults(summary, width));
    }
    let never: Vec<_> = summary.faults_never_fired().map(FaultKind::name).collect();
    if !never.is_empty() {
        parts.push(format!("faults that never happened: {}", never.join(", ")));
    }
    parts.extend(left_out(summary));
    parts.extend(failures(summary));
    if summary.twice {
        let Summary { seeds, differing, .. } = summary;
        parts.push(format!("{seeds} seeds run twice: {differing} differing fingerprints"));
    }
    if summary.shard != Shard::WHOLE {
        let (shard, seeds) = (summary.shard, summary.seeds);
        parts.push(format!("shard {shard} of the runs under {seeds} seeds"));
    }
    if summary.interrupted {
        let Summary { runs, seconds, .. } = summary;
        parts.push(format!("interrupted after {runs} runs in {seconds:.1} s"));
    }
    parts.join("\n")
}

/// Gives the table of clause groups.
#[must_use]
pub fn groups(summary: &Summary, width: Option<u16>) -> String {
    let mut groups: Vec<(&str, Group)> = Vec::new();
    for clause in &summary.per_clause {
        match groups.iter_mut().find(|(name, _)| *name == clause.group) {
            Some((_, group)) => group.add(clause),
            None => {
                let mut group = Group::default();
                group.add(clause);
                groups.push((clause.group, group));
            }
        }
    }
    let header = ["group", "clauses", "runs", "failed", "ignored", "faults fired"];
    let mut table = table(&header, width);
    for (name, group) in groups {
        table.add_row([
            Cell::new(name),
            number(group.clauses),
            number(group.runs),
            number(group.failed),
            number(group.ignored),
            Cell::new(in_short(&group.faults)),
        ]);
    }
    table.to_string()
}

#[derive(Default)]
struct Group {
    clauses: u64,
    runs: u64,
    failed: u64,
    ignored: u64,
    faults: BTreeMap<FaultKind, u64>,
}

impl Group {
    fn add(&mut self, clause: &ClauseSummary) {
        match clause.ignored {
            Some(_) => self.ignored += 1,
            None => self.clauses += 1,
        }
        self.runs += clause.runs;
        self.failed += clause.failed;
        for (kind, times) in &clause.faults_fired {
            *self.faults.entry(*kind).or_default() += times;
        }
    }
}

fn faults(summary: &Summary, width: Option<u16>) -> String {
    let mut table = table(&["fault", "fired"], width);
    for (kind, times) in &summary.faults_fired {
        table.add_row([Cell::new(kind.name()), number(*times)]);
    }
    table.to_string()
}

/// Names the most frequent kinds and counts the others.
fn in_short(faults: &BTreeMap<FaultKind, u64>) -> String {
    let mut fired: Vec<_> = faults.iter().filter(|(_, times)| **times > 0).collect();
    fired.sort_by_key(|(kind, times)| (std::cmp::Reverse(**times), **kind));
    let named = fired.iter().take(NAMED_KINDS);
    let mut text =
        named.map(|(kind, times)| format!("{kind} {times}")).collect::<Vec<_>>().join(", ");
    let others = fired.get(NAMED_KINDS..).unwrap_or_default();
    if !others.is_empty() {
        let times: u64 = others.iter().map(|(_, times)| **times).sum();
        text += &format!(", {} other kinds {times}", others.len());
    }
    text
}

/// Lists what was left out, one line for each reason.
fn left_out(summary: &Summary) -> Vec<String> {
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for clause in &summary.per_clause {
        if let Some(reason) = &clause.ignored {
            reasons.entry(reason).or_default().push(clause.id);
        }
    }
    let line = |(reason, ids): (&str, Vec<&str>)| format!("ignored: {reason}: {}", ids.join(", "));
    reasons.into_iter().map(line).collect()
}

fn failures(summary: &Summary) -> Vec<String> {
    let shown = summary.ranked_failures().into_iter().take(SHOWN_FAILURES);
    let mut lines: Vec<_> =
        shown.map(|failure| format!("FAILED {}", failure_text(failure))).collect();
    let more = summary.failed.saturating_sub(lines.len().try_into().unwrap_or(u64::MAX));
    if more > 0 && !lines.is_empty() {
        lines.push(format!("and {more} more failed runs"));
    }
    lines
}

fn table(header: &[&str], width: Option<u16>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(header.to_vec());
    if let Some(width) = width {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    }
    table
}

fn number(value: u64) -> Cell {
    Cell::new(value).set_alignment(CellAlignment::Right)
}
