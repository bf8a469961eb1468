//! [`Capture`]: from a launcher's copy to sections.

use super::{
    MAX_STATE, MEMORY, STATE, disk_section,
    frame::{Frame, HEADER, Part},
    runs::Runs,
    runs_section,
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use std::io;
use tokio::{io::AsyncReadExt, net::unix::pipe};
use vm_core::machine::{Captured, MachineError, SectionSink};

/// A state that a launcher's copy writes into a pipe. Dropped, it ends the copy, which can write no more.
#[derive(Debug)]
pub(crate) struct Capture {
    pipe: pipe::Receiver,
    /// Where memory ends, as a guest's physical address.
    memory_end: u64,
    /// The lengths of the disks, in their order.
    disks: Vec<u64>,
}

impl Capture {
    /// Reads from the pipe, up to which a machine with so much memory and these writable disks may write.
    pub(crate) fn new(pipe: pipe::Receiver, memory_end: u64, disks: Vec<u64>) -> Self {
        Self { pipe, memory_end, disks }
    }

    async fn next(&mut self) -> Result<(Frame, Bytes), MachineError> {
        let read = async {
            let mut header = [0; HEADER];
            self.pipe.read_exact(&mut header).await?;
            let frame = Frame::decode(header)?;
            let mut content = BytesMut::zeroed(frame.len);
            self.pipe.read_exact(&mut content).await?;
            Ok::<_, io::Error>((frame, content.freeze()))
        };
        read.await.map_err(|error| broken(&error.to_string()))
    }

    /// Lists the parts in the order in which they come, each with its section and the length of the whole.
    fn parts(&self) -> Vec<(Part, String, u64)> {
        let disks = (0_u8..)
            .zip(&self.disks)
            .map(|(number, len)| (Part::Disk(number), disk_section(usize::from(number)), *len));
        let first = [
            (Part::State, STATE.to_owned(), MAX_STATE),
            (Part::Memory, MEMORY.to_owned(), self.memory_end),
        ];
        first.into_iter().chain(disks).collect()
    }
}

#[async_trait]
impl Captured for Capture {
    async fn write(&mut self, sections: &mut dyn SectionSink) -> Result<(), MachineError> {
        let (mut frame, mut content) = self.next().await?;
        for (part, name, total) in self.parts() {
            let mut runs = Runs::new(total);
            sections.begin(&name).await?;
            while frame.part == part {
                runs.add(frame.offset, content.len() as u64).map_err(|why| broken(&why))?;
                sections.write(content).await?;
                (frame, content) = self.next().await?;
            }
            if part != Part::State {
                sections.begin(&runs_section(&name)).await?;
                sections.write(runs.encode()).await?;
            }
        }
        match frame.part {
            Part::End => Ok(()),
            other => Err(broken(&format!("{other:?} is not to come here"))),
        }
    }
}

fn broken(why: &str) -> MachineError {
    MachineError::Failed(format!("the launcher's copy does not write its state: {why}"))
}
