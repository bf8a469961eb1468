//! Kernel modules.

use super::Failed;
use rustix::io::Errno;
use std::{ffi::CString, fs, io, path::Path};

/// What stands behind a module's signature.
const MARKER: &[u8] = b"~Module signature appended~\n";

/// Loads modules in order, each with its parameters from the kernel's command line.
pub(super) fn load_all(paths: &[String], command_line: &str) -> Result<(), Failed> {
    let parameters = parameters(command_line);
    for path in paths {
        load(path, &arguments(&module_name(path), &parameters))
            .map_err(Failed::at("modules", path))?;
    }
    Ok(())
}

fn load(path: &str, arguments: &str) -> io::Result<()> {
    let module = fs::read(path)?;
    let arguments = CString::new(arguments)?;
    let loaded = match rustix::system::init_module(without_signature(&module), &arguments) {
        // How a kernel that insists on signatures refuses.
        Err(Errno::KEYREJECTED | Errno::NOKEY | Errno::PERM) => {
            rustix::system::init_module(&module, &arguments)
        }
        other => other,
    };
    match loaded {
        // It is loaded, or part of the kernel.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Leaves a module's signature out, if it has one.
///
/// Checking it is most of what loading costs, millions of instructions for each module, and proves nothing here: the
/// module, the kernel and this program come from the same host. A kernel notes that unsigned modules were loaded as a
/// taint. The layout is that of `struct module_signature` (include/linux/module_signature.h): the signature, 12 bytes
/// of which the last four are its length, and a marker.
fn without_signature(module: &[u8]) -> &[u8] {
    let Some((rest, length)) = module
        .strip_suffix(MARKER)
        .and_then(|rest| rest.split_last_chunk::<12>())
        .and_then(|(rest, info)| Some((rest, info.last_chunk::<4>()?)))
    else {
        return module;
    };
    let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
    rest.len().checked_sub(length).map_or(module, |end| &rest[..end])
}

/// Gives a module's name as the kernel has it.
fn module_name(path: &str) -> String {
    let file = Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// Lists the parameters for modules on a command line, as modprobe(8) finds them there: `module.name=value`, with
/// `-` and `_` equal in the module's name. Gives the module's name as the kernel has it, and the rest of the word.
fn parameters(command_line: &str) -> Vec<(String, String)> {
    words(command_line)
        .take_while(|word| *word != "--")
        .filter_map(|word| {
            // The kernel takes quotes around a value, and around the whole word.
            let (quote, bare) = word.strip_prefix('"').map_or(("", word), |bare| ("\"", bare));
            let name = bare.split_once('=').map_or(bare, |(name, _)| name);
            let (module, _) = name.split_once('.')?;
            Some((module.replace('-', "_"), format!("{quote}{}", &bare[module.len() + 1..])))
        })
        .collect()
}

/// Puts all parameters for one module together, as finit_module(2) takes them.
fn arguments(module: &str, parameters: &[(String, String)]) -> String {
    let own: Vec<&str> = parameters
        .iter()
        .filter(|(name, _)| name == module)
        .map(|(_, argument)| argument.as_str())
        .collect();
    own.join(" ")
}

/// Splits a command line where the kernel does (`next_arg` in lib/cmdline.c): at space outside of quotes.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |character: char| {
        quoted ^= character == '"';
        !quoted && character.is_ascii_whitespace()
    })
    .filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    fn arguments_of(path: &str, command_line: &str) -> String {
        arguments(&module_name(path), &parameters(command_line))
    }

    #[test]
    fn parameters_reach_their_module() {
        let line = "console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 panic=-1 dotted=a.b=c \
                    virtio-mmio.device=4K@0xd0001000:6 vsock.x=\"a b\" \"vsock.y=c d\" vsock.flag\n";
        let path = "/twinvm/modules/kernel/drivers/virtio/virtio-mmio.ko";
        assert_eq!(arguments_of(path, line), "device=4K@0xd0000000:5 device=4K@0xd0001000:6");
        assert_eq!(arguments_of("vsock.ko.xz", line), "x=\"a b\" \"y=c d\" flag");
        assert_eq!(arguments_of("dotted.ko", line), "");
        assert_eq!(arguments_of("console.ko", line), "");
    }

    #[test]
    fn what_stands_behind_two_dashes_is_for_others() {
        assert_eq!(arguments_of("m.ko", "m.a=1 -- m.b=2"), "a=1");
    }

    #[test]
    fn a_signature_that_is_longer_than_its_module_is_none() {
        let module = [&[1, 2, 3][..], &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4], MARKER].concat();
        assert_eq!(without_signature(&module), module);
    }

    proptest! {
        #[test]
        fn signatures_are_left_out(
            module in vec(any::<u8>(), 0..100),
            signature in vec(any::<u8>(), 0..100),
        ) {
            let length = u32::try_from(signature.len()).unwrap().to_be_bytes();
            let signed = [&module, &signature, &[9; 8][..], &length, MARKER].concat();
            prop_assert_eq!(without_signature(&signed), &module);
            prop_assert_eq!(without_signature(&module), &module);
        }

        #[test]
        fn any_line_is_survived(line in "[a.\"= -]{0,40}|\\PC{0,60}") {
            for (module, argument) in parameters(&line) {
                prop_assert!(!module.contains('.') && !module.contains('-'));
                prop_assert!(line.contains(argument.trim_start_matches('"')));
            }
        }

        #[test]
        fn each_module_gets_its_own_in_order(
            given in vec((0..3_usize, "[a-z]{1,5}", "[a-z0-9@:]{0,6}|\"[a-z ]{0,6}\""), 0..12),
        ) {
            let names = ["virtio_mmio", "vsock", "ext4"];
            let line: Vec<String> = given
                .iter()
                .enumerate()
                .map(|(index, (module, name, value))| {
                    let module = names[*module];
                    let module = if index % 2 == 0 { module.replace('_', "-") } else { module.to_owned() };
                    format!("{module}.{name}={value}")
                })
                .collect();
            for (index, module) in names.iter().enumerate() {
                let expected: Vec<String> = given
                    .iter()
                    .filter(|(of, _, _)| *of == index)
                    .map(|(_, name, value)| format!("{name}={value}"))
                    .collect();
                let path = format!("/twinvm/modules/{module}.ko");
                prop_assert_eq!(arguments_of(&path, &line.join(" ")), expected.join(" "));
            }
        }
    }
}
