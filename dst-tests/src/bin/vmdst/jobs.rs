//! How much goes on at a time.

use crate::{Problem, any_number};
use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
};
use vm_dst::{runner::cores, seeds::Seeds, target::Target};

const ALLOWED: RangeInclusive<usize> = 1..=4096;

/// Reads the value of `--jobs`.
pub(crate) fn parse(text: &str) -> Result<usize, String> {
    let (least, most) = (ALLOWED.start(), ALLOWED.end());
    let jobs = usize::try_from(any_number(text)?).ok().filter(|jobs| ALLOWED.contains(jobs));
    jobs.ok_or_else(|| format!("from {least} to {most} can go on at a time"))
}

/// Says how many histories go on at a time on these targets: as many as was asked for, else as many as the cores allow, and
/// never more than the backends do.
pub(crate) fn for_histories(asked: Option<usize>, targets: &[&dyn Target]) -> usize {
    let limit = targets.iter().filter_map(|target| target.parallel_runs()).min();
    asked.or(limit).unwrap_or_else(cores).min(limit.unwrap_or(usize::MAX))
}

/// Carries out `work` for each seed, on `jobs` threads, and hands what came of it to `take` on this thread, in the order of the
/// seeds. Once `ends` says so, or `take` failed, no more are begun; those that were begun are still carried out.
///
/// # Errors
/// The first of `take`.
pub(crate) fn in_order<T: Send>(
    seeds: Seeds,
    jobs: usize,
    ends: &(dyn Fn() -> bool + Sync),
    work: &(dyn Fn(u64) -> T + Sync),
    take: &mut dyn FnMut(T) -> Result<(), Problem>,
) -> Result<(), Problem> {
    let (next, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let (send, receive) = mpsc::channel();
    let worker = |send: mpsc::Sender<(u64, T)>| {
        while !failed.load(Ordering::Relaxed) && !ends() {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= seeds.count || send.send((index, work(seeds.at(index)))).is_err() {
                break;
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..jobs {
            let send = send.clone();
            scope.spawn(|| worker(send));
        }
        drop(send);
        let (mut early, mut turn, mut result) = (BTreeMap::new(), 0, Ok(()));
        for (index, done) in receive {
            early.insert(index, done);
            while let Some(done) = early.remove(&turn) {
                turn += 1;
                if result.is_ok() {
                    result = take(done);
                    failed.store(result.is_err(), Ordering::Relaxed);
                }
            }
        }
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::Mutex, time::Duration};
    use vm_dst::seeds::SeedSource;

    fn seeds(count: u64) -> Seeds {
        Seeds::range(100, count, SeedSource::Option).unwrap()
    }

    #[test]
    fn results_come_in_the_order_of_their_seeds_whatever_each_takes() {
        for jobs in [1, 2, 7] {
            let mut taken = Vec::new();
            let work = |seed: u64| {
                thread::sleep(Duration::from_micros(seed * 7919 % 500));
                seed
            };
            let mut take = |seed| {
                taken.push(seed);
                Ok(())
            };
            assert!(in_order(seeds(60), jobs, &|| false, &work, &mut take).is_ok());
            assert_eq!(taken, (100..160).collect::<Vec<_>>(), "{jobs} jobs");
        }
    }

    #[test]
    fn an_end_or_a_failure_begins_no_more_and_loses_none_that_began() {
        let began = Mutex::new(0_u64);
        let work = |_| *began.lock().unwrap() += 1;
        let ends = || *began.lock().unwrap() >= 5;
        let mut taken = 0_u64;
        let mut take = |()| {
            taken += 1;
            Ok(())
        };
        assert!(in_order(seeds(1000), 3, &ends, &work, &mut take).is_ok());
        assert_eq!(taken, *began.lock().unwrap());
        assert!((5..8).contains(&taken), "{taken}");

        let mut take = |seed| match seed {
            103 => Err(Problem::failed("refused")),
            _ => Ok(()),
        };
        assert!(in_order(seeds(4), 2, &|| false, &|seed| seed, &mut take).is_err());
    }

    #[test]
    fn a_number_of_jobs_is_looked_at() {
        assert_eq!((parse("4096"), parse("0x10")), (Ok(4096), Ok(16)));
        for bad in ["0", "4097", "-1", "many", ""] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
