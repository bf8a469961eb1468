//! [`Context`]: libkrun's calls, each with its failure under its name.
#![allow(unsafe_code)]
// The crate declares as safe what the header cannot.
#![allow(unused_unsafe)]

use std::{ffi::CStr, io, ptr};

#[cfg(all(feature = "vendored", not(feature = "system")))]
use krun as library;
#[cfg(feature = "system")]
use krun_sys as library;

/// An ELF kernel (`KRUN_KERNEL_FORMAT_ELF`).
const ELF: u32 = 1;

/// A disk that is a plain image (`KRUN_DISK_FORMAT_RAW`).
const RAW: u32 = 0;

/// Log errors alone, to standard error, without colours, whatever the environment says.
const LOG_TARGET: i32 = 2;
const LOG_ERRORS: u32 = 1;
const LOG_NO_STYLE: u32 = 2;
const LOG_NO_ENV: u32 = 1;

/// Sockets of the internet are the host's (`KRUN_TSI_HIJACK_INET`).
const HIJACK_INET: u32 = 1;

/// What a guest may leave to passt, as `linux/virtio_net.h` numbers it: checksums, and cutting TCP's long segments.
const CHECKSUMS: u32 = 1 << 0;
const LONG_SEGMENTS: u32 = 1 << 11;

/// A call that libkrun refused.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed: {error}")]
pub(super) struct Refused {
    call: &'static str,
    error: io::Error,
}

/// A machine that is being described to libkrun.
#[derive(Debug)]
pub(super) struct Context {
    id: u32,
}

/// Names a call after its function and takes its result apart.
macro_rules! call {
    ($function:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: pointers among the arguments are to strings and arrays that end with a null and outlive the call; libkrun
        // copies what it keeps.
        let code = unsafe { library::$function($($argument),*) };
        checked(stringify!($function), code)
    }};
}

impl Context {
    /// Begins a machine that has nothing but what it is given: no console, no vsock, no environment.
    pub(super) fn new() -> Result<Self, Refused> {
        call!(krun_init_log(LOG_TARGET, LOG_ERRORS, LOG_NO_STYLE, LOG_NO_ENV))?;
        let id = call!(krun_create_ctx())?;
        call!(krun_disable_implicit_console(id))?;
        call!(krun_disable_implicit_vsock(id))?;
        // A null in place of the array would mean this process's environment.
        let none = [ptr::null()];
        call!(krun_set_env(id, none.as_ptr()))?;
        Ok(Self { id })
    }

    pub(super) fn set_size(&self, vcpus: u8, memory_mib: u32) -> Result<(), Refused> {
        call!(krun_set_vm_config(self.id, vcpus, memory_mib)).map(drop)
    }

    pub(super) fn set_kernel(
        &self,
        kernel: &CStr,
        initrd: &CStr,
        cmdline: &CStr,
    ) -> Result<(), Refused> {
        call!(krun_set_kernel(self.id, kernel.as_ptr(), ELF, initrd.as_ptr(), cmdline.as_ptr()))
            .map(drop)
    }

    /// Adds the first serial port, which only writes. The descriptor is libkrun's from then on.
    pub(super) fn add_serial_port(&self, output: i32) -> Result<(), Refused> {
        call!(krun_add_serial_console_default(self.id, -1, output)).map(drop)
    }

    /// Adds virtio's console with one port, which is a terminal of the host's. The descriptor is libkrun's from then on.
    pub(super) fn add_virtio_console(&self, terminal: i32) -> Result<(), Refused> {
        let console = call!(krun_add_virtio_console_multiport(self.id))?;
        call!(krun_add_console_port_tty(self.id, console, c"console".as_ptr(), terminal)).map(drop)
    }

    /// Adds a disk that the guest finds by its serial string.
    pub(super) fn add_disk(
        &self,
        serial: &CStr,
        path: &CStr,
        read_only: bool,
    ) -> Result<(), Refused> {
        call!(krun_add_disk2(self.id, serial.as_ptr(), path.as_ptr(), RAW, read_only)).map(drop)
    }

    /// Adds a directory that the guest finds by its tag.
    pub(super) fn add_share(
        &self,
        tag: &CStr,
        path: &CStr,
        read_only: bool,
    ) -> Result<(), Refused> {
        call!(krun_add_virtiofs3(self.id, tag.as_ptr(), path.as_ptr(), 0, read_only)).map(drop)
    }

    /// Adds vsock, and a socket by which the host reaches a port of the guest. With TSI the guest has sockets of the host's
    /// in place of its own; without, libkrun does nothing for a guest that asks for one.
    pub(super) fn add_vsock(&self, port: u32, socket: &CStr, tsi: bool) -> Result<(), Refused> {
        call!(krun_add_vsock(self.id, if tsi { HIJACK_INET } else { 0 }))?;
        call!(krun_add_vsock_port2(self.id, port, socket.as_ptr(), true)).map(drop)
    }

    /// Adds a network device with this hardware address, whose packets go through a socket. The descriptor is libkrun's
    /// from then on.
    pub(super) fn add_network(&self, socket: i32, mac: &[u8; 6]) -> Result<(), Refused> {
        let features = CHECKSUMS | LONG_SEGMENTS;
        // The crate's declaration asks for what it does not write.
        let mut mac = *mac;
        let mac = mac.as_mut_ptr();
        call!(krun_add_net_unixstream(self.id, ptr::null(), socket, mac, features, 0)).map(drop)
    }

    /// Runs the machine. It returns only where that fails: else libkrun ends the process with the guest.
    pub(super) fn enter(self) -> Refused {
        match call!(krun_start_enter(self.id)) {
            Err(refused) => refused,
            Ok(code) => {
                let error = io::Error::other(format!("it came back with {code}"));
                Refused { call: "krun_start_enter", error }
            }
        }
    }
}

/// Takes a result apart: below zero it is the negative of an error's number.
fn checked(call: &'static str, code: i32) -> Result<u32, Refused> {
    u32::try_from(code)
        .map_err(|_| Refused { call, error: io::Error::from_raw_os_error(code.saturating_neg()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_named_after_the_call() {
        let context = Context { id: u32::MAX };
        let refused = context.set_size(1, 64).unwrap_err().to_string();
        assert!(
            refused.contains("krun_set_vm_config") && refused.contains("os error 2"),
            "{refused}"
        );
        let refused = context.add_vsock(1, c"/nowhere", false).unwrap_err().to_string();
        assert!(refused.contains("krun_add_vsock failed"), "{refused}");
    }

    #[test]
    fn what_exists_is_no_place_for_a_socket() {
        let context = Context::new().unwrap();
        let refused = context.add_vsock(1024, c"/dev/null", true).unwrap_err().to_string();
        assert!(
            refused.contains("krun_add_vsock_port2") && refused.contains("exists"),
            "{refused}"
        );
        context.set_size(1, 64).unwrap();
    }
}
