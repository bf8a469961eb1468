//! The virtio-mmio registers and the rings that they name, over the device that asks least of its requests.
#![no_main]

mod device;
mod input;

use device::Play;
use libfuzzer_sys::fuzz_target;
use vm_kvm_devices::{EntropyDevice, testing::Buffer};

fuzz_target!(|input: &[u8]| {
    let mut play = Play::new(|| EntropyDevice::new().expect("a device"));
    play.run(input);
    play.guest.reset();
    assert_eq!(play.guest.status(), 0);
    assert!(!play.guest.host_waits());
    play.start(u64::MAX);
    let used = play.ask(&[Buffer { address: 0x4000, length: 64, writable: true }]);
    assert_eq!(used, [(0, 64)]);
});
