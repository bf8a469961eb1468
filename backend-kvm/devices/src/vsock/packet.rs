//! The header before every packet (virtio 1.2, section 5.10.6).

/// The size of a header in bytes.
pub(super) const HEADER_SIZE: usize = 44;

/// The same, as a length of guest memory.
pub(super) const HEADER_LENGTH: u32 = 44;

/// The host's address.
pub(super) const HOST_CID: u64 = 2;

/// The type of a stream's packets, the only one there is here.
pub(super) const TYPE_STREAM: u16 = 1;

/// Flag of [`op::SHUTDOWN`]: its sender receives no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;

/// Flag of [`op::SHUTDOWN`]: its sender sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What a packet asks for.
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// A header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of data behind the header.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// How many bytes its sender stores for the connection.
    pub(super) buf_alloc: u32,
    /// How many bytes its sender has passed on, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Reads a header; every pattern of bits is one.
    pub(super) fn decode(bytes: &[u8; HEADER_SIZE]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// Writes the header.
    pub(super) fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_SIZE], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

#[cfg(test)]
mod tests {
    use super::{HEADER_SIZE, Header};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_pattern_of_bits_is_a_header(bytes in proptest::array::uniform32(any::<u8>()), rest in proptest::array::uniform12(any::<u8>())) {
            let mut all = [0; HEADER_SIZE];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&rest);
            prop_assert_eq!(Header::decode(&all).encode(), all);
        }
    }

    #[test]
    fn fields_stand_where_the_standard_puts_them() {
        let header = Header { dst_cid: 2, op: 5, kind: 1, fwd_cnt: 7, ..Header::default() };
        let bytes = header.encode();
        assert_eq!((bytes[8], bytes[28], bytes[30], bytes[40]), (2, 1, 5, 7));
    }
}
