//! Describes a kernel and builds an image for it: `describe [KERNEL [MODULES [ROOT]]]`. The archive goes to standard
//! output if that is not a terminal.
#![forbid(unsafe_code)]
#![allow(clippy::print_stderr)]

use std::{
    env,
    error::Error,
    fs::File,
    io::{self, IsTerminal, Read, Seek},
    path::PathBuf,
    time::Instant,
};

use vm_guest_image::{Image, Kernel, KernelModules, Need};
use vm_guest_protocol::boot::BootConfig;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args_os().skip(1).map(PathBuf::from);
    let kernel = Kernel::find(arguments.next().as_deref())?;
    eprintln!("{}: {:?}, release {:?}", kernel.path().display(), kernel.format(), kernel.release());
    let before = Instant::now();
    eprintln!("unpacked: {} bytes, in {:?}", kernel.elf()?.len(), before.elapsed());
    let modules = KernelModules::find(&kernel, arguments.next().as_deref())?;
    for need in Need::ALL {
        eprintln!(
            "{need:?}: {}",
            if modules.supports(need) { "supported" } else { "not supported" }
        );
    }
    let before = Instant::now();
    let mut builder = Image::builder().with_modules(&modules);
    if let Some(root) = arguments.next() {
        builder = builder.with_directory(root);
    }
    let image = builder.build()?;
    eprintln!("image: {} bytes, in {:?}", image.len(), before.elapsed());
    let modules = image.modules_for(&Need::ALL);
    eprintln!("modules: {modules:?}");
    if !io::stdout().is_terminal() {
        let config =
            BootConfig { hostname: "described".to_owned(), modules, ..BootConfig::default() };
        for part in [image.file().try_clone_to_owned()?, image.part_for(&config)?] {
            let mut part = File::from(part);
            part.rewind()?;
            io::copy(&mut part.by_ref(), &mut io::stdout())?;
        }
    }
    Ok(())
}
