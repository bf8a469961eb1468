//! [`WallClock`]: the clock chip of a PC (MC146818), as far as kernels read the time from it.

use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};

/// Answers with the host's time in UTC, in BCD and 24 hours. Writes have no effect.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct WallClock {
    index: u8,
}

const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

impl WallClock {
    /// Chooses the register that is read next.
    pub(super) fn select(&mut self, data: &[u8]) {
        if let Some(&index) = data.first() {
            // The highest bit masks NMIs.
            self.index = index & 0x7f;
        }
    }

    /// Reads the chosen register.
    pub(super) fn read(&self) -> u8 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        read_at(self.index, now)
    }
}

fn read_at(index: u8, now: u64) -> u8 {
    let (year, month, day) = date(now / 86_400);
    let value = match index {
        0 => now % 60,
        2 => now / 60 % 60,
        4 => now / 3600 % 24,
        // Sunday is 1; the first day of 1970 was a Thursday.
        6 => (now / 86_400 + 4) % 7 + 1,
        7 => day,
        8 => month,
        9 => year % 100,
        CENTURY => year / 100,
        // No update is going on; the usual dividers.
        STATUS_A => return 0x26,
        // 24 hours.
        STATUS_B => return 0x02,
        // The battery is good.
        STATUS_D => return 0x80,
        _ => return 0,
    };
    u8::try_from((value / 10) << 4 | (value % 10)).unwrap_or(0)
}

/// Gives year, month and day of the Gregorian calendar, of a number of days since the start of 1970.
fn date(days: u64) -> (u64, u64, u64) {
    // Counted from 1 March of the year 0, so that a leap day is the last of its year.
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (19_782, (2024, 2, 29)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(date(days), expected, "{days}");
        }
        let mut last = (1969, 12, 31);
        for days in 0..60_000 {
            let next = date(days);
            assert!(next > last, "{days}");
            last = next;
        }
    }

    #[test]
    fn time_is_in_bcd() {
        // 2026-11-21 13:18:02, a Saturday.
        let now = 1_795_267_082;
        let read: Vec<u8> = [0, 2, 4, 6, 7, 8, 9, CENTURY].map(|index| read_at(index, now)).into();
        assert_eq!(read, [0x02, 0x18, 0x13, 7, 0x21, 0x11, 0x26, 0x20]);
    }
}
