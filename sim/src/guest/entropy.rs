//! The random pool.

use rand_chacha::ChaCha20Rng;
use rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// A generator whose state is part of the guest's, so that a fork draws the same bytes until it is reseeded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Pool(ChaCha20Rng);

impl Pool {
    pub(super) fn new(seed: [u8; 32]) -> Self {
        Self(ChaCha20Rng::from_seed(seed))
    }

    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill_bytes(bytes);
    }

    /// Mixes bytes into the state; what was drawn before tells nothing of what comes.
    pub(super) fn reseed(&mut self, entropy: &[u8; 32]) {
        let mut seed = [0; 32];
        self.0.fill_bytes(&mut seed);
        for (byte, fresh) in seed.iter_mut().zip(entropy) {
            *byte ^= fresh;
        }
        self.0 = ChaCha20Rng::from_seed(seed);
    }
}
