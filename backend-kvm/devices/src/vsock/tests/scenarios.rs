//! One behaviour at a time.

use super::driver::{CID, Cut, EVENT, SLOTS, Vsock, answer, data, packet, read_all};
use crate::{
    device::VirtioDevice,
    testing::Buffer,
    vsock::{
        Listener, VsockDevice, VsockLimits,
        packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op},
    },
};
use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    time::Duration,
};
use vm_memory::{Bytes, GuestAddress};

const CUTS: [Cut; 4] = [Cut::One, Cut::Two, Cut::Pages, Cut::Odd];

fn vsock() -> Vsock {
    Vsock::new(Cut::One, VsockLimits::default())
}

fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|n| u8::try_from((n * 7 + n / 251) % 256).unwrap()).collect()
}

fn ended(stream: &mut UnixStream) -> bool {
    read_all(stream).1
}

#[test]
fn a_host_reaches_the_guest_and_bytes_flow_both_ways() {
    for cut in CUTS {
        let mut vsock = Vsock::new(cut, VsockLimits::default());
        let (mut host, port) = vsock.connected(1024);
        assert_eq!(port, 1 << 30);
        host.write_all(&bytes(10_000)).unwrap();
        vsock.settle();
        let got: Vec<u8> = vsock.inbox.drain(..).flat_map(|(_, data)| data).collect();
        assert_eq!(got, bytes(10_000), "{cut:?}");
        let sent = bytes(65_536);
        vsock.send(data(port, 1024, &sent), &sent);
        vsock.settle();
        assert_eq!(read_all(&mut host), (sent, false), "{cut:?}");
    }
}

#[test]
fn the_guest_reaches_a_port_that_is_listened_on_and_no_other() {
    let mut vsock = vsock();
    let mut host = vsock.guest_connected(5000, 77);
    vsock.send(data(5000, 77, b"to the host"), b"to the host");
    vsock.settle();
    assert_eq!(read_all(&mut host).0, b"to the host");
    vsock.send(packet(op::REQUEST, 5001, 78), &[]);
    assert_eq!(vsock.operations(), [op::RST]);
    vsock.device().unlisten(5000);
    vsock.send(packet(op::REQUEST, 5000, 79), &[]);
    assert_eq!(vsock.operations(), [op::RST]);
    host.write_all(b"still there").unwrap();
    assert_eq!(vsock.receive().unwrap().1, b"still there");
}

#[test]
fn an_owner_that_takes_nothing_has_the_guest_refused() {
    let mut device = VsockDevice::new(CID, Box::new(|_, _| false), VsockLimits::default()).unwrap();
    device.listen(Listener { port: 5000, number: 1 }, 16);
    let mut vsock = vsock();
    *vsock.device() = device;
    vsock.start();
    vsock.send(packet(op::REQUEST, 5000, 1), &[]);
    assert_eq!(vsock.operations(), [op::RST]);
    assert_eq!(vsock.device().streams(), 0);
}

#[test]
fn a_refusal_hangs_up_on_the_host() {
    let mut vsock = vsock();
    let mut host = vsock.host(9);
    let (request, _) = vsock.receive().unwrap();
    vsock.send(answer(&request, op::RST), &[]);
    vsock.settle();
    assert_eq!(read_all(&mut host), (vec![], true));
    assert_eq!(vsock.device().streams(), 0);
}

#[test]
fn what_a_host_says_too_early_waits_for_the_guest() {
    let mut vsock = vsock();
    let mut host = vsock.bare_host();
    host.write_all(b"CONNECT 9\nearly").unwrap();
    let (request, _) = vsock.receive().unwrap();
    assert!(vsock.operations().is_empty());
    vsock.send(answer(&request, op::RESPONSE), &[]);
    assert_eq!(vsock.receive().unwrap().1, b"early");
}

