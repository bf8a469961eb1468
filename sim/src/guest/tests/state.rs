//! The whole state is a value.

use super::{Ran, boot, finish, later, sh, spec};
use crate::guest::{ProgramRegistry, SimOs};
use proptest::prelude::*;
use std::{sync::Arc, time::Duration};
use vm_guest_agent::os::{Child, GuestOs, SpawnSpec};

/// Scripts that are long enough to be interrupted anywhere.
const SCRIPTS: &[&str] = &[
    "i=0; while [ $i -lt 20 ]; do echo $i; i=$((i + 1)); done",
    "f() { if [ $1 -gt 0 ]; then echo $(f $(($1 - 1))) $1; fi; }; f 4",
    "seq 1 3000 | tr 1-9 2-9 | sort -r | head -n 50 | while read x; do echo \"<$x>\"; done",
    "trap 'echo bye' EXIT; (sleep 1; echo late) & sleep 2; wait; cat <<E\nend $! \nE",
    "for i in 1 2 3; do echo $i > /tmp/$i; head -c 8 /dev/urandom | cksum; done; cat /tmp/*",
    "{ echo a; sleep 0.5; echo b >&2; } > /tmp/f 2>&1; cat /tmp/f; x=$(cat /tmp/f | wc -l); echo $x",
    "trap 'echo term' TERM; for i in 1 2 3; do kill $$; sleep 1; done; date +%s%N",
    "dd if=/dev/zero of=/tmp/z bs=4096 count=40; cksum < /tmp/z; yes | head -n 5000 | tail -n 1",
];

fn reload(os: &SimOs) -> SimOs {
    let bytes = os.save().unwrap();
    let again = SimOs::load(&bytes, Arc::new(ProgramRegistry::new())).unwrap();
    assert_eq!(again.save().unwrap(), bytes, "what was loaded saves as it was");
    again
}

fn start(os: &mut SimOs, script: &str) -> Child {
    os.spawn(&spec(&["sh", "-c", script])).unwrap().child
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_run_that_is_saved_and_loaded_goes_on_as_if_it_were_not(
        script in proptest::sample::select(SCRIPTS),
        stops in proptest::collection::vec(1_u32..120, 1..5),
    ) {
        let run = |interrupted: bool| {
            let mut os = boot();
            let child = start(&mut os, script);
            for budget in &stops {
                if os.run(*budget).steps == 0 && let Some(next) = os.next_wakeup() {
                    os.set_monotonic(next);
                }
                if interrupted {
                    os = reload(&os);
                }
            }
            (finish(&mut os, child), os.save().unwrap())
        };
        prop_assert!(run(true) == run(false));
    }

    #[test]
    fn a_fork_and_its_source_do_not_see_each_other(
        script in proptest::sample::select(SCRIPTS),
        budget in 1_u32..200,
    ) {
        let mut source = boot();
        let child = start(&mut source, script);
        source.run(budget);
        let (mut fork, before) = (source.clone(), source.save().unwrap());
        sh(&mut fork, "echo other > /tmp/other; rm -r /bin/cat; echo x >> /etc/passwd");
        prop_assert!(source.save().unwrap() == before, "the source is as it was");
        let expected = {
            let mut alone = SimOs::load(&before, Arc::new(ProgramRegistry::new())).unwrap();
            finish(&mut alone, child)
        };
        prop_assert_eq!(finish(&mut source, child), expected);
        prop_assert!(source.stat("/tmp/other").is_err() && fork.stat("/tmp/other").is_ok());
    }

    #[test]
    fn damaged_bytes_are_an_error_and_never_a_panic(at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let mut os = boot();
        sh(&mut os, "echo x > /tmp/x; ln -s x /tmp/y");
        start(&mut os, SCRIPTS[2]);
        os.run(50);
        let mut bytes = os.save().unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        // Many flips give another valid state; decoding it must not panic.
        let _ = SimOs::load(&bytes, Arc::new(ProgramRegistry::new()));
        let _ = SimOs::load(&bytes[..at], Arc::new(ProgramRegistry::new())).is_err();
    }
}

#[test]
fn forks_draw_the_same_bytes_until_they_are_reseeded() {
    let mut source = boot();
    let draw = |os: &mut SimOs| sh(os, "head -c 16 /dev/urandom | cksum").stdout;
    draw(&mut source);
    let (mut same, mut other) = (source.clone(), source.clone());
    other.reseed(&[1; 32]).unwrap();
    let drawn = draw(&mut source);
    assert_eq!(draw(&mut same), drawn);
    assert_ne!(draw(&mut other), drawn);
    assert_ne!(draw(&mut same), drawn, "the pool moves on");
}

#[test]
fn clocks_are_driven_from_outside() {
    let mut os = boot();
    os.set_wall_clock(Duration::from_secs(1_700_000_000)).unwrap();
    let child = start(&mut os, "sleep 10; date +%s; cat /proc/uptime");
    os.run(100);
    assert_eq!(os.next_wakeup(), Some(Duration::from_secs(10)));
    assert!(!os.has_runnable());
    later(&mut os, Duration::from_secs(9));
    os.shift_wall_clock(-3_000_000_000);
    assert_eq!(os.run(100).steps, 0);
    later(&mut os, Duration::from_secs(1));
    let expected =
        Ran { stdout: "1700000007\n10.00 0.00\n".into(), stderr: String::new(), status: 0 };
    assert_eq!(finish(&mut os, child), expected);
}

#[test]
fn a_drawn_order_changes_who_comes_first_and_nothing_else() {
    let script = "for i in 1 2 3 4 5; do (echo $i; echo $i) & done; wait";
    let order = |pick: &mut dyn FnMut(usize) -> usize| {
        let mut os = boot();
        let child = os.spawn(&SpawnSpec { ..spec(&["sh", "-c", script]) }).unwrap().child;
        while os.run_ordered(10, pick).steps > 0 {}
        finish(&mut os, child).stdout
    };
    let (first, last) = (order(&mut |_| 0), order(&mut |n| n - 1));
    assert_ne!(first, last);
    let sorted = |text: &str| {
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&first), sorted(&last));
}
