//! Devices, as the kernel lists them, and the wait for one that is about to appear.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// How long a device may take to appear, and how long is waited before it is looked for again.
const PATIENCE: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LAST_PAUSE: Duration = Duration::from_millis(50);

/// Looks at least once, and again until there is something or a device has had its time to appear.
pub(super) fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + PATIENCE;
    let mut pause = FIRST_PAUSE;
    loop {
        let seen = look();
        if seen.is_some() || Instant::now() >= end {
            return seen;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Lists the devices of a directory that have one of these files, by name, each with what the first of them holds.
pub(super) fn list(directory: &Path, files: &[&str]) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let mut texts = files.iter().map(|file| fs::read_to_string(entry.path().join(file)));
            let text = texts.find_map(Result::ok)?;
            Some((entry.file_name().into_string().ok()?, text.trim_end().to_owned()))
        })
        .collect();
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_looked_until_there_is_something() {
        let mut looks = 0;
        let third = wait_for(|| {
            looks += 1;
            (looks == 3).then_some(looks)
        });
        assert_eq!(third, Some(3));
    }
}
