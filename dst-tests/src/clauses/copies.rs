//! What the clauses on copies of busy machines share: how copies are made, and a program whose files are of one instant.

use super::probe::{SOON, Vm, read_to_end, sh, spawn_sh};
use crate::{
    clause::{Broken, Verdict},
    context::Context,
    ensure, ensure_eq,
};
use std::{collections::BTreeMap, time::Duration};
use vm_trait::{
    Capability, ExecStatus, ForkOptions, GuestProcess, OutputOffsets, ProcessId, RestoreOptions,
    Snapshot, SnapshotOptions, VmInstanceExt,
};

/// How a running machine is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// By a snapshot, and a restore of it.
    Restore,
    /// By a fork.
    Fork,
}

/// A machine as it was captured, not yet to be seen as a machine.
#[derive(Debug)]
pub(super) enum Captured {
    /// A snapshot, and how many machines are to be made of it.
    Snapshot(Snapshot, u64),
    /// Children.
    Children(Vec<Vm>),
}

impl Way {
    /// Names a copy, for what is said of it.
    pub(super) fn copy(self) -> &'static str {
        match self {
            Self::Restore => "in a restored machine",
            Self::Fork => "in a child",
        }
    }

    /// Captures a machine, for so many copies.
    pub(super) async fn capture(self, vm: &Vm, count: u64) -> Result<Captured, Broken> {
        match self {
            Self::Restore => {
                Ok(Captured::Snapshot(vm.snapshot(SnapshotOptions::default()).await?, count))
            }
            Self::Fork => Ok(Captured::Children(forked(vm, count).await?)),
        }
    }

    /// Copies a machine so many times; the copies run.
    pub(super) async fn copies(
        self,
        ctx: &Context,
        vm: &Vm,
        count: u64,
    ) -> Result<Vec<Vm>, Broken> {
        self.capture(vm, count).await?.running(ctx).await
    }
}

impl Captured {
    /// Makes the machines, which run.
    pub(super) async fn running(self, ctx: &Context) -> Result<Vec<Vm>, Broken> {
        match self {
            Self::Children(children) => {
                for child in &children {
                    if child.state() == vm_trait::VmState::Paused {
                        child.resume().await?;
                    }
                }
                Ok(children)
            }
            Self::Snapshot(snapshot, count) => {
                let mut copies = Vec::new();
                for _ in 0..count {
                    copies.push(ctx.backend().restore(&snapshot, RestoreOptions::running()).await?);
                }
                ctx.backend().delete_snapshot(&snapshot).await?;
                Ok(copies)
            }
        }
    }
}

/// Forks a machine into children of which none may fail.
pub(super) async fn forked(vm: &Vm, count: u64) -> Result<Vec<Vm>, Broken> {
    let count = u32::try_from(count).unwrap_or(1);
    let children = vm.fork(ForkOptions::new(count)).await?;
    ensure_eq!(children.len(), usize::try_from(count).unwrap_or(0), "the number of children");
    children.into_iter().map(|child| child.map_err(Broken::from)).collect()
}

/// Pauses a machine where that can be done, half of the time.
pub(super) async fn paused_at_times(ctx: &Context, vm: &Vm) -> Result<bool, Broken> {
    let pauses = ctx.has(Capability::Pause) && ctx.one_in(2);
    if pauses {
        vm.pause().await?;
    }
    Ok(pauses)
}

/// Attaches to a program of a copy, with all the output that the agent still has.
pub(super) async fn attached(copy: &Vm, id: ProcessId) -> Result<GuestProcess, Broken> {
    Ok(copy.attach_process(id, OutputOffsets::default()).await?)
}

/// A guest program that writes without end: the next number at the end of one file, then of another one, and beside them
/// again and again a file of one number alone, which takes the place of the last by its name.
///
/// Whatever instant a machine is captured at, both files hold all numbers from 1 on, in order, and the second is never
/// ahead of the first. Where memory or disk were captured a little earlier or later than the rest, a number is missing or
/// comes twice, and goes on to be so.
#[derive(Debug)]
pub(super) struct Writer {
    process: GuestProcess,
    first: String,
    second: String,
    block: String,
    stop: String,
}

/// How long a [`Writer`]'s block is.
const BLOCK: u64 = 100_000;

impl Writer {
    /// Starts one that writes first into the one directory, then into the other, and waits until it has written.
    pub(super) async fn begin(
        ctx: &Context,
        vm: &Vm,
        (first, second): (&str, &str),
    ) -> Result<Self, Broken> {
        let name = format!("{:x}", ctx.draw(0, u64::MAX));
        let (block, stop) = (format!("{second}/block-{name}"), format!("{second}/stop-{name}"));
        let (first, second) = (format!("{first}/first-{name}"), format!("{second}/second-{name}"));
        // The pauses let a simulated clock go on; how fast that is, work behind it costs real time.
        let pause = if ctx.is_simulated() { "0.03" } else { "0.004" };
        let script = format!(
            "i=0; while [ ! -e {stop} ]; do \
                 i=$((i+1)); echo $i >>{first}; echo $i >>{second}; \
                 if [ $((i%40)) = 0 ]; then yes $i | head -c {BLOCK} >{block}.new; mv {block}.new {block}; \
                 elif [ $((i%10)) = 0 ]; then sleep {pause}; fi; \
             done; echo $i"
        );
        let process = spawn_sh(vm, &script).await?;
        let writer = Self { process, first, second, block, stop };
        let begun = ctx.now();
        while !vm.exists(&writer.block).await? {
            ensure!(ctx.now() - begun < SOON, "a program did not write within {SOON:?}");
            ctx.sleep(Duration::from_millis(5)).await;
        }
        Ok(writer)
    }

