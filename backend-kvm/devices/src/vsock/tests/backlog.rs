//! Streams of the guest's that wait for the owner to take them.

use super::driver::{CID, Cut, Vsock, packet};
use crate::vsock::{Listener, VsockDevice, VsockLimits, packet::op};
use proptest::prelude::*;
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

const PORT: u32 = 5000;

fn listener(number: u64) -> Listener {
    Listener { port: PORT, number }
}

fn vsock() -> Vsock {
    Vsock::new(Cut::One, VsockLimits::default())
}

/// Has the guest connect from so many ports; gives how many connects were accepted and how many refused.
fn connect(vsock: &mut Vsock, guest_ports: std::ops::Range<u32>) -> (usize, usize) {
    let mut answers = Vec::new();
    for guest_port in guest_ports {
        vsock.send(packet(op::REQUEST, PORT, guest_port), &[]);
        answers.extend(vsock.operations());
    }
    let count = |wanted| answers.iter().filter(|answer| **answer == wanted).count();
    assert_eq!(count(op::RESPONSE) + count(op::RST), answers.len());
    (count(op::RESPONSE), count(op::RST))
}

#[test]
fn a_full_backlog_refuses_until_the_owner_takes() {
    let mut vsock = vsock();
    vsock.device().listen(listener(1), 16);
    assert_eq!(connect(&mut vsock, 0..40), (16, 24));
    assert_eq!(vsock.incoming.lock().unwrap().len(), 16);
    vsock.device().taken(listener(1), 3);
    assert_eq!(connect(&mut vsock, 40..50), (3, 7));
    // Another port's streams, and more than ever came, are nothing that it counts.
    vsock.device().taken(Listener { port: PORT + 1, number: 1 }, 9);
    assert_eq!(connect(&mut vsock, 50..60), (0, 10));
    vsock.device().taken(listener(1), u32::MAX);
    assert_eq!(connect(&mut vsock, 60..80), (16, 4));
    let incoming = vsock.incoming.lock().unwrap();
    assert_eq!(incoming.len(), 35);
    assert!(incoming.iter().all(|(it, _)| *it == listener(1)));
}

#[test]
fn a_new_listener_owes_nothing_to_the_last() {
    let mut vsock = vsock();
    vsock.device().listen(listener(1), 16);
    assert_eq!(connect(&mut vsock, 0..20), (16, 4));
    vsock.device().unlisten(PORT);
    vsock.device().taken(listener(1), 16);
    assert_eq!(connect(&mut vsock, 20..25), (0, 5));
    vsock.device().listen(listener(2), 2);
    vsock.device().taken(listener(1), 16);
    assert_eq!(connect(&mut vsock, 25..30), (2, 3));
    // What the last one's owner says late makes no room.
    vsock.device().taken(listener(1), 16);
    assert_eq!(connect(&mut vsock, 30..35), (0, 5));
    // Without an end of the one before.
    vsock.device().listen(listener(3), 1);
    assert_eq!(connect(&mut vsock, 35..40), (1, 4));
}

#[test]
fn what_the_guest_gives_up_still_waits() {
    let mut vsock = vsock();
    vsock.device().listen(listener(1), 2);
    assert_eq!(connect(&mut vsock, 0..3), (2, 1));
    vsock.send(packet(op::RST, PORT, 0), &[]);
    assert_eq!(connect(&mut vsock, 3..4), (0, 1));
    // Nor does a driver that begins anew forget it.
    vsock.guest.reset();
    assert_eq!(vsock.device().streams(), 0);
    vsock.start();
    assert_eq!(connect(&mut vsock, 4..5), (0, 1));
    vsock.device().taken(listener(1), 1);
    assert_eq!(connect(&mut vsock, 5..7), (1, 1));
}

#[test]
fn what_the_owner_does_not_get_does_not_wait() {
    let gets = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&gets);
    let incoming = Box::new(move |_, _| asked.load(Ordering::Relaxed));
    let mut device = VsockDevice::new(CID, incoming, VsockLimits::default()).unwrap();
    device.listen(listener(1), 2);
    let mut vsock = vsock();
    *vsock.device() = device;
    vsock.start();
    assert_eq!(connect(&mut vsock, 0..5), (0, 5));
    gets.store(true, Ordering::Relaxed);
    // The owner's ends are dropped at once here; the guest hears of that too.
    vsock.send(packet(op::REQUEST, PORT, 9), &[]);
    assert_eq!(vsock.operations().first(), Some(&op::RESPONSE));
}

