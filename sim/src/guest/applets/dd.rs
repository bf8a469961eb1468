//! `dd`.

use super::{
    super::{
        program::{Step, WaitFor},
        syscalls::{FdStat, OpenFlags, READ, Syscalls},
    },
    Flush, Out, errno_text, options,
};
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use vm_guest_agent::os::Errno;

const MAX_BLOCK: u64 = 64 << 20;

/// A copy in progress.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in super::super) struct Copy {
    input: u32,
    output: u32,
    block: usize,
    left: Option<u64>,
    skip: u64,
    fsync: bool,
    quiet: bool,
    full_blocks: bool,
    buffer: BytesMut,
    pending: Bytes,
    whole_in: u64,
    part_in: u64,
    whole_out: u64,
    part_out: u64,
    copied: u64,
    end: Option<Out>,
    code: u8,
}

#[derive(Default)]
struct Operands {
    input: Option<String>,
    output: Option<String>,
    block: Option<u64>,
    count: Option<u64>,
    skip: u64,
    seek: u64,
    notrunc: bool,
    fsync: bool,
    append: bool,
    quiet: bool,
    full_blocks: bool,
}

impl Operands {
    fn read(argv: &[String]) -> Result<Self, String> {
        let mut it = Self::default();
        for word in argv.iter().skip(1) {
            let Some((name, value)) = word.split_once('=') else {
                return Err(format!("unrecognized operand '{word}'"));
            };
            let number = || options::size(value).ok_or(format!("invalid number '{value}'"));
            match name {
                "if" => it.input = Some(value.to_owned()),
                "of" => it.output = Some(value.to_owned()),
                "bs" | "ibs" | "obs" => it.block = Some(number()?),
                "count" => it.count = Some(number()?),
                "skip" => it.skip = number()?,
                "seek" => it.seek = number()?,
                "status" => it.quiet = matches!(value, "none" | "noxfer"),
                "iflag" if value == "fullblock" => it.full_blocks = true,
                "conv" | "oflag" => {
                    for flag in value.split(',') {
                        match flag {
                            "notrunc" => it.notrunc = true,
                            "fsync" | "fdatasync" | "sync" if name == "conv" => it.fsync = true,
                            "append" if name == "oflag" => it.append = true,
                            other => return Err(format!("invalid argument '{other}' to '{name}'")),
                        }
                    }
                }
                _ => return Err(format!("unrecognized operand '{word}'")),
            }
        }
        match it.block {
            Some(block) if block == 0 || block > MAX_BLOCK => {
                Err(format!("number {block} is not in 1..{MAX_BLOCK} range"))
            }
            _ => Ok(it),
        }
    }
}

