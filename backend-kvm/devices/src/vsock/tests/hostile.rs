//! A guest that keeps to no rule.

use super::driver::{CID, Cut, RX, TX, Vsock, packet};
use crate::{
    testing::Buffer,
    vsock::{
        VsockLimits,
        packet::{HOST_CID, Header, op},
    },
};
use proptest::prelude::*;
use std::{io::Write, os::unix::net::UnixStream};
use vm_memory::{Bytes, GuestAddress};

/// What such a guest, or a host beside it, does.
#[derive(Clone, Debug)]
enum Step {
    Descriptor { queue: u8, index: u16, address: u64, length: u32, flags: u16, next: u16 },
    Publish { queue: u8, head: u16 },
    Index { queue: u8, index: u16 },
    Notify(u8),
    Packet(Header, Vec<u8>),
    Refill,
    HostReady,
    Connect(u32),
    Greet(Vec<u8>),
    Write(usize),
    HangUp(usize),
    Tick,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let address = prop_oneof![
        3 => 0u64..0x80_0000,
        1 => Just(0x80_0000 - 20),
        1 => any::<u64>(),
        1 => Just(u64::MAX - 10)
    ];
    let length = prop_oneof![2 => 0u32..200, 2 => 0u32..0x2_0000, 1 => any::<u32>()];
    prop_oneof![
        3 => (0u8..3, 0u16..300, address, length, 0u16..8, 0u16..300).prop_map(
            |(queue, index, address, length, flags, next)| Step::Descriptor {
                queue, index, address, length, flags, next
            }
        ),
        2 => (0u8..3, 0u16..300).prop_map(|(queue, head)| Step::Publish { queue, head }),
        1 => (0u8..3, any::<u16>()).prop_map(|(queue, index)| Step::Index { queue, index }),
        2 => (0u8..4).prop_map(Step::Notify),
        16 => wild_packet().prop_map(|(header, data)| Step::Packet(header, data)),
        4 => Just(Step::Refill),
        4 => Just(Step::HostReady),
        2 => (1u32..4).prop_map(Step::Connect),
        1 => proptest::collection::vec(any::<u8>(), 0..40).prop_map(Step::Greet),
        4 => (0usize..8).prop_map(Step::Write),
        2 => (0usize..8).prop_map(Step::HangUp),
        1 => Just(Step::Tick),
        1 => Just(Step::Reset),
    ]
}

/// Packets near what makes sense, so that they reach all states.
fn wild_packet() -> impl Strategy<Value = (Header, Vec<u8>)> {
    let cid = |right: u64| prop_oneof![20 => Just(right), 1 => any::<u64>()];
    let host_port =
        prop_oneof![4 => (1u32 << 30)..(1 << 30) + 6, 2 => Just(5000), 1 => any::<u32>()];
    let len = prop_oneof![6 => Just(None), 1 => any::<u32>().prop_map(Some)];
    (
        (cid(CID), cid(HOST_CID), 1u32..4, host_port, len),
        (
            prop_oneof![20 => Just(1u16), 1 => any::<u16>()],
            prop_oneof![20 => 0u16..9, 1 => any::<u16>()],
        ),
        (
            0u32..4,
            prop_oneof![3 => Just(1u32 << 18), 1 => any::<u32>()],
            prop_oneof![3 => Just(0u32), 1 => any::<u32>()],
        ),
        prop_oneof![2 => Just(vec![]), 1 => proptest::collection::vec(any::<u8>(), 0..9000)],
    )
        .prop_map(
            |(
                (src_cid, dst_cid, src_port, dst_port, len),
                (kind, op),
                (flags, buf_alloc, fwd_cnt),
                data,
            )| {
                let len = len.unwrap_or(u32::try_from(data.len()).unwrap());
                (
                    Header {
                        src_cid,
                        dst_cid,
                        src_port,
                        dst_port,
                        len,
                        kind,
                        op,
                        flags,
                        buf_alloc,
                        fwd_cnt,
                    },
                    data,
                )
            },
        )
}

struct World {
    vsock: Vsock,
    hosts: Vec<UnixStream>,
}

impl World {
    fn new(cut: Cut) -> Self {
        let limits = VsockLimits { connections: 8, buffer: 16 << 10, ..VsockLimits::default() };
        let mut vsock = Vsock::new(cut, limits);
        vsock.listen(5000);
        Self { vsock, hosts: Vec::new() }
    }

    fn ring(&mut self, queue: u8) -> &mut crate::testing::Ring {
        match queue {
            0 => &mut self.vsock.rx,
            1 => &mut self.vsock.tx,
            _ => &mut self.vsock.event,
        }
    }