#[test]
fn a_restored_device_listens_for_nobody() {
    let mut vsock = vsock();
    vsock.device().listen(listener(1), 1);
    assert_eq!(connect(&mut vsock, 0..2), (1, 1));
    let state = vsock.device().save();
    let to = Arc::clone(&vsock.incoming);
    let incoming = Box::new(move |listener, stream| {
        to.lock().unwrap().push((listener, stream));
        true
    });
    let restored = VsockDevice::restore(&state, incoming, VsockLimits::default()).unwrap();
    *vsock.device() = restored;
    vsock.start();
    assert_eq!(connect(&mut vsock, 2..4), (0, 2));
    vsock.device().listen(listener(1), 1);
    assert_eq!(connect(&mut vsock, 4..6), (1, 1));
}

#[derive(Clone, Debug)]
enum Step {
    Connect(usize),
    GuestCloses(usize),
    Listen(usize, u32),
    Unlisten(usize),
    /// By the port's listener, or by one before it.
    Taken(usize, u32, u64),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let port = || 0..2_usize;
    prop_oneof![
        10 => port().prop_map(Step::Connect),
        2 => (0..64_usize).prop_map(Step::GuestCloses),
        2 => (port(), 0..5_u32).prop_map(|(port, backlog)| Step::Listen(port, backlog)),
        1 => port().prop_map(Step::Unlisten),
        4 => (port(), 0..4_u32, prop_oneof![2 => Just(0), 1 => 1..3_u64])
            .prop_map(|(port, streams, before)| Step::Taken(port, streams, before)),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// A connect succeeds exactly where somebody listens with room, and the owner then gets exactly that stream.
    #[test]
    fn no_more_wait_than_may(steps in proptest::collection::vec(step(), 1..120)) {
        let mut vsock = vsock();
        let mut last_number = 0;
        let mut listening: BTreeMap<u32, (u64, u32, u32)> = BTreeMap::new();
        let mut guest_port = 0;
        for step in steps {
            let port = |which: usize| PORT + u32::try_from(which).unwrap();
            match step {
                Step::Connect(which) => {
                    let port = port(which);
                    guest_port += 1;
                    let had = vsock.incoming.lock().unwrap().len();
                    vsock.send(packet(op::REQUEST, port, guest_port), &[]);
                    let room = listening.get_mut(&port).filter(|(_, backlog, waiting)| waiting < backlog);
                    let answer = vsock.operations();
                    let incoming = vsock.incoming.lock().unwrap();
                    if let Some((number, _, waiting)) = room {
                        *waiting += 1;
                        prop_assert_eq!(answer, [op::RESPONSE]);
                        let (last, _) = incoming.last().unwrap();
                        prop_assert_eq!(*last, Listener { port, number: *number });
                        prop_assert_eq!(incoming.len(), had + 1);
                    } else {
                        prop_assert_eq!(answer, [op::RST]);
                        prop_assert_eq!(incoming.len(), had);
                    }
                }
                Step::GuestCloses(back) => {
                    let closed = guest_port.saturating_sub(u32::try_from(back).unwrap());
                    vsock.send(packet(op::RST, PORT, closed), &[]);
                    prop_assert!(vsock.operations().is_empty());
                }
                Step::Listen(which, backlog) => {
                    last_number += 1;
                    let (port, number) = (port(which), last_number);
                    vsock.device().listen(Listener { port, number }, backlog);
                    listening.insert(port, (number, backlog, 0));
                }
                Step::Unlisten(which) => {
                    vsock.device().unlisten(port(which));
                    listening.remove(&port(which));
                }
                Step::Taken(which, streams, before) => {
                    let port = port(which);
                    let Some((number, _, waiting)) = listening.get_mut(&port) else { continue };
                    let listener = Listener { port, number: number.saturating_sub(before) };
                    vsock.device().taken(listener, streams);
                    if before == 0 {
                        *waiting = waiting.saturating_sub(streams);
                    }
                }
                Step::Restart => {
                    vsock.guest.reset();
                    vsock.start();
                }
            }
        }
    }
}
