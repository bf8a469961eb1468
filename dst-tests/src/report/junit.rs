//! What sessions came to, as JUnit's XML, which CI systems read.

use crate::{
    runner::failure_text,
    summary::{ClauseSummary, Summary},
};
use quick_junit::{
    NonSuccessKind, Property, Report, SerializeError, TestCase, TestCaseStatus, TestSuite,
};
use std::{borrow::Cow, time::Duration};

/// How many failures of a clause are written out.
const SHOWN_FAILURES: usize = 10;

/// Gives the document: a suite for each summary, and in it a case for each clause. A case fails with what was broken and
/// the lines that replay it, and is skipped with the reason for which the clause was left out.
///
/// Of what guests said, characters that XML has not are replaced or left out.
///
/// # Errors
/// Those of the writer.
pub fn document(summaries: &[Summary]) -> Result<String, SerializeError> {
    let mut report = Report::new("vmdst");
    report.add_test_suites(summaries.iter().map(suite));
    report.to_string()
}

fn suite(summary: &Summary) -> TestSuite {
    let mut suite = TestSuite::new(xml_text(&summary.backend));
    suite.set_time(seconds(summary.seconds));
    for (name, value) in [
        ("environment", xml_text(&summary.environment).into_owned()),
        ("first_seed", format!("{:#x}", summary.first_seed)),
        ("seeds", summary.seeds.to_string()),
        ("shard", summary.shard.to_string()),
    ] {
        suite.add_property(Property::new(name, value));
    }
    suite.add_test_cases(summary.per_clause.iter().map(|clause| case(summary, clause)));
    suite
}

fn case(summary: &Summary, clause: &ClauseSummary) -> TestCase {
    let mut case = TestCase::new(clause.id, status(summary, clause));
    case.set_classname(xml_text(&format!("{}.{}", summary.backend, clause.group)));
    case.set_time(seconds(clause.seconds));
    case
}

fn status(summary: &Summary, clause: &ClauseSummary) -> TestCaseStatus {
    let skipped = |reason: &str| {
        let mut status = TestCaseStatus::skipped();
        status.set_message(xml_text(reason));
        status
    };
    match &clause.ignored {
        Some(reason) => skipped(reason),
        None if clause.failed > 0 => failed(summary, clause),
        None if clause.runs == 0 => skipped("no run of it ended"),
        None => TestCaseStatus::success(),
    }
}

fn failed(summary: &Summary, clause: &ClauseSummary) -> TestCaseStatus {
    let ClauseSummary { id, runs, failed, .. } = clause;
    let failures: Vec<_> =
        summary.failures.iter().filter(|failure| failure.clause == *id).collect();
    let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
    let first = failures.first().map_or("what was broken was not kept", |one| one.broken.as_str());
    status.set_type("broken promise");
    status.set_message(xml_text(&format!("{failed} of {runs} runs: {first}")));
    let shown = failures.iter().take(SHOWN_FAILURES).map(|failure| failure_text(failure));
    status.set_description(xml_text(&shown.collect::<Vec<_>>().join("\n")));
    status
}

/// Replaces the two characters that XML has not and that the writer lets through; it leaves out control characters.
fn xml_text(text: &str) -> Cow<'_, str> {
    const NONE: [char; 2] = ['\u{fffe}', '\u{ffff}'];
    if text.contains(NONE) { text.replace(NONE, "\u{fffd}").into() } else { text.into() }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}