#[test]
fn nonsense_and_silence_hang_up_on_the_host() {
    let mut vsock = vsock();
    let mut host = vsock.bare_host();
    host.write_all(b"GET / HTTP/1.1\n").unwrap();
    vsock.settle();
    assert!(ended(&mut host));
    let mut silent = vsock.bare_host();
    let mut unanswered = vsock.host(9);
    vsock.settle();
    vsock.tick(200);
    assert!(ended(&mut silent) && ended(&mut unanswered));
    assert_eq!(vsock.operations(), [op::REQUEST, op::RST]);
    assert_eq!(vsock.device().streams(), 0);
}

#[test]
fn time_runs_by_the_timer_alone() {
    let limits = VsockLimits { timeout: Duration::from_millis(200), ..VsockLimits::default() };
    let mut vsock = Vsock::new(Cut::One, limits);
    let mut silent = vsock.bare_host();
    // A pause: the timer runs out many times, and counts once.
    std::thread::sleep(Duration::from_millis(500));
    vsock.settle();
    assert!(!ended(&mut silent));
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(20));
        vsock.settle();
        if ended(&mut silent) {
            std::thread::sleep(Duration::from_millis(150));
            assert!(!vsock.guest.host_waits(), "the timer stops");
            return;
        }
    }
    panic!("a silent host is never hung up on");
}

#[test]
fn without_a_driver_hosts_are_hung_up_on() {
    let mut device = VsockDevice::new(CID, Box::new(|_, _| true), VsockLimits::default()).unwrap();
    let (mut host, ours) = UnixStream::pair().unwrap();
    device.accept_host(ours.into());
    assert_eq!(host.read(&mut [0; 9]).unwrap(), 0);
    device.host_ready().unwrap();
    device.queue_notified(0).unwrap();
}

#[test]
fn each_end_finishes_after_all_bytes_before_it() {
    let mut vsock = vsock();
    let (mut host, port) = vsock.connected(9);
    host.write_all(b"last words").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(vsock.receive().unwrap().1, b"last words");
    let (end, _) = vsock.receive().unwrap();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
    // The other direction still works, and ends by itself.
    let answer = bytes(60_000);
    vsock.send(data(port, 9, &answer), &answer);
    let mut finish = packet(op::SHUTDOWN, port, 9);
    finish.flags = SHUTDOWN_SEND;
    vsock.send(finish, &[]);
    vsock.settle();
    assert_eq!(read_all(&mut host), (answer, true));
    // Both ended: the guest is told once, says it knows, and nothing is left.
    let (end, _) = vsock.receive().unwrap();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
    vsock.send(packet(op::RST, port, 9), &[]);
    assert_eq!(vsock.operations(), [0u16; 0]);
    assert_eq!(vsock.device().streams(), 0);
}

#[test]
fn a_guest_that_closes_gets_its_reset_once_the_host_has_all() {
    let mut vsock = vsock();
    let (mut host, port) = vsock.connected(9);
    let sent = bytes(65_536);
    for _ in 0..4 {
        vsock.send(data(port, 9, &sent), &sent);
    }
    let mut close = packet(op::SHUTDOWN, port, 9);
    close.flags = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    vsock.send(close, &[]);
    assert!(!vsock.operations().contains(&op::RST), "bytes are still on their way");
    assert!(host.write_all(b"too late").is_err());
    let mut got = Vec::new();
    loop {
        let (some, end) = read_all(&mut host);
        got.extend(some);
        if end {
            break;
        }
        vsock.settle();
    }
    assert_eq!(got, [&sent[..]; 4].concat());
    assert_eq!(vsock.operations().last(), Some(&op::RST));
    assert_eq!(vsock.device().streams(), 0);
}

#[test]
fn a_guest_that_gives_up_waiting_still_has_its_bytes_delivered() {
    let mut vsock = vsock();
    let (mut host, port) = vsock.connected(9);
    let sent = bytes(65_536);
    for _ in 0..4 {
        vsock.send(data(port, 9, &sent), &sent);
    }
    let mut close = packet(op::SHUTDOWN, port, 9);
    close.flags = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    vsock.send(close, &[]);
    vsock.send(packet(op::RST, port, 9), &[]);
    // The ports are free for another at once.
    vsock.settle();
    vsock.inbox.clear();
    let mut got = Vec::new();
    while got.len() < 4 * sent.len() {
        got.extend(read_all(&mut host).0);
        vsock.settle();
    }
    assert_eq!(got, [&sent[..]; 4].concat());
    assert!(ended(&mut host));
    assert!(vsock.operations().is_empty());
    assert_eq!(vsock.device().streams(), 0);
}

