//! Numbers out of an input, in little-endian order; bytes that it lacks are zero.

/// What is left of an input.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn bytes(&mut self, count: u8) -> &'a [u8] {
        let (now, later) = self.0.split_at(self.0.len().min(count.into()));
        self.0 = later;
        now
    }

    pub fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    pub fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub fn word(&mut self) -> u32 {
        u32::from(self.half()) | u32::from(self.half()) << 16
    }

    /// Gives a length: 15 bits as they are, or the upper ones of 32.
    pub fn length(&mut self) -> u32 {
        let half = self.half();
        if half < 0x8000 { half.into() } else { u32::from(half) << 17 | 0x1ffff }
    }
}
