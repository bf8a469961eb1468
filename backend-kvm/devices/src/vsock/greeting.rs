//! What a host says before its stream reaches the guest: `CONNECT port\n`.

use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};
use std::os::unix::net::UnixStream;

/// A stream whose host has not said yet where it wants to go.
#[derive(Debug)]
pub(super) struct Greeting {
    pub(super) stream: UnixStream,
    /// The tick at which it is closed.
    pub(super) deadline: u64,
    line: Vec<u8>,
}

/// What a host has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Not all of its line.
    Part,
    /// The port that it wants.
    Port(u32),
    /// Nothing that makes sense, or that it is gone.
    Nonsense,
}

impl Greeting {
    /// Begins with a stream that does not block.
    pub(super) fn new(stream: UnixStream, deadline: u64) -> Self {
        Self { stream, deadline, line: Vec::new() }
    }

    /// Reads what is there of the line, and not a byte of what follows it.
    pub(super) fn read(&mut self) -> Said {
        loop {
            let mut seen = [0; MAX_LINE];
            let space = &mut seen[..MAX_LINE - self.line.len()];
            let count = match recv(&self.stream, &mut *space, RecvFlags::PEEK | RecvFlags::DONTWAIT)
            {
                Ok((0, _)) => return Said::Nonsense,
                Ok((count, _)) => count,
                Err(Errno::AGAIN) => return Said::Part,
                Err(Errno::INTR) => continue,
                Err(_) => return Said::Nonsense,
            };
            let end = seen[..count].iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(count, |at| at + 1);
            if !self.take(taken) {
                return Said::Nonsense;
            }
            if end.is_some() {
                return parse(&self.line).map_or(Said::Nonsense, Said::Port);
            }
            if self.line.len() == MAX_LINE {
                return Said::Nonsense;
            }
        }
    }

    /// Takes bytes that were seen out of the socket.
    fn take(&mut self, count: usize) -> bool {
        let mut bytes = [0; MAX_LINE];
        match recv(&self.stream, &mut bytes[..count], RecvFlags::DONTWAIT) {
            Ok((taken, _)) => {
                self.line.extend_from_slice(&bytes[..taken]);
                taken == count
            }
            Err(_) => false,
        }
    }
}

/// The longest line; the longest that makes sense has 19 bytes.
const MAX_LINE: usize = 32;

fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let port = std::str::from_utf8(digits).ok()?.parse().ok()?;
    // Neither is a port: Linux takes the largest as "any".
    (port != 0 && port != u32::MAX).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::{Greeting, Said, parse};
    use proptest::prelude::*;
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
    };

    #[test]
    fn only_the_exact_line_is_taken() {
        assert_eq!(parse(b"CONNECT 1024\n"), Some(1024));
        assert_eq!(parse(b"CONNECT 4294967294\n"), Some(u32::MAX - 1));
        for bad in [
            "CONNECT 0\n",
            "CONNECT 4294967295\n",
            "CONNECT 4294967296\n",
            "CONNECT \n",
            "CONNECT +1\n",
            "CONNECT 1 \n",
            "CONNECT 1\r\n",
            "connect 1\n",
            " CONNECT 1\n",
            "\n",
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad:?}");
        }
    }

    fn greeting() -> (UnixStream, Greeting) {
        let (host, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (host, Greeting::new(ours, 0))
    }

    proptest! {
        #[test]
        fn a_line_in_pieces_is_read_and_what_follows_stays(port in 1..u32::MAX, cut in 0usize..20, rest in proptest::collection::vec(any::<u8>(), 0..100)) {
            let (mut host, mut greeting) = greeting();
            let line = format!("CONNECT {port}\n");
            let cut = cut.min(line.len() - 1);
            host.write_all(&line.as_bytes()[..cut]).unwrap();
            prop_assert_eq!(greeting.read(), Said::Part);
            host.write_all(&line.as_bytes()[cut..]).unwrap();
            host.write_all(&rest).unwrap();
            prop_assert_eq!(greeting.read(), Said::Port(port));
            drop(host);
            let mut left = Vec::new();
            greeting.stream.read_to_end(&mut left).unwrap();
            prop_assert_eq!(left, rest);
        }

        #[test]
        fn garbage_is_bounded(bytes in proptest::collection::vec(any::<u8>(), 32..200)) {
            let (mut host, mut greeting) = greeting();
            host.write_all(&bytes).unwrap();
            let said = greeting.read();
            prop_assert_ne!(said, Said::Part);
            prop_assert!(greeting.line.len() <= 32);
        }
    }
}