#[test]
fn a_host_that_goes_closes_both_directions_and_waits_for_the_guest() {
    let mut vsock = vsock();
    let (mut host, _port) = vsock.connected(9);
    host.write_all(b"bye").unwrap();
    drop(host);
    assert_eq!(vsock.receive().unwrap().1, b"bye");
    let (end, _) = vsock.receive().unwrap();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
    assert_eq!(vsock.device().streams(), 1);
    vsock.tick(200);
    assert_eq!(vsock.operations(), [op::RST]);
    assert_eq!(vsock.device().streams(), 0);
}

#[test]
fn a_host_that_goes_with_bytes_unread_resets() {
    let mut vsock = vsock();
    let (host, port) = vsock.connected(9);
    vsock.send(data(port, 9, b"unread"), b"unread");
    vsock.settle();
    drop(host);
    assert_eq!(vsock.operations(), [op::RST]);
}

#[test]
fn a_slow_host_stalls_its_own_connection_alone() {
    let mut vsock = vsock();
    let (mut slow, slow_port) = vsock.connected(1);
    let (mut quick, quick_port) = vsock.connected(2);
    let sent = bytes(32_768);
    // All that the guest may send; the device stores what the socket does not take.
    let mut allowed = 256 << 10;
    let mut total = 0;
    while allowed >= sent.len() {
        vsock.send(data(slow_port, 1, &sent), &sent);
        allowed -= sent.len();
        total += sent.len();
        vsock.settle();
        for (header, _) in vsock.inbox.drain(..) {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            allowed = usize::try_from(header.fwd_cnt).unwrap() + (256 << 10) - total;
        }
        vsock.send(data(quick_port, 2, b"hello"), b"hello");
        vsock.settle();
        assert_eq!(read_all(&mut quick).0, b"hello");
    }
    assert!(total > 300_000, "socket and buffer hold {total}");
    let mut got = 0;
    while got < total {
        got += read_all(&mut slow).0.len();
        vsock.settle();
    }
    assert_eq!(got, total);
    let updates: Vec<_> = vsock.inbox.drain(..).collect();
    let known = usize::try_from(updates.last().unwrap().0.fwd_cnt).unwrap();
    assert!(total - known <= 128 << 10, "the guest knows of half of its room");
}

#[test]
fn a_guest_without_credit_is_waited_for_and_asked() {
    let mut vsock = vsock();
    let mut host = vsock.host(9);
    let (request, _) = vsock.receive().unwrap();
    let mut response = answer(&request, op::RESPONSE);
    response.buf_alloc = 10_000;
    vsock.send(response, &[]);
    vsock.settle();
    assert_eq!(read_all(&mut host).0, format!("OK {}\n", request.src_port).as_bytes());
    host.write_all(&bytes(50_000)).unwrap();
    vsock.settle();
    let mut got = Vec::new();
    let mut asked = 0;
    loop {
        let (packets, more): (Vec<_>, Vec<_>) =
            vsock.inbox.drain(..).partition(|(header, _)| header.op == op::RW);
        let before = got.len();
        got.extend(packets.into_iter().flat_map(|(_, data)| data));
        assert!(got.len() - before <= 10_000);
        asked += more.iter().filter(|(header, _)| header.op == op::CREDIT_REQUEST).count();
        if got.len() == before {
            break;
        }
        let mut update = answer(&request, op::CREDIT_UPDATE);
        update.buf_alloc = 10_000;
        update.fwd_cnt = u32::try_from(got.len()).unwrap();
        vsock.send(update, &[]);
        vsock.settle();
    }
    assert_eq!(got, bytes(50_000));
    assert!(asked > 0 && asked <= 50_000 / 2000, "asked {asked} times");
}

