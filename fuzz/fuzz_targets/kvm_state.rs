//! A file with a machine's saved state that anybody may have written, to the launcher that is to go on from it: vCPUs,
//! interrupt controllers, clock and devices.
//!
//! The first byte says whether the rest is taken as it is, or the version comes before it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vm_backend_kvm::vmm::fuzzing::saved_state;

/// The version of states that are read, as it is written.
const VERSION: u8 = 1;

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else { return };
    let mut bytes = rest.to_vec();
    if kind & 1 == 1 {
        bytes.insert(0, VERSION);
    }
    let Some(written) = saved_state(&bytes) else { return };
    // What was read once is read again, and not with a bit more or less.
    assert_eq!(saved_state(&written).as_ref(), Some(&written));
    let mut longer = bytes.clone();
    longer.push(0);
    assert_eq!(saved_state(&longer), None);
    bytes.pop();
    assert_eq!(saved_state(&bytes), None);
});
