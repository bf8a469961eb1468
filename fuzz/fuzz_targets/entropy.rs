//! Any requests for random bytes, then a good one.
#![no_main]

mod device;
mod input;

use device::Play;
use libfuzzer_sys::fuzz_target;
use vm_kvm_devices::{EntropyDevice, testing::Buffer};

fuzz_target!(|input: &[u8]| {
    let mut play = Play::new(|| EntropyDevice::new().expect("a device"));
    play.start(u64::MAX);
    play.run(input);
    play.start(0);
    let used = play.ask(&[Buffer { address: 0x4000, length: 64, writable: true }]);
    assert_eq!(used, [(0, 64)]);
});