    fn host(&mut self, number: usize) -> Option<&mut UnixStream> {
        let incoming: Vec<_> = self.vsock.incoming.lock().unwrap().drain(..).collect();
        for (_, stream) in incoming {
            let stream = UnixStream::from(stream);
            stream.set_nonblocking(true).unwrap();
            self.hosts.push(stream);
        }
        let count = self.hosts.len().max(1);
        self.hosts.get_mut(number % count)
    }

    fn act(&mut self, step: Step) {
        match step {
            Step::Descriptor { queue, index, address, length, flags, next } => {
                self.ring(queue).descriptor(index, address, length, flags, next);
            }
            Step::Publish { queue, head } => self.ring(queue).publish(head),
            Step::Index { queue, index } => self.ring(queue).set_published(index),
            Step::Notify(queue) => self.vsock.guest.notify(queue.into()),
            Step::Packet(header, data) => {
                // Written by hand: after what went before, the driver's own books mean nothing.
                let vsock = &mut self.vsock;
                vsock.memory.write_slice(&header.encode(), GuestAddress(0x40_0000)).unwrap();
                vsock.memory.write_slice(&data, GuestAddress(0x40_0000 + 44)).unwrap();
                let length = 44 + u32::try_from(data.len()).unwrap();
                vsock.tx.chain(200, &[Buffer { address: 0x40_0000, length, writable: false }]);
                vsock.tx.publish(200);
                vsock.guest.notify(TX);
            }
            Step::Refill => {
                for slot in 0..8u16 {
                    let address = 0x50_0000 + 0x1000 * u64::from(slot);
                    self.vsock
                        .rx
                        .chain(100 + slot, &[Buffer { address, length: 0x1000, writable: true }]);
                    self.vsock.rx.publish(100 + slot);
                }
                self.vsock.guest.notify(RX);
            }
            Step::HostReady => self.vsock.guest.transport.host_ready(),
            Step::Connect(port) => {
                let host = self.vsock.host(port);
                self.hosts.push(host);
            }
            Step::Greet(bytes) => {
                let mut host = self.vsock.bare_host();
                let _ = host.write_all(&bytes);
                self.hosts.push(host);
            }
            Step::Write(number) => {
                if let Some(host) = self.host(number) {
                    let _ = host.write(&[7; 5000]);
                }
            }
            Step::HangUp(number) => {
                if self.host(number).is_some() {
                    let at = number % self.hosts.len();
                    self.hosts.remove(at);
                }
            }
            Step::Tick => self.vsock.tick(1),
            Step::Reset => self.vsock.start(),
        }
        assert!(self.vsock.device().streams() <= 8);
        if self.vsock.is_broken() {
            assert_eq!(self.vsock.device().streams(), 0, "a broken device holds nothing");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn nothing_a_guest_does_hurts_more_than_itself(steps in proptest::collection::vec(step(), 1..120)) {
        let mut world = World::new(Cut::One);
        for step in steps {
            world.act(step);
        }
        // Whatever was done, it works again after a reset.
        world.vsock.guest.settle(10_000);
        world.hosts.clear();
        world.vsock.incoming.lock().unwrap().clear();
        world.vsock.start();
        let (mut host, _) = world.vsock.connected(9);
        host.write_all(b"alive").unwrap();
        prop_assert_eq!(world.vsock.receive().unwrap().1, b"alive");
    }

    #[test]
    fn single_chains_break_the_device_or_nothing(
        parts in proptest::collection::vec((0u64..0x90_0000, 0u32..400, any::<bool>()), 1..6),
        to_guest in any::<bool>(),
    ) {
        let mut vsock = Vsock::new(Cut::One, VsockLimits::default());
        let host = vsock.host(9);
        vsock.guest.settle(100);
        let buffers: Vec<_> = parts
            .iter()
            .map(|(address, length, writable)| Buffer { address: *address, length: *length, writable: *writable })
            .collect();
        let ring = if to_guest { &mut vsock.rx } else { &mut vsock.tx };
        ring.chain(0, &buffers);
        ring.publish(0);
        vsock.guest.notify(if to_guest { RX } else { TX });
        let used = if to_guest { vsock.rx.take_used() } else { vsock.tx.take_used() };
        prop_assert_eq!(used.is_empty(), vsock.is_broken());
        drop(host);
    }
}

#[test]
fn a_chain_too_short_for_a_header_breaks_the_device() {
    for (queue, writable) in [(TX, false), (RX, true)] {
        let mut vsock = Vsock::new(Cut::One, VsockLimits::default());
        let _host = vsock.host(9);
        vsock.guest.settle(100);
        let ring = if queue == RX { &mut vsock.rx } else { &mut vsock.tx };
        ring.chain(0, &[Buffer { address: 0x1000, length: 43, writable }]);
        ring.publish(0);
        vsock.guest.notify(queue);
        assert!(vsock.is_broken());
        vsock.start();
        vsock.send(packet(op::REQUEST, 1, 1), &[]);
        assert_eq!(vsock.operations(), [op::RST]);
    }
}
