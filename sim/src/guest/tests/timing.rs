//! What guests cost.

use super::{boot, finish, spec};
use std::hint::black_box;
use vm_guest_agent::os::GuestOs;

/// Prints times; run with `--ignored --nocapture` in release mode.
#[test]
#[ignore = "measures and prints; asserts nothing about time"]
#[allow(clippy::disallowed_methods, clippy::print_stderr)]
fn costs() {
    let time = |what: &str, count: u32, work: &mut dyn FnMut()| {
        let start = std::time::Instant::now();
        (0..count).for_each(|_| work());
        eprintln!("{what}: {:?}", start.elapsed() / count);
    };
    boot();
    time("create", 100_000, &mut || drop(black_box(boot())));
    let (echo, truth, script) =
        (spec(&["echo", "hi"]), spec(&["true"]), spec(&["sh", "-c", "echo hi"]));
    let mut os = boot();
    for (name, spec) in [("echo hi", &echo), ("true", &truth), ("sh -c 'echo hi'", &script)] {
        time(name, 100_000, &mut || {
            let child = os.spawn(spec).unwrap().child;
            black_box(finish(&mut os, child));
        });
    }
    time("clone", 100_000, &mut || drop(black_box(os.clone())));
    time("save", 100_000, &mut || drop(black_box(os.save().unwrap())));
    eprintln!("idle guest saved: {} bytes", os.save().unwrap().len());
}

#[test]
fn an_idle_guest_is_small_when_saved() {
    let mut os = boot();
    let child = os.spawn(&spec(&["echo", "hi"])).unwrap().child;
    finish(&mut os, child);
    let size = os.save().unwrap().len();
    assert!(size < 1024, "{size} bytes");
}
