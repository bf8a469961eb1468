//! What KVM says about an exit that ends a machine.
#![allow(unsafe_code)]

use kvm_ioctls::VcpuFd;
use std::fmt::Write;

/// Describes the last `KVM_EXIT_INTERNAL_ERROR`, for people.
pub(super) fn internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    // SAFETY: by the caller's word the last exit was an internal error, so this is the member that KVM filled in; it
    // is plain integers, for which every content is valid.
    let (suberror, count, data) = unsafe {
        let internal = run.__bindgen_anon_1.internal;
        (internal.suberror, internal.ndata, internal.data)
    };
    let mut text = format!("KVM internal error {suberror}");
    for value in data.iter().take(usize::try_from(count).unwrap_or(0)) {
        // Writing to a string cannot fail.
        let _ = write!(text, " {value:#x}");
    }
    text
}
