//! The same seed gives the same run, under plain tokio with paused time and under turmoil, in a crate that is built
//! without any compiler flag.

use std::{cell::Cell, rc::Rc, time::Duration};
use vm_sim::{FaultPlan, SimBackend};
use vm_trait::{VmBackend, VmConfig};

const SEEDS: u64 = 20;

async fn run(seed: u64) -> u128 {
    let faults = FaultPlan::benign_swarm(seed);
    let backend = SimBackend::builder().seed(seed).faults(faults).build().expect("a runtime");
    let vm = backend.create(VmConfig::default()).await.expect("room for a machine");
    assert_eq!(no_flags::count_to(&*vm, 5).await.expect("nothing fails"), 5);
    backend.fingerprint()
}

fn under_tokio(seed: u64) -> u128 {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(run(seed))
}

fn under_turmoil(seed: u64) -> u128 {
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .tick_duration(Duration::from_millis(100))
        .simulation_duration(Duration::from_secs(3600))
        .build();
    let result = Rc::new(Cell::new(None));
    let slot = result.clone();
    sim.client("owner", async move {
        slot.set(Some(run(seed).await));
        Ok(())
    });
    sim.run().expect("the client ends well");
    result.get().expect("a fingerprint")
}

fn same_seed_same_run(fingerprint: fn(u64) -> u128) {
    let first: Vec<_> = (0..SEEDS).map(fingerprint).collect();
    let second: Vec<_> = (0..SEEDS).map(fingerprint).collect();
    assert_eq!(first, second);
    let mut distinct = first;
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len() as u64, SEEDS, "different seeds give different runs");
}

#[test]
fn no_flag_is_set() {
    assert!(!cfg!(madsim), "run this in its own directory, or with an empty RUSTFLAGS variable");
}

#[test]
fn under_paused_tokio_time() {
    same_seed_same_run(under_tokio);
}

#[test]
fn inside_turmoil() {
    same_seed_same_run(under_turmoil);
}