#[test]
fn a_guest_that_sends_more_than_it_may_loses_the_connection_alone() {
    let limits = VsockLimits { buffer: 4096, ..VsockLimits::default() };
    let mut vsock = Vsock::new(Cut::One, limits);
    let (mut other, _) = vsock.connected(1);
    let (mut host, port) = vsock.connected(9);
    vsock.send(data(port, 9, &bytes(4097)), &bytes(4097));
    assert_eq!(vsock.operations(), [op::RST]);
    assert!(ended(&mut host));
    other.write_all(b"lives").unwrap();
    assert_eq!(vsock.receive().unwrap().1, b"lives");
}

#[test]
fn packets_that_make_no_sense_reset_their_connection_alone() {
    for operation in [0, op::REQUEST, op::RESPONSE, 8, 99, u16::MAX] {
        let mut vsock = vsock();
        let (_host, port) = vsock.connected(9);
        vsock.send(packet(operation, port, 9), &[]);
        assert_eq!(vsock.operations(), [op::RST], "{operation}");
        assert_eq!(vsock.device().streams(), 0);
        vsock.send(packet(operation, port, 9), &[]);
        assert_eq!(vsock.operations(), [op::RST], "unknown by now");
    }
    let mut vsock = vsock();
    let (_host, port) = vsock.connected(9);
    let mut short = data(port, 9, b"four");
    short.len = 5;
    vsock.send(short, b"four");
    assert_eq!(vsock.operations(), [op::RST]);
    let mut seqpacket = packet(op::REQUEST, 1, 1);
    seqpacket.kind = 2;
    vsock.send(seqpacket, &[]);
    let (reset, _) = vsock.receive().unwrap();
    assert_eq!((reset.op, reset.kind), (op::RST, 2));
    let mut foreign = packet(op::REQUEST, 1, 1);
    foreign.src_cid = 77;
    vsock.send(foreign, &[]);
    foreign.src_cid = CID;
    foreign.dst_cid = 1;
    vsock.send(foreign, &[]);
    vsock.send(packet(op::RST, 1, 1), &[]);
    assert!(vsock.operations().is_empty());
}

#[test]
fn no_buffer_is_lost_over_many_small_messages() {
    let mut vsock = vsock();
    let (mut host, port) = vsock.connected(9);
    for number in 0..200u32 {
        let message = number.to_le_bytes();
        host.write_all(&message).unwrap();
        let (header, data) = vsock.receive().expect("a packet for each message");
        assert_eq!((header.op, &data[..]), (op::RW, &message[..]));
        let mut update = packet(op::CREDIT_UPDATE, port, 9);
        update.fwd_cnt = 4 * (number + 1);
        vsock.send(update, &[]);
    }
}

#[test]
fn turns_are_fair_when_the_guest_has_few_buffers() {
    let mut vsock = vsock();
    let (mut bulk, _) = vsock.connected(1);
    let (mut small, _) = vsock.connected(2);
    while bulk.write(&bytes(65_536)).is_ok() {}
    small.write_all(b"me too").unwrap();
    assert!(vsock.guest.settle(100));
    vsock.collect();
    for (_, data) in vsock.inbox.drain(..).take(3) {
        if data == b"me too" {
            return;
        }
    }
    vsock.give(3);
    assert!(vsock.guest.settle(100));
    vsock.collect();
    assert!(vsock.inbox.iter().any(|(_, data)| data == b"me too"));
}

#[test]
fn storms_end_in_refusals_and_bounded_memory() {
    let limits = VsockLimits { connections: 64, ..VsockLimits::default() };
    let mut vsock = Vsock::new(Cut::One, limits);
    vsock.listen(5000);
    // The guest gives no buffer for answers.
    let mut sent = 0;
    while vsock.try_send(packet(op::REQUEST, 5000 + sent % 2, sent), &[]) {
        sent += 1;
        assert!(sent < 1000, "the device stops listening");
    }
    assert_eq!(sent, 32 + 64 + u32::from(SLOTS), "taken, refused and in the queue");
    let mut hosts: Vec<_> = (0..200).map(|_| vsock.host(9)).collect();
    assert!(vsock.guest.settle(1000));
    assert!(hosts.iter_mut().all(ended));
    let operations = vsock.operations();
    let count = |wanted| operations.iter().filter(|operation| **operation == wanted).count();
    assert_eq!((count(op::RESPONSE), count(op::RST), operations.len()), (32, 96, 128));
    assert!(vsock.device().streams() == 32);
    assert!(vsock.try_send(packet(op::CREDIT_REQUEST, 1, 1), &[]));
    assert_eq!(vsock.operations(), [op::RST]);
}

