//! Streams that the guest opens.

use super::{Fake, SOON, StdStream, begin, machine_of, run};
use crate::control::{Answer, FromLauncher, Request, ToLauncher};
use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsFd,
    sync::mpsc::channel,
    time::Duration,
};
use tokio::{
    io::AsyncReadExt,
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
};
use vm_core::machine::{Acceptor, BACKLOG, Machine, MachineError};

impl Fake {
    /// Answers a request to listen, and gives the listener's number.
    fn hear_listen(&self, wanted: u32) -> u64 {
        let (id, request, _) = self.hear_request().unwrap();
        let Request::Listen { port, listener, backlog } = request else { panic!("{request:?}") };
        assert_eq!((port, usize::try_from(backlog)), (wanted, Ok(BACKLOG)));
        self.reply(id, Ok(Answer::Done));
        listener
    }

    fn hear_unlisten(&self, port: u32) {
        let (id, request, _) = self.hear_request().unwrap();
        assert_eq!(request, Request::Unlisten { port });
        self.reply(id, Ok(Answer::Done));
    }

    fn hear_taken(&self) -> (u32, u64, u32) {
        match self.hear() {
            Some((ToLauncher::Taken { port, listener, streams }, _)) => (port, listener, streams),
            other => panic!("{other:?}"),
        }
    }

    /// Hands over a stream whose first byte is this.
    fn open(&self, port: u32, listener: u64, byte: u8) -> StdStream {
        let (its, mut ours) = StdStream::pair().unwrap();
        ours.write_all(&[byte]).unwrap();
        self.say_with(&FromLauncher::Incoming { port, listener }, &[its.as_fd()]);
        ours.set_read_timeout(Some(SOON)).unwrap();
        ours
    }
}

fn is_closed(mut stream: StdStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0) | Err(_))
}

async fn first_byte(acceptor: &mut Box<dyn Acceptor>) -> u8 {
    acceptor.accept().await.unwrap().read_u8().await.unwrap()
}

/// A launcher that hands over more than it may, and whatever else makes no sense.
#[test]
fn what_the_guest_opens_is_accepted_bounded_and_refused() {
    const EXTRA: usize = 5;
    run(async {
        let (send, mut closed) = unbounded_channel();
        let life = begin(move |fake| {
            fake.hello();
            let listener = fake.hear_listen(7);
            let streams: Vec<_> = (0..BACKLOG + EXTRA)
                .map(|number| fake.open(7, listener, u8::try_from(number).unwrap()))
                .collect();
            // Nobody listens there, nor under that number, and this is no stream.
            let nobody = [fake.open(8, listener, 0), fake.open(7, listener + 1, 0)];
            fake.say(&FromLauncher::Incoming { port: 7, listener });
            let refused = streams
                .into_iter()
                .skip(BACKLOG)
                .chain(nobody)
                .filter_map(|stream| is_closed(stream).then_some(()));
            send.send(refused.count()).unwrap();
            for _ in 0..BACKLOG {
                assert_eq!(fake.hear_taken(), (7, listener, 1));
            }
            fake.hear_unlisten(7);
            let next = fake.hear_listen(7);
            assert_ne!(next, listener);
            // What was opened to the last listener is not the next one's.
            assert!(is_closed(fake.open(7, listener, 99)));
            let file = File::open("/dev/null").unwrap();
            fake.say_with(&FromLauncher::Incoming { port: 7, listener: next }, &[file.as_fd()]);
            let _stream = fake.open(7, next, 100);
            assert_eq!((fake.hear_taken(), fake.hear_taken()), ((7, next, 1), (7, next, 1)));
            fake.hear();
        });
        let machine = machine_of(life.await.unwrap());
        let mut acceptor = machine.listen(7).await.unwrap();
        assert_eq!(machine.listen(7).await.err(), Some(MachineError::PortInUse(7)));
        assert_eq!(closed.recv().await, Some(EXTRA + 2));
        for number in 0..BACKLOG {
            assert_eq!(usize::from(first_byte(&mut acceptor).await), number);
        }
        drop(acceptor);
        let mut acceptor = machine.listen(7).await.unwrap();
        assert_eq!(first_byte(&mut acceptor).await, 100);
        machine.kill().await.unwrap();
        assert_eq!(acceptor.accept().await.err(), Some(MachineError::Ended));
        assert_eq!(machine.listen(9).await.err(), Some(MachineError::Ended));
    });
}

