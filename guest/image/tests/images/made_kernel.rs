//! Small files that look like kernels and modules.

use std::io::Write;

pub(crate) const RELEASE: &str = "6.1.0-test";

#[derive(Clone, Copy, Debug)]
pub(crate) enum Packing {
    None,
    Gzip,
    Xz,
    Lzma,
    Zstd,
    Lz4,
}

pub(crate) const PACKINGS: [Packing; 6] =
    [Packing::None, Packing::Gzip, Packing::Xz, Packing::Lzma, Packing::Zstd, Packing::Lz4];

/// An ELF file with one segment, loaded where kernels are, that holds the banner and `content`.
pub(crate) fn elf(content: &[u8]) -> Vec<u8> {
    let mut body = format!("Linux version %s\0Linux version {RELEASE} (someone@somewhere) #1\n\0")
        .into_bytes();
    body.extend_from_slice(content);
    let mut file = vec![0; 120];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, &2_u16.to_le_bytes());
    put(&mut file, 18, &62_u16.to_le_bytes());
    put(&mut file, 32, &64_u64.to_le_bytes());
    put(&mut file, 54, &56_u16.to_le_bytes());
    put(&mut file, 56, &1_u16.to_le_bytes());
    put(&mut file, 64, &1_u32.to_le_bytes());
    put(&mut file, 72, &120_u64.to_le_bytes());
    put(&mut file, 80, &0xffff_ffff_8100_0000_u64.to_le_bytes());
    put(&mut file, 96, &(body.len() as u64).to_le_bytes());
    file.extend(body);
    file
}

/// A bzImage with this packed payload.
pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 1024 + 64];
    file[0x1f1] = 1;
    put(&mut file, 0x1fe, &0xaa55_u16.to_le_bytes());
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x20f_u16.to_le_bytes());
    put(&mut file, 0x20e, &0x100_u16.to_le_bytes());
    file[0x211] = 1;
    put(&mut file, 0x236, &1_u16.to_le_bytes());
    put(&mut file, 0x248, &64_u32.to_le_bytes());
    put(&mut file, 0x24c, &u32::try_from(payload.len()).expect("small").to_le_bytes());
    put(&mut file, 0x300, format!("{RELEASE} (someone@somewhere) #1\0").as_bytes());
    file.extend_from_slice(payload);
    file.extend_from_slice(&[0xaa; 16]);
    file
}

/// Packs as the kernel's build does: most methods with the unpacked size behind the data.
pub(crate) fn pack(packing: Packing, bytes: &[u8]) -> Vec<u8> {
    let size = u32::try_from(bytes.len()).expect("small").to_le_bytes();
    let packed = match packing {
        Packing::None => return bytes.to_vec(),
        Packing::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(bytes).expect("packs");
            return encoder.finish().expect("packs");
        }
        Packing::Xz => {
            let options = lzma_rust2::XzOptions::default();
            let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).expect("packs");
            writer.write_all(bytes).expect("packs");
            writer.finish().expect("packs")
        }
        Packing::Lzma => {
            let options = lzma_rust2::LzmaOptions::default();
            let mut writer =
                lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).expect("packs");
            writer.write_all(bytes).expect("packs");
            writer.finish().expect("packs")
        }
        Packing::Zstd => {
            ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
        }
        Packing::Lz4 => {
            let mut packed = b"\x02\x21\x4c\x18".to_vec();
            for block in bytes.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                packed.extend(u32::try_from(block.len()).expect("small").to_le_bytes());
                packed.extend(block);
            }
            packed
        }
    };
    [packed.as_slice(), &size].concat()
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}