impl Copy {
    pub(super) fn start(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> Option<Self> {
        let begun = Operands::read(argv).and_then(|it| Self::open(sys, &it));
        begun.map_err(|message| out.error(&message)).ok()
    }

    fn open(sys: &mut Syscalls<'_>, it: &Operands) -> Result<Self, String> {
        let failed = |path: &str| {
            let path = path.to_owned();
            move |errno| format!("can't open '{path}': {}", errno_text(errno))
        };
        let input = match &it.input {
            Some(path) => sys.open(path, READ, 0).map_err(failed(path))?,
            None => 0,
        };
        let block = it.block.unwrap_or(512);
        let output = match &it.output {
            Some(path) => {
                let flags = OpenFlags {
                    write: true,
                    create: true,
                    append: it.append,
                    truncate: !it.notrunc && !it.append && it.seek == 0,
                    ..OpenFlags::default()
                };
                let fd = sys.open(path, flags, 0o666).map_err(failed(path))?;
                if it.seek > 0 {
                    let offset = it.seek.saturating_mul(block);
                    let cut = if it.notrunc { Ok(()) } else { sys.ftruncate(fd, offset) };
                    cut.and_then(|()| sys.seek(fd, offset)).map_err(failed(path))?;
                }
                fd
            }
            None => 1,
        };
        let mut skip = it.skip.saturating_mul(block);
        if skip > 0 && sys.seek(input, skip).is_ok() {
            skip = 0;
        }
        Ok(Self {
            input,
            output,
            block: usize::try_from(block).unwrap_or(512),
            left: it.count,
            skip,
            fsync: it.fsync,
            quiet: it.quiet,
            full_blocks: it.full_blocks,
            buffer: BytesMut::new(),
            pending: Bytes::new(),
            whole_in: 0,
            part_in: 0,
            whole_out: 0,
            part_out: 0,
            copied: 0,
            end: None,
            code: 0,
        })
    }

    pub(super) fn step(&mut self, sys: &mut Syscalls<'_>) -> Step {
        if let Some(out) = &mut self.end {
            return match out.flush(sys) {
                Flush::Done | Flush::Failed => Step::Exit(self.code),
                Flush::Wait(wait) => Step::Block(wait),
            };
        }
        if !self.pending.is_empty() {
            return self.write(sys);
        }
        if self.left == Some(0) {
            self.finish(sys, None);
            return Step::Continue;
        }
        let want = match self.skip {
            0 => self.block - self.buffer.len(),
            skip => usize::try_from(skip).unwrap_or(usize::MAX).min(self.block),
        };
        match sys.read(self.input, want) {
            Ok(bytes) if bytes.is_empty() => {
                let rest = self.buffer.split().freeze();
                if rest.is_empty() {
                    self.finish(sys, None);
                } else {
                    self.take_block(rest);
                    self.left = Some(0);
                }
            }
            Ok(bytes) if self.skip > 0 => self.skip -= bytes.len() as u64,
            Ok(bytes) => self.gather(sys, bytes),
            Err(Errno::AGAIN) => return Step::Block(WaitFor::readable(self.input)),
            Err(errno) => self.finish(sys, Some(format!("read error: {}", errno_text(errno)))),
        }
        Step::Continue
    }

    /// Puts pieces together to a block where whole ones are asked for or the input gives them in pieces by itself.
    fn gather(&mut self, sys: &Syscalls<'_>, bytes: Bytes) {
        let in_pieces = matches!(sys.fstat(self.input), Ok(FdStat::Pipe | FdStat::Terminal));
        if self.buffer.is_empty() && (bytes.len() == self.block || in_pieces && !self.full_blocks) {
            self.take_block(bytes);
            return;
        }
        self.buffer.extend_from_slice(&bytes);
        if self.buffer.len() == self.block {
            let block = self.buffer.split().freeze();
            self.take_block(block);
        }
    }

    fn take_block(&mut self, bytes: Bytes) {
        *(if bytes.len() == self.block { &mut self.whole_in } else { &mut self.part_in }) += 1;
        self.left = self.left.map(|left| left.saturating_sub(1));
        self.pending = bytes;
    }

    fn write(&mut self, sys: &mut Syscalls<'_>) -> Step {
        match sys.write(self.output, self.pending.clone()) {
            Ok(taken) => {
                self.copied += taken as u64;
                let rest = self.pending.slice(taken..);
                if rest.is_empty() {
                    let whole = self.copied == self.whole_in * self.block as u64;
                    *(if whole { &mut self.whole_out } else { &mut self.part_out }) += 1;
                }
                self.pending = rest;
            }
            Err(Errno::AGAIN) => return Step::Block(WaitFor::writable(self.output)),
            Err(errno) => {
                self.pending = Bytes::new();
                self.finish(sys, Some(format!("error writing: {}", errno_text(errno))));
            }
        }
        Step::Continue
    }

    fn finish(&mut self, sys: &mut Syscalls<'_>, error: Option<String>) {
        let mut out = Out::new("dd");
        if let Some(message) = error {
            out.error(&message);
            self.code = 1;
        } else if self.fsync
            && let Err(errno) = sys.fsync(self.output)
        {
            out.error(&format!("fsync: {}", errno_text(errno)));
            self.code = 1;
        }
        if !self.quiet {
            let summary = format!(
                "{}+{} records in\n{}+{} records out\n",
                self.whole_in, self.part_in, self.whole_out, self.part_out
            );
            out.put_to(2, summary.as_bytes());
        }
        self.end = Some(out);
    }
}
