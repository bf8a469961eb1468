//! Unpacks what kernels and their modules are compressed with.

use std::io::{self, Read, Write};

/// Memory a decoder may use for its window, in KiB. Kernels are compressed with windows of up to 128 MiB.
const MAX_WINDOW_KIB: u32 = 192 << 10;

/// How much one block of the old LZ4 format holds, unpacked.
const LZ4_BLOCK_BYTES: usize = 8 << 20;

/// How something is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Gzip,
    Xz,
    Lzma,
    Zstd,
    Lz4,
    Bzip2,
    Lzo,
}

impl Method {
    /// Tells it by the first bytes.
    pub(crate) fn of(bytes: &[u8]) -> Option<Self> {
        const MAGIC: [(&[u8], Method); 7] = [
            (b"\x1f\x8b", Method::Gzip),
            (b"\xfd7zXZ\0", Method::Xz),
            (b"\x5d\0\0", Method::Lzma),
            (b"\x28\xb5\x2f\xfd", Method::Zstd),
            (b"\x02\x21\x4c\x18", Method::Lz4),
            (b"BZh", Method::Bzip2),
            (b"\x89LZO\0\r\n\x1a\n", Method::Lzo),
        ];
        MAGIC.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, method)| *method)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Bzip2 => "bzip2",
            Self::Lzo => "lzo",
        }
    }
}

/// Why something could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnpackError {
    #[error("compressed with {}, which is not supported", .0.name())]
    Unsupported(Method),
    #[error("larger than {0} bytes when unpacked")]
    TooLarge(u64),
    #[error("the {} data cannot be unpacked: {}", .0.name(), .1)]
    Damaged(Method, String),
    #[error(transparent)]
    Write(io::Error),
}

/// Unpacks `packed` into `out`, at most `limit` bytes; returns how many. What follows the compressed data is ignored:
/// a kernel's payload ends with its unpacked size.
pub(crate) fn unpack(
    method: Method,
    packed: &[u8],
    out: &mut impl Write,
    limit: u64,
) -> Result<u64, UnpackError> {
    let damaged = |error: &dyn std::fmt::Display| UnpackError::Damaged(method, error.to_string());
    match method {
        Method::Gzip => copy(method, flate2::bufread::GzDecoder::new(packed), out, limit),
        Method::Xz => copy(
            method,
            lzma_rust2::XzReader::new_mem_limit(packed, false, MAX_WINDOW_KIB),
            out,
            limit,
        ),
        Method::Lzma => {
            let reader = lzma_rust2::LzmaReader::new_mem_limit(packed, MAX_WINDOW_KIB, None);
            copy(method, reader.map_err(|error| damaged(&error))?, out, limit)
        }
        Method::Zstd => {
            let window = u64::from(MAX_WINDOW_KIB) << 10;
            let reader =
                ruzstd::decoding::StreamingDecoder::new_with_max_window_size(packed, window);
            copy(method, reader.map_err(|error| damaged(&error))?, out, limit)
        }
        Method::Lz4 => unpack_lz4(packed, out, limit),
        Method::Bzip2 | Method::Lzo => Err(UnpackError::Unsupported(method)),
    }
}

fn copy(
    method: Method,
    mut reader: impl Read,
    out: &mut impl Write,
    limit: u64,
) -> Result<u64, UnpackError> {
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        let count = match reader.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(UnpackError::Damaged(method, error.to_string())),
        };
        total += count as u64;
        if total > limit {
            return Err(UnpackError::TooLarge(limit));
        }
        out.write_all(&buffer[..count]).map_err(UnpackError::Write)?;
    }
}

/// Unpacks LZ4's old format, the one that Linux uses: after the magic number blocks, each behind its packed size
/// (`lz4_Frame_format.md`, "Legacy frame"). Linux puts the unpacked size, which is no block, behind the last one.
fn unpack_lz4(packed: &[u8], out: &mut impl Write, limit: u64) -> Result<u64, UnpackError> {
    let damaged = |reason: &str| UnpackError::Damaged(Method::Lz4, reason.to_owned());
    let mut rest = packed.get(4..).unwrap_or_default();
    let mut block = vec![0; LZ4_BLOCK_BYTES];
    let mut total = 0;
    while let Some((size, after)) = rest.split_first_chunk().filter(|(_, after)| !after.is_empty())
    {
        let size = usize::try_from(u32::from_le_bytes(*size))
            .map_err(|_| damaged("a block is too long"))?;
        let input = after.get(..size).ok_or_else(|| damaged("it ends within a block"))?;
        let count = lz4_flex::block::decompress_into(input, &mut block)
            .map_err(|error| damaged(&error.to_string()))?;
        total += count as u64;
        if total > limit {
            return Err(UnpackError::TooLarge(limit));
        }
        out.write_all(&block[..count]).map_err(UnpackError::Write)?;
        rest = &after[size..];
    }
    Ok(total)
}
