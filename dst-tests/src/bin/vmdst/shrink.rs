//! `vmdst shrink`.

use crate::{Chosen, FAILED, Problem, any_number, histories, print};
use std::{path::PathBuf, time::Duration};
use vm_dst::{
    history::{Script, Trial},
    target::Detail,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The script that fails
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Where the small one is saved. Default FILE with `small` in its name
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// For how long at most, in seconds
    #[arg(long, value_name = "S", default_value = "10", value_parser = any_number)]
    seconds: u64,
    #[command(flatten)]
    chosen: Chosen,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8, Problem> {
    let Arguments { file, save, seconds, chosen } = arguments;
    let script = Script::load(file).map_err(|error| Problem::usage(error.to_string()))?;
    let target = chosen.target()?;
    target.fit().map_err(Problem::failed)?;
    let trial = Trial::of(script, &*target, Detail::Fingerprint);
    if trial.failure().is_none() {
        return Err(Problem::usage(format!(
            "{} goes well on {}: there is nothing to shrink",
            file.display(),
            target.name()
        )));
    }
    let shrunk = histories::shrink_trial(&target, &trial, Duration::from_secs(*seconds));
    let save = save.clone().unwrap_or_else(|| file.with_extension("small.json"));
    print(&histories::shrunk_text(&target, &shrunk, &save)?)?;
    Ok(FAILED)
}
