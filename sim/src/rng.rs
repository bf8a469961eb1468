//! Randomness: one seed, split by purpose.

use rand_chacha::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};
use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};
use vm_core::fault::FaultKind;

/// What a random number is drawn for. Each purpose has a stream of its own, so that a draw added for one does not
/// shift the others.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub(crate) enum Purpose {
    WallClock,
    Entropy,
    GuestSeed,
    BootLatency,
    RequestLatency,
    MachineLatency,
    GuestSchedule,
    Yield,
    Link,
    HostDisk,
    Vsock,
    Network,
}

const FIRST_FAULT: usize = 32;

/// The streams of one seed, each made when it is first drawn from.
pub(crate) struct Streams {
    seed: u64,
    streams: Mutex<Vec<Option<Box<ChaCha20Rng>>>>,
}

impl Streams {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, streams: Mutex::new(Vec::new()) }
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn u64(&self, purpose: Purpose) -> u64 {
        self.with(purpose as usize, Rng::next_u64)
    }

    pub(crate) fn fill(&self, purpose: Purpose, bytes: &mut [u8]) {
        self.with(purpose as usize, |rng| rng.fill_bytes(bytes));
    }

    /// Draws a number below `bound`; 0 where the bound is 0.
    pub(crate) fn below(&self, purpose: Purpose, bound: u64) -> u64 {
        scale(self.u64(purpose), bound)
    }

    /// Draws an index below `bound`; 0 where the bound is 0.
    pub(crate) fn index(&self, purpose: Purpose, bound: usize) -> usize {
        let bound = u64::try_from(bound).unwrap_or(u64::MAX);
        usize::try_from(self.below(purpose, bound)).unwrap_or(0)
    }

    /// Draws true once in `n` times; never where `n` is 0.
    pub(crate) fn one_in(&self, purpose: Purpose, n: u32) -> bool {
        n != 0 && self.with(purpose as usize, Rng::next_u32) < u32::MAX / n
    }

    pub(crate) fn duration(&self, purpose: Purpose, low: Duration, high: Duration) -> Duration {
        spread(self.u64(purpose), low, high)
    }

    pub(crate) fn fault(&self, kind: FaultKind) -> u64 {
        self.with(FIRST_FAULT + kind_index(kind), Rng::next_u64)
    }

    fn with<T>(&self, index: usize, draw: impl FnOnce(&mut ChaCha20Rng) -> T) -> T {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if streams.len() <= index {
            streams.resize_with(index + 1, || None);
        }
        let seed = self.seed;
        draw(streams[index].get_or_insert_with(|| Box::new(stream(seed, index as u64))))
    }
}

/// Gives the stream of a seed and a purpose.
pub(crate) fn stream(seed: u64, purpose: u64) -> ChaCha20Rng {
    let mut key = *b"twinvm simulation seed 00000000\n";
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut rng = ChaCha20Rng::from_seed(key);
    rng.set_stream(purpose);
    rng
}

/// Gives the place of a kind in [`FaultKind::ALL`].
pub(crate) fn kind_index(kind: FaultKind) -> usize {
    FaultKind::ALL.iter().position(|known| *known == kind).unwrap_or(FaultKind::ALL.len())
}

/// Maps a random number evenly to `0..bound`.
pub(crate) fn scale(random: u64, bound: u64) -> u64 {
    u64::try_from((u128::from(random) * u128::from(bound)) >> 64).unwrap_or(0)
}

/// Maps a random number evenly to `low..high`.
pub(crate) fn spread(random: u64, low: Duration, high: Duration) -> Duration {
    let span = u64::try_from(high.saturating_sub(low).as_nanos()).unwrap_or(u64::MAX);
    low + Duration::from_nanos(scale(random, span))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_draw_for_one_purpose_does_not_shift_another(seed: u64, draws in 0_u8..50) {
            let (plain, disturbed) = (Streams::new(seed), Streams::new(seed));
            for _ in 0..draws {
                disturbed.u64(Purpose::Yield);
            }
            prop_assert_eq!(plain.u64(Purpose::Link), disturbed.u64(Purpose::Link));
            prop_assert_eq!(
                plain.fault(FaultKind::BitRot),
                disturbed.fault(FaultKind::BitRot)
            );
        }

        #[test]
        fn purposes_and_seeds_draw_apart(seed: u64) {
            let streams = Streams::new(seed);
            prop_assert_ne!(streams.u64(Purpose::Link), streams.u64(Purpose::Yield));
            let other = Streams::new(seed.wrapping_add(1));
            prop_assert_ne!(Streams::new(seed).u64(Purpose::Link), other.u64(Purpose::Link));
        }

        #[test]
        fn spreads_stay_within(random: u64, low in 0_u64..1000, span in 1_u64..1000) {
            let (low, high) = (Duration::from_nanos(low), Duration::from_nanos(low + span));
            prop_assert!((low..high).contains(&spread(random, low, high)));
        }
    }
}
