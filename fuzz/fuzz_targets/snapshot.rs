//! A snapshot file that anybody may have written: to the container's reader, and what it lets through to the loader of
//! simulated guests.
//!
//! The first byte says whether the rest is taken as it is, or is a body and a manifest around which header, trailer and
//! hashes are put that hold, so that the input gets past them.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use std::{
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};
use twox_hash::XxHash3_128;
use vm_core::container::{ContainerError, FORMAT, verify_bytes};
use vm_sim::guest::{ProgramRegistry, SimOs};

const HEADER: usize = 64;
const TRAILER: usize = 64;
const HASH: usize = 16;
/// The longest image that is read.
const LONGEST: u64 = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else { return };
    let bytes = if kind & 1 == 0 { rest.to_vec() } else { framed(rest) };
    let bytes = Bytes::from(bytes);
    match verify_bytes(&bytes) {
        Ok((manifest, sections)) => {
            let images: Vec<_> = manifest.sections.iter().filter(|entry| entry.image).collect();
            // Each image has a map, which nobody sees.
            assert_eq!(manifest.sections.len(), sections.iter().count() + 2 * images.len());
            let content: usize = sections.iter().map(|(_, content)| content.len()).sum();
            assert!(content < bytes.len(), "sections that overlap");
            for entry in images {
                let image = sections.image(&entry.name).expect("an image of the manifest");
                match at_once(image.content(LONGEST)) {
                    Ok(content) => {
                        assert_eq!(content.len() as u64, image.total());
                        let _ = SimOs::load(&content, Arc::new(ProgramRegistry::new()));
                    }
                    Err(_) => assert!(image.total() > LONGEST, "an image that was verified"),
                }
            }
            for (_, content) in sections.iter() {
                let _ = SimOs::load(content, Arc::new(ProgramRegistry::new()));
            }
            // What was read once is read again, and not with a bit more.
            let mut longer = bytes.to_vec();
            longer.push(0);
            assert!(verify_bytes(&longer.into()).is_err());
        }
        Err(ContainerError::Corrupt(_) | ContainerError::Incompatible { .. }) => {}
        Err(other) => panic!("{other:?}"),
    }
});

/// Waits for what never waits.
fn at_once<T>(work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    let mut context = Context::from_waker(Waker::noop());
    match work.as_mut().poll(&mut context) {
        Poll::Ready(done) => done,
        Poll::Pending => panic!("bytes in memory were waited for"),
    }
}

/// Puts header and trailer around a body, whose length the first two bytes say, and a manifest. `%` in the manifest
/// becomes the hash of the body, which no fuzzer would find.
fn framed(input: &[u8]) -> Vec<u8> {
    let Some((length, rest)) = input.split_first_chunk::<2>() else { return Vec::new() };
    let (body, manifest) = rest.split_at(rest.len().min(u16::from_le_bytes(*length).into()));
    let digits = format!("{:032x}", XxHash3_128::oneshot(body));
    let manifest = manifest.split(|byte| *byte == b'%').collect::<Vec<_>>().join(digits.as_bytes());
    let mut bytes = b"\x89twinvm snap\r\n\x1a\n".to_vec();
    bytes.extend(FORMAT.to_le_bytes());
    bytes.resize(HEADER - HASH, 0);
    seal(&mut bytes, 0);
    bytes.extend(body);
    let at = bytes.len();
    bytes.extend(&manifest);
    let trailer = bytes.len();
    bytes.extend(b"twinvm.\n");
    for number in [trailer + TRAILER, at, manifest.len()] {
        bytes.extend((number as u64).to_le_bytes());
    }
    bytes.extend(XxHash3_128::oneshot(&manifest).to_be_bytes());
    seal(&mut bytes, trailer);
    bytes
}

/// Appends the hash of all from `start` on.
fn seal(bytes: &mut Vec<u8>, start: usize) {
    let hash = XxHash3_128::oneshot(&bytes[start..]);
    bytes.extend(hash.to_be_bytes());
}