/// Listens, and once the launcher is ready sends until no more finds room.
async fn listen_and_stuff(
    machine: &crate::machine::LauncherMachine,
    is_ready: &mut UnboundedReceiver<()>,
) -> Box<dyn Acceptor> {
    let acceptor = machine.listen(7).await.unwrap();
    is_ready.recv().await.unwrap();
    for _ in 0..2000 {
        let asked = tokio::time::timeout(Duration::from_micros(200), machine.connect(5)).await;
        assert!(asked.is_err());
    }
    acceptor
}

/// Takes what there is, all of it attempts to connect.
fn hear_connects(fake: &Fake) {
    rustix::io::ioctl_fionbio(&fake.socket, true).unwrap();
    while let Some((message, _)) = fake.hear() {
        assert!(matches!(message, ToLauncher::Request { request: Request::Connect, .. }));
    }
    rustix::io::ioctl_fionbio(&fake.socket, false).unwrap();
}

#[test]
fn what_was_taken_is_told_once_there_is_room() {
    run(async {
        let (ready, mut is_ready) = unbounded_channel();
        let (go, may_go) = channel();
        let life = begin(move |fake| {
            fake.hello();
            let listener = fake.hear_listen(7);
            let _streams = [1, 2].map(|byte| fake.open(7, listener, byte));
            ready.send(()).unwrap();
            may_go.recv().unwrap();
            hear_connects(&fake);
            ready.send(()).unwrap();
            assert_eq!(fake.hear_taken(), (7, listener, 2));
            let _third = fake.open(7, listener, 3);
            assert_eq!(fake.hear_taken(), (7, listener, 1));
            ready.send(()).unwrap();
            fake.hear();
        });
        let machine = machine_of(life.await.unwrap());
        let mut acceptor = listen_and_stuff(&machine, &mut is_ready).await;
        assert_eq!(first_byte(&mut acceptor).await, 1);
        assert_eq!(first_byte(&mut acceptor).await, 2);
        // It gives up and loses nothing.
        let more = tokio::time::timeout(Duration::from_millis(20), acceptor.accept()).await;
        assert!(more.is_err());
        go.send(()).unwrap();
        is_ready.recv().await.unwrap();
        assert_eq!(first_byte(&mut acceptor).await, 3);
        is_ready.recv().await.unwrap();
    });
}

#[test]
fn a_port_that_could_not_be_given_up_is_at_its_next_stream() {
    run(async {
        let (ready, mut is_ready) = unbounded_channel();
        let (go, may_go) = channel();
        let life = begin(move |fake| {
            fake.hello();
            let listener = fake.hear_listen(7);
            ready.send(()).unwrap();
            may_go.recv().unwrap();
            hear_connects(&fake);
            assert!(is_closed(fake.open(7, listener, 1)));
            fake.hear_unlisten(7);
            assert!(is_closed(fake.open(7, listener, 2)));
            ready.send(()).unwrap();
            assert_ne!(fake.hear_listen(7), listener);
            ready.send(()).unwrap();
            fake.hear();
        });
        let machine = machine_of(life.await.unwrap());
        drop(listen_and_stuff(&machine, &mut is_ready).await);
        go.send(()).unwrap();
        is_ready.recv().await.unwrap();
        let _acceptor = machine.listen(7).await.unwrap();
        is_ready.recv().await.unwrap();
    });
}
