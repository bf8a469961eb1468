//! The launcher as its owner meets it: machines with kernels of a few instructions, and owners that make no sense.
//!
//! A program of its own in place of the usual test harness, because it also plays an owner that is killed.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![forbid(unsafe_code)]

mod changes;
mod copies;
mod hostile;
mod life;
mod machine;
mod owner;
mod saved;
mod vsock;

use libtest_mimic::{Arguments, Failed, Trial};
use std::{env, fs::File, path::PathBuf, process::ExitCode};

/// A test that needs no KVM, or one that does.
type Test = (&'static str, fn());

fn main() -> ExitCode {
    if env::var_os(life::OWNER_VARIABLE).is_some() {
        life::own_until_killed();
        return ExitCode::FAILURE;
    }
    let missing = File::options().read(true).write(true).open("/dev/kvm").err();
    let mut trials: Vec<Trial> = [life::WITHOUT_KVM, hostile::WITHOUT_KVM]
        .concat()
        .into_iter()
        .map(|(name, test)| trial(name, test))
        .collect();
    for (name, test) in [
        machine::TESTS,
        copies::TESTS,
        saved::TESTS,
        changes::TESTS,
        vsock::TESTS,
        life::WITH_KVM,
        hostile::WITH_KVM,
    ]
    .concat()
    {
        trials.push(match &missing {
            None => trial(name, test),
            Some(error) => trial(name, test)
                .with_kind(format!("ignored: /dev/kvm: {error}"))
                .with_ignored_flag(true),
        });
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn trial(name: &'static str, test: fn()) -> Trial {
    Trial::test(name, move || {
        std::panic::catch_unwind(test).map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
            Failed::from(text.unwrap_or_else(|| "it panicked".to_owned()))
        })
    })
}

/// The launcher that is tested.
fn launcher() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_vm-kvm-launcher"))
}
