//! What changes in a simulated guest's state, told apart by pages of its bytes.

use super::PIECE;
use async_trait::async_trait;
use bytes::Bytes;
use std::collections::VecDeque;
use vm_core::{
    container::Hash,
    machine::{CaptureOrder, Captured, Generation, MachineError, SectionSink},
};
use vm_planted_bugs::{Bug, planted};

/// The section that says what a machine must be like.
pub(super) const HEADER: &str = "guest";

/// The image with the guest's state.
pub(super) const STATE: &str = "guest.state";

/// Of what size the parts are that changes are told by.
const PAGE: usize = 4096;

/// The moments from which on changes are kept track of, each with the hashes of its pages; the oldest first.
#[derive(Debug, Default)]
pub(super) struct Generations {
    next: u64,
    known: VecDeque<(Generation, Vec<Hash>)>,
}

impl Generations {
    /// Begins with a state that was just loaded.
    pub(super) fn of_loaded(bytes: &[u8]) -> Self {
        let mut generations = Self::default();
        generations.keep(bytes);
        generations
    }

    /// Takes down a state, and what of it changed.
    ///
    /// # Errors
    /// [`MachineError::Failed`] where nobody knows what changed since the generation of the order.
    pub(super) fn capture(
        &mut self,
        order: CaptureOrder,
        header: Bytes,
        state: Bytes,
    ) -> Result<CapturedGuest, MachineError> {
        let runs = match order.since {
            None => runs(&state, |_, _| true),
            Some(since) => {
                let known = self.known.iter().find(|(generation, _)| *generation == since);
                let (_, before) = known.ok_or_else(|| {
                    MachineError::Failed(format!("what changed since {since:?} is not known"))
                })?;
                let mut runs =
                    runs(&state, |number, page| before.get(number) != Some(&Hash::of(page)));
                if planted(Bug::ChangedPageIsMissed) {
                    runs.pop_back();
                }
                runs
            }
        };
        let generation = if order.track { Some(self.keep(&state)) } else { None };
        Ok(CapturedGuest { header, state, runs, generation })
    }

    fn keep(&mut self, state: &[u8]) -> Generation {
        // 0 is what was loaded.
        let generation = Generation(self.next);
        self.next += 1;
        self.known.push_back((generation, state.chunks(PAGE).map(Hash::of).collect()));
        if self.known.len() > Generation::KEPT {
            self.known.pop_front();
        }
        generation
    }

    /// Sees to it that generations of a machine that booted do not begin with that of a load.
    pub(super) fn of_booted() -> Self {
        Self { next: Generation::LOADED.0 + 1, known: VecDeque::new() }
    }
}

/// Gives offset and end of the runs of pages that are to be written, each of at most [`PIECE`] bytes, and none with both
/// pages of zeros and others.
fn runs(state: &[u8], mut wanted: impl FnMut(usize, &[u8]) -> bool) -> VecDeque<(usize, usize)> {
    let mut runs: VecDeque<(usize, usize)> = VecDeque::new();
    for (number, page) in state.chunks(PAGE).enumerate() {
        if !wanted(number, page) {
            continue;
        }
        let (start, end) = (number * PAGE, number * PAGE + page.len());
        match runs.back_mut() {
            Some((first, last))
                if *last == start
                    && start - *first < PIECE
                    && is_zero(&state[*first..*first + PAGE]) == is_zero(page) =>
            {
                *last = end;
            }
            _ => runs.push_back((start, end)),
        }
    }
    runs
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// A guest's state as bytes, and which of them are to be written.
#[derive(Debug)]
pub(super) struct CapturedGuest {
    header: Bytes,
    state: Bytes,
    runs: VecDeque<(usize, usize)>,
    generation: Option<Generation>,
}

#[async_trait]
impl Captured for CapturedGuest {
    fn generation(&self) -> Option<Generation> {
        self.generation
    }

    async fn write(&mut self, sections: &mut dyn SectionSink) -> Result<(), MachineError> {
        sections.begin(HEADER).await?;
        sections.write(self.header.clone()).await?;
        sections.begin_image(STATE, self.state.len() as u64).await?;
        while let Some((start, end)) = self.runs.pop_front() {
            let bytes = self.state.slice(start..end);
            if is_zero(&bytes) {
                sections.zeros_at(start as u64, bytes.len() as u64).await?;
            } else {
                sections.write_at(start as u64, bytes).await?;
            }
        }
        Ok(())
    }
}
