//! [`Capture`]: from a launcher's copy to sections.

use super::{
    MAX_STATE, MEMORY, STATE, disk_section,
    frame::{Frame, HEADER, Part, Told},
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use std::io;
use tokio::{io::AsyncReadExt, net::unix::pipe};
use vm_core::machine::{Captured, Generation, MachineError, SectionSink};

/// A state that a launcher's copy writes into a pipe. Dropped, it ends the copy, which can write no more.
#[derive(Debug)]
pub(crate) struct Capture {
    pipe: pipe::Receiver,
    /// Where memory ends, as a guest's physical address.
    memory_end: u64,
    /// The lengths of the disks, in their order.
    disks: Vec<u64>,
    generation: Option<Generation>,
}

/// What comes next: a header, and the content that follows it, if any.
type Next = (Frame, Bytes);

impl Capture {
    /// Reads from the pipe what a machine with so much memory and these writable disks may write.
    pub(crate) fn new(
        pipe: pipe::Receiver,
        memory_end: u64,
        disks: Vec<u64>,
        generation: Option<Generation>,
    ) -> Self {
        Self { pipe, memory_end, disks, generation }
    }

    async fn next(&mut self) -> Result<Next, MachineError> {
        let read = async {
            let mut header = [0; HEADER];
            self.pipe.read_exact(&mut header).await?;
            let frame = Frame::decode(header)?;
            let length = match frame.told {
                Told::Content(length) => length,
                Told::Zeros(_) => 0,
            };
            let mut content = BytesMut::zeroed(length);
            self.pipe.read_exact(&mut content).await?;
            Ok::<_, io::Error>((frame, content.freeze()))
        };
        read.await.map_err(|error| broken(&error.to_string()))
    }

    /// Writes the state, which begins with `next`; gives what comes after it.
    async fn state(
        &mut self,
        mut next: Next,
        sections: &mut dyn SectionSink,
    ) -> Result<Next, MachineError> {
        sections.begin(STATE).await?;
        let mut end = 0;
        while next.0.part == Part::State {
            let (frame, content) = next;
            if frame.offset != end {
                return Err(broken(&format!("state at {}, not {end}", frame.offset)));
            }
            end = follow(&frame, end, MAX_STATE)?;
            sections.write(content).await?;
            next = self.next().await?;
        }
        Ok(next)
    }

    /// Writes an image, which begins with `next`; gives what comes after it.
    async fn image(
        &mut self,
        mut next: Next,
        (part, name, total): (Part, &str, u64),
        sections: &mut dyn SectionSink,
    ) -> Result<Next, MachineError> {
        sections.begin_image(name, total).await?;
        let mut end = 0;
        while next.0.part == part {
            let (frame, content) = next;
            end = follow(&frame, end, total)?;
            match frame.told {
                Told::Content(_) => sections.write_at(frame.offset, content).await?,
                Told::Zeros(length) => sections.zeros_at(frame.offset, length).await?,
            }
            next = self.next().await?;
        }
        Ok(next)
    }
}

#[async_trait]
impl Captured for Capture {
    fn generation(&self) -> Option<Generation> {
        self.generation
    }

    async fn write(&mut self, sections: &mut dyn SectionSink) -> Result<(), MachineError> {
        let next = self.next().await?;
        let next = self.state(next, sections).await?;
        let memory = (Part::Memory, MEMORY, self.memory_end);
        let mut next = self.image(next, memory, sections).await?;
        for (number, total) in (0_u8..).zip(self.disks.clone()) {
            let name = disk_section(usize::from(number));
            next = self.image(next, (Part::Disk(number), &name, total), sections).await?;
        }
        match next.0.part {
            Part::End => Ok(()),
            other => Err(broken(&format!("{other:?} is not to come here"))),
        }
    }
}

/// Checks that a frame lies behind all before it, and within the whole; gives its end.
fn follow(frame: &Frame, end: u64, total: u64) -> Result<u64, MachineError> {
    let length = match frame.told {
        Told::Content(length) => length as u64,
        Told::Zeros(length) => length,
    };
    let new_end = frame.offset.checked_add(length);
    let new_end = new_end.filter(|new_end| frame.offset >= end && *new_end <= total);
    new_end.ok_or_else(|| {
        let Frame { part, offset, .. } = frame;
        broken(&format!("{length} bytes of {part:?} at {offset:#x} of {total:#x}, after {end:#x}"))
    })
}

fn broken(why: &str) -> MachineError {
    MachineError::Failed(format!("the launcher's copy does not write its state: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    /// How long the tests' memory and disk are.
    const TOTAL: u64 = 1000;

    /// Keeps what is written, as text.
    #[derive(Debug, Default)]
    struct Kept(Vec<String>);

    #[async_trait]
    impl SectionSink for Kept {
        async fn begin(&mut self, name: &str) -> Result<(), MachineError> {
            self.0.push(name.to_owned());
            Ok(())
        }

        async fn write(&mut self, bytes: Bytes) -> Result<(), MachineError> {
            self.0.push(format!("{} bytes", bytes.len()));
            Ok(())
        }

        async fn begin_image(&mut self, name: &str, total: u64) -> Result<(), MachineError> {
            self.0.push(format!("{name} of {total}"));
            Ok(())
        }

        async fn write_at(&mut self, offset: u64, bytes: Bytes) -> Result<(), MachineError> {
            self.0.push(format!("{} bytes at {offset}", bytes.len()));
            Ok(())
        }

        async fn zeros_at(&mut self, offset: u64, length: u64) -> Result<(), MachineError> {
            self.0.push(format!("{length} zeros at {offset}"));
            Ok(())
        }
    }

    fn take(frames: &[Frame]) -> (Result<(), MachineError>, Vec<String>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        runtime.block_on(async {
            let (ours, mut its) = io::pipe().unwrap();
            for frame in frames {
                its.write_all(&frame.encode()).unwrap();
                if let Told::Content(length) = frame.told {
                    its.write_all(&vec![1; length]).unwrap();
                }
            }
            drop(its);
            let ours = pipe::Receiver::from_owned_fd(ours.into()).unwrap();
            let mut capture = Capture::new(ours, TOTAL, vec![TOTAL], Some(Generation(3)));
            assert_eq!(capture.generation(), Some(Generation(3)));
            let mut kept = Kept::default();
            (capture.write(&mut kept).await, kept.0)
        })
    }

    fn frame(part: Part, offset: u64, told: Told) -> Frame {
        Frame { part, offset, told }
    }

    const END: Frame = Frame { part: Part::End, offset: 0, told: Told::Content(0) };

    #[test]
    fn frames_become_sections() {
        let (done, kept) = take(&[
            frame(Part::State, 0, Told::Content(10)),
            frame(Part::State, 10, Told::Content(5)),
            frame(Part::Memory, 100, Told::Zeros(50)),
            frame(Part::Memory, 150, Told::Content(50)),
            frame(Part::Disk(0), 0, Told::Zeros(TOTAL)),
            END,
        ]);
        done.unwrap();
        let expected = [
            "kvm.state",
            "10 bytes",
            "5 bytes",
            "kvm.memory of 1000",
            "50 zeros at 100",
            "50 bytes at 150",
            "kvm.disk0 of 1000",
            "1000 zeros at 0",
        ];
        assert_eq!(kept, expected);
    }

    #[test]
    fn frames_out_of_place_are_refused() {
        let state = frame(Part::State, 0, Told::Content(10));
        let memory = |offset, told| frame(Part::Memory, offset, told);
        let wrong: [&[Frame]; 9] = [
            &[],
            &[state],
            &[frame(Part::State, 1, Told::Content(10)), END],
            &[state, memory(100, Told::Content(50)), memory(149, Told::Zeros(1)), END],
            &[state, memory(TOTAL, Told::Zeros(1)), END],
            &[state, memory(1, Told::Zeros(u64::MAX)), END],
            &[state, memory(TOTAL - 1, Told::Content(2)), END],
            &[state, frame(Part::Disk(1), 0, Told::Zeros(1)), END],
            &[state, frame(Part::Disk(0), 0, Told::Zeros(1)), memory(0, Told::Zeros(1)), END],
        ];
        for frames in wrong {
            let (done, _) = take(frames);
            assert!(matches!(done, Err(MachineError::Failed(_))), "{frames:?}: {done:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn what_is_written_is_in_order_and_inside(
            frames in prop::collection::vec(
                (0_usize..4, 0_u64..1100, 1_usize..400, any::<bool>()), 0..12),
        ) {
            let parts = [Part::State, Part::Memory, Part::Disk(0), Part::End];
            let frames: Vec<_> = frames.into_iter().map(|(part, offset, length, zeros)| {
                let part = parts[part];
                match part {
                    Part::End => END,
                    Part::State => frame(part, offset, Told::Content(length)),
                    _ if zeros => frame(part, offset, Told::Zeros(length as u64)),
                    _ => frame(part, offset, Told::Content(length)),
                }
            }).collect();
            let (done, kept) = take(&frames);
            let mut end = 0;
            for line in &kept {
                if line.contains(" of ") {
                    end = 0;
                } else if let Some((length, offset)) = line.split_once(" at ") {
                    let length: u64 = length.split(' ').next().unwrap().parse().unwrap();
                    let offset: u64 = offset.parse().unwrap();
                    prop_assert!(offset >= end && offset + length <= TOTAL, "{kept:?}");
                    end = offset + length;
                }
            }
            prop_assert!(done.is_err() || frames.contains(&END));
        }
    }
}
