//! How much either side may send (virtio 1.2, section 5.10.6.3).

use std::collections::VecDeque;

/// What the guest lets the host's side send.
///
/// The standard counts bytes alone. Linux since 6.12.92 and 6.18 also counts its own memory for each packet that its
/// program has not read, and resets the connection when that fills the buffer; so every packet in flight costs
/// [`PACKET_COST`] here, and a small rest of the window is left alone rather than filled with tiny packets.
#[derive(Debug)]
pub(super) struct Window {
    buf_alloc: u32,
    forwarded: u32,
    sent: u32,
    /// Up to which byte each packet in flight reaches, in order.
    packets: VecDeque<u32>,
}

impl Window {
    /// Begins with what the guest said in its first packet.
    pub(super) fn new(buf_alloc: u32) -> Self {
        Self { buf_alloc, forwarded: 0, sent: 0, packets: VecDeque::new() }
    }

    /// Takes what the guest says. A count of bytes that were not sent, or are no longer in flight, is ignored.
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        let in_flight = self.sent.wrapping_sub(fwd_cnt);
        if in_flight > self.in_flight() {
            return;
        }
        self.forwarded = fwd_cnt;
        while self.packets.front().is_some_and(|end| self.sent.wrapping_sub(*end) >= in_flight) {
            self.packets.pop_front();
        }
    }

    /// Says how many bytes the next packet may have; 0 where it must wait.
    pub(super) fn room(&self) -> u32 {
        let window = self.buf_alloc.min(MAX_WINDOW);
        if self.packets.is_empty() {
            return window.saturating_sub(PACKET_COST).max(window.min(PACKET_COST));
        }
        let packets = u32::try_from(self.packets.len() + 1).unwrap_or(u32::MAX);
        let used = self.in_flight().saturating_add(packets.saturating_mul(PACKET_COST));
        let room = window.saturating_sub(used);
        if room < SMALL_REST.min(window / 4) { 0 } else { room }
    }

    /// Counts a packet with this many bytes, at most [`room`](Self::room) and not 0.
    pub(super) fn sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
        self.packets.push_back(self.sent);
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.forwarded)
    }
}

/// What the host's side lets the guest send.
#[derive(Debug)]
pub(super) struct Account {
    buf_alloc: u32,
    received: u32,
    forwarded: u32,
    /// What the guest was last told to be forwarded.
    told: u32,
}

impl Account {
    /// Begins with room for this many bytes.
    pub(super) fn new(buf_alloc: u32) -> Self {
        Self { buf_alloc, received: 0, forwarded: 0, told: 0 }
    }

    /// Gives the bytes that may be stored.
    pub(super) fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// Counts bytes that the guest sent; false, and nothing counted, where it sent more than it may.
    #[must_use]
    pub(super) fn receive(&mut self, bytes: u32) -> bool {
        let stored = self.received.wrapping_sub(self.forwarded);
        if bytes > self.buf_alloc.saturating_sub(stored) {
            return false;
        }
        self.received = self.received.wrapping_add(bytes);
        true
    }

    /// Counts bytes that went on to the host.
    pub(super) fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// Says whether the guest should be told: it knows of less than half of the room, and there is more.
    pub(super) fn is_due(&self) -> bool {
        self.forwarded != self.told && self.received.wrapping_sub(self.told) > self.buf_alloc / 2
    }

    /// Gives the count for a packet that goes to the guest now.
    pub(super) fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.forwarded
    }
}

/// The most bytes in flight to the guest, whatever it allows.
const MAX_WINDOW: u32 = 1 << 20;

/// What a packet in flight costs beside its bytes: a little more than Linux's `SKB_TRUESIZE(0)`, about 576.
const PACKET_COST: u32 = 768;

/// A rest of the window below this waits to grow.
const SMALL_REST: u32 = 4 << 10;

#[cfg(test)]
mod tests {
    use super::{Account, MAX_WINDOW, PACKET_COST, Window};
    use proptest::prelude::*;
    use std::collections::VecDeque;

    /// Linux's receive queue: it rejects what its buffer cannot hold with its own memory counted.
    struct Guest {
        packets: VecDeque<u32>,
        forwarded: u32,
    }

    impl Guest {
        fn holds(&self, buf_alloc: u32) -> bool {
            let bytes: u32 = self.packets.iter().sum();
            bytes + 576 * u32::try_from(self.packets.len()).unwrap() <= buf_alloc
        }
    }

    proptest! {
        #[test]
        fn linux_is_never_overrun(
            start in any::<u32>(),
            buf_alloc in 8192u32..1 << 18,
            steps in proptest::collection::vec((any::<bool>(), 1u32..70_000), 1..400),
        ) {
            let mut window = Window { buf_alloc, forwarded: start, sent: start, packets: VecDeque::new() };
            let mut guest = Guest { packets: VecDeque::new(), forwarded: start };
            for (send, size) in steps {
                if send && window.room() > 0 {
                    let bytes = size.min(window.room());
                    window.sent(bytes);
                    guest.packets.push_back(bytes);
                    prop_assert!(guest.holds(buf_alloc));
                } else if let Some(bytes) = guest.packets.pop_front() {
                    guest.forwarded = guest.forwarded.wrapping_add(bytes);
                    window.update(buf_alloc, guest.forwarded);
                }
                prop_assert_eq!(window.packets.len(), guest.packets.len());
            }
            // It never waits for ever: once all is read there is room again.
            window.update(buf_alloc, window.sent);
            prop_assert!(window.room() > 0);
        }

        #[test]
        fn lies_about_credit_do_no_harm(steps in proptest::collection::vec((any::<u32>(), any::<u32>(), 1u32..70_000), 1..200)) {
            let mut window = Window::new(0);
            for (buf_alloc, fwd_cnt, size) in steps {
                window.update(buf_alloc, fwd_cnt);
                let room = window.room();
                if room > 0 {
                    window.sent(size.min(room));
                }
                prop_assert!(window.in_flight() <= MAX_WINDOW);
                prop_assert!(window.packets.len() <= (MAX_WINDOW / PACKET_COST) as usize + 1);
            }
        }

        #[test]
        fn the_guest_never_stores_more_than_allowed(steps in proptest::collection::vec((0u32..5000, 0u32..5000), 1..300)) {
            let mut account = Account::new(4096);
            let mut stored = 0;
            for (receive, forward) in steps {
                if account.receive(receive) {
                    stored += receive;
                } else {
                    prop_assert!(stored + receive > 4096);
                }
                prop_assert!(stored <= 4096);
                let forward = forward.min(stored);
                account.forward(forward);
                stored -= forward;
                if account.is_due() {
                    account.tell();
                    prop_assert!(!account.is_due());
                }
            }
        }
    }
}