#[test]
fn a_reset_forgets_all_and_the_device_works_again() {
    let mut vsock = vsock();
    let (mut host, _) = vsock.connected(9);
    let mut greeting = vsock.bare_host();
    vsock.guest.reset();
    assert!(ended(&mut host) && ended(&mut greeting));
    assert_eq!(vsock.device().streams(), 0);
    assert!(!vsock.guest.host_waits());
    assert!(ended(&mut vsock.host(9)));
    vsock.start();
    vsock.connected(9);
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let mut vsock = vsock();
    let (mut host, _) = vsock.connected(9);
    vsock.listen(7);
    let state = vsock.device().save();
    assert_eq!((state.guest_cid, state.next_port), (CID, (1 << 30) + 1));
    // Saving changes nothing.
    host.write_all(b"on").unwrap();
    assert_eq!(vsock.receive().unwrap().1, b"on");
    let restored =
        VsockDevice::restore(&state, Box::new(|_, _| true), VsockLimits::default()).unwrap();
    assert_eq!(restored.save(), state);
    // The event waits for a buffer.
    vsock.device().reset_connections().unwrap();
    assert!(ended(&mut host));
    assert!(vsock.event.take_used().is_empty());
    vsock.memory.write_slice(&[9; 8], GuestAddress(0x9000)).unwrap();
    vsock.event.chain(0, &[Buffer { address: 0x9000, length: 8, writable: true }]);
    vsock.event.publish(0);
    vsock.guest.notify(EVENT);
    assert_eq!(vsock.event.take_used(), [(0, 4)]);
    let said: u64 = vsock.memory.read_obj(GuestAddress(0x9000)).unwrap();
    assert_eq!(said.to_le_bytes(), [0, 0, 0, 0, 9, 9, 9, 9]);
    vsock.event.publish(0);
    vsock.guest.notify(EVENT);
    assert!(vsock.event.take_used().is_empty(), "said once");
}

#[test]
fn the_address_is_in_the_configuration() {
    let device = VsockDevice::new(0x1234, Box::new(|_, _| true), VsockLimits::default()).unwrap();
    let mut all = [7; 10];
    device.read_config(0, &mut all);
    assert_eq!(all, [0x34, 0x12, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut part = [7; 2];
    device.read_config(1, &mut part);
    assert_eq!(part, [0x12, 0]);
    device.read_config(u64::MAX, &mut part);
    assert_eq!(part, [0, 0]);
}

#[test]
fn one_batch_interrupts_once() {
    let mut vsock = vsock();
    let (mut host, port) = vsock.connected(9);
    vsock.settle();
    host.write_all(&bytes(60_000)).unwrap();
    let before = vsock.guest.line.count();
    vsock.guest.transport.host_ready();
    assert_eq!(vsock.guest.line.count() - before, 1);
    vsock.collect();
    assert!(vsock.inbox.len() > 10);
    // A driver that polls is not interrupted.
    vsock.tx.set_flags(1);
    vsock.rx.set_flags(1);
    vsock.send(data(port, 9, b"x"), b"x");
    assert_eq!(vsock.guest.line.count() - before, 1);
    assert_eq!(read_all(&mut host).0, b"x");
}

#[test]
fn streams_of_other_kinds_are_closed() {
    let mut vsock = vsock();
    let (device, mut host) = std::io::pipe().unwrap();
    vsock.device().accept_host(device.into());
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert_eq!(vsock.device().streams(), 0);
}
