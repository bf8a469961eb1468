//! The scenario of mixed operations and the idle one, in every environment of this build.

use criterion::{Criterion, criterion_group, criterion_main};
use std::{cell::Cell, hint::black_box};
use vm_dst::{
    bench::{OPERATIONS, mixed},
    environment::Environment,
};
use vm_sim::scenario;

fn scenarios(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scenario");
    let environments = Environment::ALL.iter().filter(|one| one.available().is_ok());
    for environment in environments.copied() {
        let seed = Cell::new(0);
        let next = || seed.replace(seed.get() + 1);
        group.bench_function(format!("mixed_{OPERATIONS}/{environment}"), |bencher| {
            bencher.iter(|| black_box(mixed(environment, next()).expect("the scenario holds")));
        });
        group.bench_function(format!("idle_day/{environment}"), |bencher| {
            bencher.iter(|| {
                let seed = next();
                let run = environment.run(seed, move || scenario::idle(seed));
                black_box(run.expect("no panic").expect("the scenario holds"))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, scenarios);
criterion_main!(benches);
