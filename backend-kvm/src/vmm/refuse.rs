//! Ways to make a [`Refusal`].

use crate::control::Refusal;
use std::io;
pub(super) use vm_launcher::inside::refuse::{config, failed};

/// As [`failed`], for what KVM answers.
pub(super) fn kvm_failed(what: &str) -> impl Fn(kvm_ioctls::Error) -> Refusal + '_ {
    move |error| failed(what, io::Error::from_raw_os_error(error.errno()))
}
