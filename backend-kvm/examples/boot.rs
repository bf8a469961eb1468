//! Boots a kernel in a launcher of its own, shows its console and times the stages:
//!
//! ```text
//! boot LAUNCHER KERNEL [--initrd FILE]… [--vcpus N] [--memory MIB] [--cmdline WORDS] [--until TEXT] [--pause SECONDS]
//! ```
//!
//! It ends with the machine, or once the console shows TEXT. With `--pause`, the machine is then paused for so long,
//! goes on, and is shown for as long again.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../tests/launcher/owner/mod.rs"]
mod owner;

use owner::{Owner, Parts};
use std::{
    env,
    error::Error,
    fs::{self, File},
    io::Write,
    time::{Duration, Instant},
};
use vm_backend_kvm::control::{Answer, FromLauncher, Request};

#[derive(Default)]
struct Options {
    words: Vec<String>,
    initrd: Vec<File>,
    vcpus: Option<u8>,
    memory_mib: Option<u32>,
    cmdline: String,
    until: Option<String>,
    pause: Option<f64>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = options()?;
    let [launcher, kernel] = options.words.as_slice() else {
        return Err("usage: boot LAUNCHER KERNEL [OPTIONS]".into());
    };
    let mut parts = Parts::new(&[]);
    parts.kernel = File::open(kernel)?;
    parts.set_up.vcpus = options.vcpus.unwrap_or(1);
    parts.set_up.memory_mib = options.memory_mib.unwrap_or(256);
    parts.set_up.cmdline.clone_from(&options.cmdline);
    parts.set_up.initrd_parts = u8::try_from(options.initrd.len())?;
    parts.initrd = options.initrd;
    parts.ring = owner::ring(1 << 20);
    parts.set_up.console_ring_bytes = 1 << 20;

    let start = Instant::now();
    let mut owner = Owner::start(launcher.as_ref());
    let spawned = start.elapsed();
    owner.set_up(&parts)?;
    let made = start.elapsed();
    owner.ask(Request::Boot)?;
    let booted = start.elapsed();
    let mut shown = Shown { parts: &parts, start, seen: 0, at_start: true };
    let ended = shown.until(options.until.as_deref(), &mut owner);
    let total = start.elapsed();
    if let (Some(seconds), None) = (options.pause, &ended) {
        let pause = Duration::from_secs_f64(seconds);
        owner.ask(Request::Pause)?;
        println!("\n[paused at {:.3} s]", start.elapsed().as_secs_f64());
        std::thread::sleep(pause);
        owner.ask(Request::Resume)?;
        println!("[resumed at {:.3} s]", start.elapsed().as_secs_f64());
        let until = Instant::now() + pause;
        while Instant::now() < until {
            shown.show();
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    println!();
    let memory = memory_kib(owner.child.id());
    if ended.is_none()
        && let Answer::Stats(stats) = owner.ask(Request::Stats)?
    {
        println!("{stats:?}");
    }
    for message in &owner.heard {
        println!("{message:?}");
    }
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    println!("ended: {ended:?}");
    println!("spawn {:.1} ms, set-up {:.1} ms", ms(spawned), ms(made - spawned));
    println!("boot {:.1} ms, until the end {:.1} ms", ms(booted - made), ms(total - booted));
    println!("beside the guest's memory: {memory}");
    Ok(())
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options::default();
    let mut words = env::args().skip(1);
    while let Some(word) = words.next() {
        if !word.starts_with("--") {
            options.words.push(word);
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        match word.as_str() {
            "--initrd" => options.initrd.push(File::open(value)?),
            "--vcpus" => options.vcpus = Some(value.parse()?),
            "--memory" => options.memory_mib = Some(value.parse()?),
            "--cmdline" => options.cmdline = value,
            "--until" => options.until = Some(value),
            "--pause" => options.pause = Some(value.parse()?),
            _ => return Err(format!("unknown option {word}").into()),
        }
    }
    Ok(options)
}

struct Shown<'a> {
    parts: &'a Parts,
    start: Instant,
    seen: u64,
    at_start: bool,
}

impl Shown<'_> {
    /// Shows what is new, each line with the time at which it was seen; gives it.
    fn show(&mut self) -> String {
        let (count, bytes) = self.parts.console();
        let new = usize::try_from(count - self.seen).unwrap_or(usize::MAX).min(bytes.len());
        self.seen = count;
        let text = String::from_utf8_lossy(&bytes[bytes.len() - new..]).into_owned();
        for line in text.split_inclusive('\n') {
            if self.at_start {
                print!("{:8.3} | ", self.start.elapsed().as_secs_f64());
            }
            print!("{line}");
            self.at_start = line.ends_with('\n');
        }
        let _ = std::io::stdout().flush();
        text
    }

    /// Shows until the machine ends, which is said, or the console shows `text`.
    fn until(&mut self, text: Option<&str>, owner: &mut Owner) -> Option<String> {
        let mut all = String::new();
        loop {
            all.push_str(&self.show());
            if text.is_some_and(|text| all.contains(text)) {
                return None;
            }
            let Some((message, _)) = owner.hear_within(Duration::from_millis(5)) else { continue };
            match message {
                Some(FromLauncher::Ended(end)) => {
                    self.show();
                    return Some(format!("{end:?}"));
                }
                Some(other) => owner.heard.push(other),
                None => return Some("the launcher hung up".to_owned()),
            }
        }
    }
}

/// Says how much memory of a process is resident beside mappings as large as a guest's.
fn memory_kib(pid: u32) -> String {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let (mut size, mut resident, mut dirty) = (0_u64, 0_u64, 0_u64);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next(), words.next().and_then(|value| value.parse().ok()));
        let Some(value) = value else { continue };
        match name {
            Some("Size:") => size = value,
            Some("Rss:") if size < 32 << 10 => resident += value,
            Some("Private_Dirty:") if size < 32 << 10 => dirty += value,
            _ => {}
        }
    }
    format!("{resident} KiB resident, {dirty} KiB of it the process's own")
}
