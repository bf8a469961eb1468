//! From sections to what a launcher is sent.

use super::{
    MEMORY, PAGE, STATE, disk_section,
    pieces::{self, MemoryPiece},
};
use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    sync::Arc,
};
use tokio::task::spawn_blocking;
use vm_core::{
    image::{Image, Piece},
    machine::{MachineError, Sections},
};
use vm_launcher::{files, life::host};

/// How much of an image is copied in one go.
const STEP: u64 = 1 << 20;

/// What is saved of a machine, in files.
#[derive(Debug)]
pub(crate) struct Saved {
    /// All but memory and disks.
    pub(crate) state: File,
    /// Which part of memory stands where.
    pub(crate) pieces: File,
    /// What memory stands in.
    pub(crate) memory: Vec<File>,
    /// Each writable disk, in a file without a name.
    pub(crate) disks: Vec<File>,
}

impl Saved {
    /// Gets ready what was saved of a machine with so many writable disks. Memory stays where it is, and is not verified.
    ///
    /// # Errors
    /// [`MachineError::Corrupt`], and those of the host.
    pub(crate) async fn new(sections: &Sections, disks: usize) -> Result<Self, MachineError> {
        let (pieces, memory) = files_of(sections.image(MEMORY)?).await?;
        let mut restored = Vec::with_capacity(disks);
        for number in 0..disks {
            restored.push(restore_disk(sections.image(&disk_section(number))?).await?);
        }
        let in_memory = |name, bytes: &[u8]| memory_file(name, bytes).map_err(|error| host(&error));
        Ok(Self {
            state: in_memory(STATE, sections.get(STATE)?)?,
            pieces: in_memory("pieces", &pieces::encode(&pieces))?,
            memory,
            disks: restored,
        })
    }
}

/// Gives the files of an image that can be mapped, and what of it stands where; what cannot is copied into one that can.
async fn files_of(image: &Image) -> Result<(Vec<MemoryPiece>, Vec<File>), MachineError> {
    let mut files: Vec<File> = Vec::new();
    // The number of each layer's file.
    let mut numbers = vec![None; image.layers().len()];
    let mut copies: Option<Copies> = None;
    let mut found = Vec::with_capacity(image.pieces().len());
    for piece in image.pieces() {
        let layer = image.layers().get(piece.layer).filter(|_| piece.at % PAGE == 0);
        let (file, at) = match layer.and_then(|layer| layer.reader().file()) {
            Some(file) => {
                let number = match numbers[piece.layer] {
                    Some(number) => number,
                    None => {
                        files.push(file.try_clone().map_err(|error| host(&error))?);
                        *numbers[piece.layer].insert(files.len() - 1)
                    }
                };
                (number, piece.at)
            }
            None => {
                let copies = match &mut copies {
                    Some(copies) => copies,
                    None => {
                        let (kept, file) = Copies::new().map_err(|error| host(&error))?;
                        files.push(file);
                        copies.insert(Copies { number: files.len() - 1, ..kept })
                    }
                };
                (copies.number, copies.take(image, *piece).await?)
            }
        };
        let Piece { offset: address, length, .. } = *piece;
        found.push(MemoryPiece { address, length, file: file as u64, at });
    }
    Ok((pieces::joined(found.into_iter()), files))
}

/// Copies of what cannot be mapped, one after the other in a file.
struct Copies {
    file: File,
    end: u64,
    /// The file's number.
    number: usize,
}

impl Copies {
    fn new() -> io::Result<(Self, File)> {
        let file = memory_file(MEMORY, &[])?;
        let given = file.try_clone()?;
        Ok((Self { file, end: 0, number: 0 }, given))
    }

    /// Copies a piece, and says where to.
    async fn take(&mut self, image: &Image, piece: Piece) -> Result<u64, MachineError> {
        let start = self.end;
        for step in steps(piece) {
            let bytes = image.read(step).await?;
            self.file.write_all_at(&bytes, self.end).map_err(|error| host(&error))?;
            self.end += step.length;
        }
        Ok(start)
    }
}

/// Puts a disk into a file without a name.
async fn restore_disk(image: &Image) -> Result<File, MachineError> {
    let disk = Arc::new(files::nameless()?);
    disk.set_len(image.total()).map_err(|error| host(&error))?;
    // All of it is verified by the time that its end is reached.
    let mut content = image.read_through();
    while let Some((offset, bytes)) = content.next().await? {
        let disk = disk.clone();
        let written = spawn_blocking(move || disk.write_all_at(&bytes, offset)).await;
        let written = written.map_err(|error| MachineError::Failed(error.to_string()))?;
        written.map_err(|error| host(&error))?;
    }
    // Whoever wrote has ended.
    Arc::try_unwrap(disk).or_else(|disk| disk.try_clone()).map_err(|error| host(&error))
}

/// Cuts a piece into some that are read in one go.
fn steps(piece: Piece) -> impl Iterator<Item = Piece> {
    let cut = move |from: u64| Piece {
        offset: piece.offset + from,
        length: (piece.length - from).min(STEP),
        at: piece.at + from,
        ..piece
    };
    (0..piece.length.div_ceil(STEP)).map(move |number| cut(number * STEP))
}

fn memory_file(name: &str, bytes: &[u8]) -> io::Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::memfd_create(name, flags)?);
    file.write_all(bytes)?;
    Ok(file)
}
