//! [`until`]: waits for what nothing tells of.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Looks until there is something, with a pause of `every` before each look but the first, for at most `most`. It looks at
/// least once, and allocates nothing.
pub(super) fn until<T>(
    most: Duration,
    every: Duration,
    mut look: impl FnMut() -> Option<T>,
) -> Option<T> {
    let end = Instant::now() + most;
    loop {
        let seen = look();
        if seen.is_some() || Instant::now() >= end {
            return seen;
        }
        thread::sleep(every);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_until_there_is_something_or_time_is_up() {
        let mut looks = 0;
        let mut third = || {
            looks += 1;
            (looks == 3).then_some(looks)
        };
        assert_eq!(until(Duration::from_secs(60), Duration::ZERO, &mut third), Some(3));
        assert_eq!(until(Duration::ZERO, Duration::ZERO, &mut third), None);
        assert_eq!(looks, 4);
        let begun = Instant::now();
        assert_eq!(until(Duration::from_millis(5), Duration::from_millis(1), || None::<()>), None);
        assert!(begun.elapsed() >= Duration::from_millis(5));
    }
}