    /// Counts the numbers that are in the second file by now.
    pub(super) async fn written(&self, vm: &Vm) -> Result<u64, Broken> {
        let lines = sh(vm, &format!("wc -l <{}", self.second)).await?;
        lines.trim().parse().map_err(|_| Broken::new(format!("`wc -l` wrote `{lines}`")))
    }

    /// Checks a copy of the machine: the program goes on there, and all that it wrote is of one instant, that is no
    /// earlier than when it had written so much.
    pub(super) async fn copied(&self, ctx: &Context, copy: &Vm, least: u64, when: &str) -> Verdict {
        let process = attached(copy, self.process.id()).await?;
        self.ended(ctx, copy, (&process, least), when).await
    }

    /// Lets the program of the source go on for a while, and checks what it wrote.
    pub(super) async fn source(self, ctx: &Context, vm: &Vm, least: u64) -> Verdict {
        self.ended(ctx, vm, (&self.process, least), "in the source").await
    }

    async fn ended(
        &self,
        ctx: &Context,
        vm: &Vm,
        (process, least): (&GuestProcess, u64),
        when: &str,
    ) -> Verdict {
        let (before, begun) = (self.written(vm).await?, ctx.now());
        ensure!(before >= least, "{when}: of {least} numbers that were written {before} are there");
        while self.written(vm).await? <= before {
            ensure!(ctx.now() - begun < SOON, "{when}: a program that wrote does not go on");
            ctx.sleep(Duration::from_millis(5)).await;
        }
        vm.write(&self.stop, "").await?;
        let said = ctx.within(SOON, "the end of a program that writes", read_to_end(process));
        let said = said.await??;
        ensure_eq!(process.wait().await?, ExecStatus::Exited(0), "{when}: its end");
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        let count = said.parse().map_err(|_| Broken::new(format!("{when}: it said `{said}`")))?;
        // What lies on a disk is to be read from there.
        sh(vm, "sync; ! [ -w /proc/sys/vm/drop_caches ] || echo 3 >/proc/sys/vm/drop_caches")
            .await?;
        in_order(&vm.read_file(&self.first).await?, count, &format!("{when}, in the first file"))?;
        in_order(
            &vm.read_file(&self.second).await?,
            count,
            &format!("{when}, in the second file"),
        )?;
        one_number(&vm.read_file(&self.block).await?, count, when)
    }
}

/// Checks that a text is the numbers from 1 to `count`, a line each.
fn in_order(text: &[u8], count: u64, when: &str) -> Verdict {
    let text = String::from_utf8_lossy(text);
    let mut lines = text.lines();
    for number in 1..=count {
        let line = lines.next().unwrap_or("nothing");
        ensure!(
            line.parse() == Ok(number),
            "{when}: {line} stands where {number} should, of {count}"
        );
    }
    let more = lines.next();
    ensure!(more.is_none(), "{when}: after {count} comes {more:?}");
    Ok(())
}

/// Checks that a block is one number again and again.
fn one_number(block: &[u8], count: u64, when: &str) -> Verdict {
    let text = String::from_utf8_lossy(block);
    ensure_eq!(text.len() as u64, BLOCK, "{when}: the length of the block");
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
    whole.lines().for_each(|line| *counts.entry(line).or_default() += 1);
    let number = counts.keys().next().and_then(|line| line.parse::<u64>().ok());
    let known = number.is_some_and(|number| number % 40 == 0 && number <= count);
    ensure!(counts.len() == 1 && known, "{when}: the block holds {counts:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_out_of_order_are_seen() {
        assert!(in_order(b"1\n2\n3\n", 3, "").is_ok());
        for text in ["1\n3\n", "1\n2\n2\n3\n", "1\n2\n", "1\n2\n3\n4\n", "1\n\0\n3\n", ""] {
            assert!(in_order(text.as_bytes(), 3, "").is_err(), "{text:?}");
        }
    }

    #[test]
    fn blocks_of_two_numbers_are_seen() {
        let block = |front: &str, back: &str| {
            let mut text = front.repeat(10);
            text += &back.repeat(100_000);
            text.truncate(usize::try_from(BLOCK).unwrap());
            text
        };
        assert!(one_number(block("80\n", "80\n").as_bytes(), 90, "").is_ok());
        for (front, back) in
            [("80\n", "40\n"), ("\0\n", "80\n"), ("90\n", "90\n"), ("120\n", "120\n")]
        {
            assert!(one_number(block(front, back).as_bytes(), 90, "").is_err(), "{front:?}");
        }
        assert!(one_number(&block("80\n", "80\n").as_bytes()[1..], 90, "").is_err());
    }
}
