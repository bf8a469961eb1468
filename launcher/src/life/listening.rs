//! [`Listening`]: the streams that the guest opens to one port of the host.

use super::{Life, State};
use crate::{
    control::{Request, ToLauncher},
    packet,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};
use tokio::sync::mpsc;
use vm_core::machine::{BACKLOG, MachineError};

/// The streams that the guest opens to one port. Dropping it refuses more.
#[derive(Debug)]
pub struct Listening {
    life: Arc<Life>,
    port: u32,
    number: u64,
    streams: mpsc::Receiver<OwnedFd>,
    /// Streams that were taken, and of which the launcher does not know.
    untold: u32,
}

/// Who listens on which port.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    last_number: u64,
    listening: BTreeMap<u32, Listener>,
    /// Ports that the launcher still listens on for nobody, because it took no more packets.
    deserted: BTreeSet<u32>,
}

#[derive(Debug)]
struct Listener {
    number: u64,
    streams: mpsc::Sender<OwnedFd>,
}

impl Life {
    /// Takes what the guest opens to `port`, until the listening is dropped.
    ///
    /// # Errors
    /// [`MachineError::PortInUse`] and as [`request`](Self::request).
    pub async fn listen(self: &Arc<Self>, port: u32) -> Result<Listening, MachineError> {
        let (sender, streams) = mpsc::channel(BACKLOG);
        let number = {
            let mut state = self.lock();
            if state.over {
                return Err(MachineError::Ended);
            }
            state.listeners.add(port, sender)?
        };
        // From here on its drop takes everything back.
        let listening = Listening { life: self.clone(), port, number, streams, untold: 0 };
        let backlog = u32::try_from(BACKLOG).unwrap_or(u32::MAX);
        self.request(Request::Listen { port, listener: number, backlog }, &[]).await?;
        Ok(listening)
    }

    /// Passes on a stream that the guest opened. It is refused, by closing it, where its listener is gone, and where a
    /// launcher hands over more than may wait.
    pub(super) fn come_in(
        &self,
        state: &mut State,
        port: u32,
        listener: u64,
        stream: Option<OwnedFd>,
    ) {
        match state.listeners.listening.get(&port) {
            Some(listening) if listening.number == listener => {
                if let Some(stream) = stream {
                    let _ = listening.streams.try_send(stream);
                }
            }
            _ if state.listeners.deserted.contains(&port) => self.unlisten(state, port),
            _ => {}
        }
    }

    fn release(&self, port: u32) {
        let mut state = self.lock();
        if state.listeners.listening.remove(&port).is_some() && !state.over {
            self.unlisten(&mut state, port);
        }
    }

    /// Has the launcher listen no more, where it takes packets; else when the guest next opens something there.
    fn unlisten(&self, state: &mut State, port: u32) {
        state.next_request += 1;
        let (id, request) = (state.next_request, Request::Unlisten { port });
        if self.send_now(&ToLauncher::Request { id, request }).is_ok() {
            state.listeners.deserted.remove(&port);
        } else {
            state.listeners.deserted.insert(port);
        }
    }

    /// Sends a message if there is room for it.
    fn send_now(&self, message: &ToLauncher) -> io::Result<()> {
        packet::send(self.control.get_ref().as_fd(), &packet::encode(message)?, &[])
    }
}

impl Listeners {
    fn add(&mut self, port: u32, streams: mpsc::Sender<OwnedFd>) -> Result<u64, MachineError> {
        if self.listening.contains_key(&port) {
            return Err(MachineError::PortInUse(port));
        }
        self.last_number += 1;
        let number = self.last_number;
        self.listening.insert(port, Listener { number, streams });
        // What is sent for this listener takes the place of the one that was left.
        self.deserted.remove(&port);
        Ok(number)
    }

    /// Ends all listening: nothing more comes.
    pub(super) fn clear(&mut self) {
        self.listening.clear();
    }
}

impl Listening {
    /// Waits for the next stream; there is none once the machine has ended. When the future is dropped, no stream is
    /// lost.
    pub async fn next(&mut self) -> Option<OwnedFd> {
        let told = self.taken();
        let stream = tokio::select! {
            biased;
            stream = self.streams.recv() => stream,
            // There was no room for it when the last stream was taken.
            sent = self.life.send(&told, &[]), if self.untold > 0 => {
                if sent.is_ok() {
                    self.untold = 0;
                }
                self.streams.recv().await
            }
        }?;
        self.untold = self.untold.saturating_add(1);
        if self.life.send_now(&self.taken()).is_ok() {
            self.untold = 0;
        }
        Some(stream)
    }

    fn taken(&self) -> ToLauncher {
        ToLauncher::Taken { port: self.port, listener: self.number, streams: self.untold }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.life.release(self.port);
    }
}
