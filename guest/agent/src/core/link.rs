//! The connections, of which at most one serves the session.

use super::{ConnId, Violation};
use bytes::BytesMut;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vm_guest_protocol::{Decoder, Frame, StreamId, encode};

/// Frames of a connection wait in its decoder while there are this many outgoing bytes. It is above what data alone
/// may fill, so that output on its way does not keep the host from being heard.
const INPUT_BOUND: usize = 2 << 20;

/// All connections.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Link {
    connections: BTreeMap<ConnId, Connection>,
    serving: Option<ConnId>,
    /// Some stream has more to send and did not because of the outgoing bytes.
    pub(super) congested: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Connection {
    decoder: Decoder,
    outgoing: BytesMut,
    /// Nothing is heard on it any more, and it is to be closed.
    closing: bool,
    /// Whole frames may wait in the decoder.
    deferred: bool,
}

impl Link {
    pub(super) fn connected(&mut self, conn: ConnId) {
        self.disconnected(conn);
        self.connections.insert(conn, Connection::default());
    }

    pub(super) fn disconnected(&mut self, conn: ConnId) {
        self.connections.remove(&conn);
        if self.serving == Some(conn) {
            self.serving = None;
            self.congested = false;
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    pub(super) fn is_serving(&self, conn: ConnId) -> bool {
        self.serving == Some(conn)
    }

    pub(super) fn feed(&mut self, conn: ConnId, bytes: &[u8]) {
        if let Some(connection) = self.connections.get_mut(&conn)
            && !connection.closing
        {
            connection.decoder.feed(bytes);
        }
    }

    /// Takes the next frame of a connection, if it is to be heard now.
    pub(super) fn next_frame(
        &mut self,
        conn: ConnId,
    ) -> Result<Option<(StreamId, Frame)>, Violation> {
        let Some(connection) = self.connections.get_mut(&conn).filter(|it| !it.closing) else {
            return Ok(None);
        };
        connection.deferred = connection.outgoing.len() >= INPUT_BOUND;
        if connection.deferred { Ok(None) } else { Ok(connection.decoder.next_frame()?) }
    }

    /// Finds a connection whose frames waited and need not any more.
    pub(super) fn deferred(&self) -> Option<ConnId> {
        let mut connections = self.connections.iter();
        connections
            .find(|(_, it)| it.deferred && !it.closing && it.outgoing.len() < INPUT_BOUND)
            .map(|(conn, _)| *conn)
    }

    /// Lets a connection serve, and closes the one that did.
    pub(super) fn serve(&mut self, conn: ConnId) {
        if let Some(old) = self.serving.replace(conn).filter(|old| *old != conn) {
            self.cut(old);
        }
        self.congested = false;
    }

    /// Closes a connection without sending what waits.
    pub(super) fn cut(&mut self, conn: ConnId) {
        if let Some(connection) = self.connections.get_mut(&conn) {
            *connection = Connection { closing: true, ..Connection::default() };
        }
        if self.serving == Some(conn) {
            self.serving = None;
            self.congested = false;
        }
    }

    /// Sends a last frame on a connection and closes it.
    pub(super) fn refuse(&mut self, conn: ConnId, frame: &Frame) {
        self.cut(conn);
        if let Some(connection) = self.connections.get_mut(&conn) {
            encode(0, frame, &mut connection.outgoing);
        }
    }

    pub(super) fn outgoing(&mut self, conn: ConnId) -> Option<&mut BytesMut> {
        self.connections.get_mut(&conn).map(|connection| &mut connection.outgoing)
    }

    /// Gives the outgoing bytes of the connection that serves.
    pub(super) fn out(&mut self) -> Option<&mut BytesMut> {
        self.outgoing(self.serving?)
    }

    /// Says how many bytes wait on the connection that serves.
    pub(super) fn waiting(&self) -> usize {
        let serving = self.serving.and_then(|conn| self.connections.get(&conn));
        serving.map_or(0, |connection| connection.outgoing.len())
    }

    /// Sends a frame on the connection that serves, if there is one.
    pub(super) fn send(&mut self, stream: StreamId, frame: &Frame) {
        if let Some(out) = self.out() {
            encode(stream, frame, out);
        }
    }

    pub(super) fn to_close(&self) -> Vec<ConnId> {
        let closing = self.connections.iter().filter(|(_, connection)| connection.closing);
        closing.map(|(conn, _)| *conn).collect()
    }

    pub(super) fn wants_input(&self, conn: ConnId) -> bool {
        self.connections.get(&conn).is_some_and(|connection| {
            !connection.closing && !connection.deferred && connection.outgoing.len() < INPUT_BOUND
        })
    }
}
