//! Generated histories, held to the reference model.

use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    history::{self, Assignment},
};
use std::sync::Arc;

/// The clauses on histories.
pub(super) const CLAUSES: &[Clause] = &[GENERATED];

/// The clause that draws a script from the seed, or is given one.
pub static GENERATED_HISTORY: Clause = GENERATED;

const GENERATED: Clause = clause!(generated, "history.generated",
    "any history of operations on machines, their copies and their snapshots, at the same time, cut short or under \
     faults, goes as a small model of machines says",
    [Exec, Files], faults: [])
.undisturbed();

async fn generated(ctx: &Context) -> Verdict {
    let assignment = match ctx.assignment() {
        Some(given) => given.clone(),
        None => {
            let profile = history::profile_of(ctx);
            Arc::new(Assignment::new(history::generate::script(ctx.seed(), &profile)))
        }
    };
    let end = history::perform::perform(ctx, &assignment).await;
    end.map_err(|violation| Broken::new(violation.to_string()))
}
