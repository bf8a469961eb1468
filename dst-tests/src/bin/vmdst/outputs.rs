//! The files that a report is written to.

use crate::{Problem, write_json};
use std::{
    fmt::Display,
    fs,
    path::{Path, PathBuf},
};
use vm_dst::{
    report::{html, junit},
    summary::Summary,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Outputs {
    /// Writes what came of it to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Writes what came of it to this file, as one page with a timeline of each failure
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Writes what came of it to this file, as JUnit's XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
}

impl Outputs {
    /// Says whether what happened in runs that break a promise will be shown.
    pub(crate) fn wants_records(&self) -> bool {
        self.report.is_some()
    }

    /// Writes all that were asked for.
    pub(crate) fn write(&self, summaries: &[Summary]) -> Result<(), Problem> {
        if let Some(path) = &self.json {
            match summaries {
                [summary] => write_json(path, summary)?,
                _ => write_json(path, &summaries)?,
            }
        }
        if let Some(path) = &self.report {
            write(path, html::page(summaries))?;
        }
        if let Some(path) = &self.junit {
            write(path, junit::document(summaries))?;
        }
        Ok(())
    }
}

fn write(path: &Path, text: Result<String, impl Display>) -> Result<(), Problem> {
    let fail = |error: &dyn Display| Problem::failed(format!("{}: {error}", path.display()));
    let text = text.map_err(|error| fail(&error))?;
    fs::write(path, text).map_err(|error| fail(&error))
}
