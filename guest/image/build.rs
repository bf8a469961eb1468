//! Builds the guest agent as a static program, for `include_bytes!`.
//!
//! The program is a small crate written into `OUT_DIR` that depends on `vm-guest-agent` by path. A crate of its own
//! keeps the nested build apart from this workspace: nothing is written beside the agent's sources, its development
//! dependencies are not resolved, and neither this workspace's flags nor its lock on the target directory reach it.

use std::{
    collections::BTreeSet,
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

#[path = "src/elf.rs"]
#[allow(dead_code, unreachable_pub)]
mod elf;

const MUSL: &str = "x86_64-unknown-linux-musl";
const READY_MADE: &str = "TWINVM_AGENT_BINARY";
const PROGRAM: &str = "twinvm-init";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/elf.rs");
    println!("cargo::rerun-if-env-changed={READY_MADE}");
    println!("cargo::rerun-if-env-changed=DEP_VM_GUEST_AGENT_MANIFEST_DIR");
    if let Err(reason) = embed() {
        for line in reason.lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

/// Puts the agent's program at `OUT_DIR/agent`.
fn embed() -> Result<(), String> {
    let out = PathBuf::from(variable("OUT_DIR")?);
    let program = match env::var_os(READY_MADE).filter(|path| !path.is_empty()) {
        Some(path) => {
            let path = PathBuf::from(path);
            println!("cargo::rerun-if-changed={}", path.display());
            path
        }
        None => build(&out)?,
    };
    let bytes = fs::read(&program).map_err(|error| format!("{}: {error}", program.display()))?;
    let header =
        elf::Header::parse(&bytes).map_err(|wrong| format!("{}: {wrong}", program.display()))?;
    if header.interpreter {
        return Err(format!(
            "{}: linked dynamically; the guest has no dynamic linker",
            program.display()
        ));
    }
    write_if_changed(&out.join("agent"), &bytes)
}

/// Builds the program for the host's own target, or for musl where that one has no static C library.
fn build(out: &Path) -> Result<PathBuf, String> {
    let target = variable("TARGET")?;
    if !(target.starts_with("x86_64-") && target.contains("-linux-")) {
        return Err(format!(
            "twinvm's guests are x86-64 Linux; {target} cannot build their agent, so name a ready static program in {READY_MADE}"
        ));
    }
    let agent = variable("DEP_VM_GUEST_AGENT_MANIFEST_DIR")?;
    let shim = out.join("agent-program");
    write_shim(&shim, Path::new(&agent), out)?;
    resolve(&shim, &target)?;
    let first = match compile(&shim, &target) {
        Ok(program) => return Ok(program),
        Err(output) => output,
    };
    if target != MUSL && target_is_installed(MUSL) {
        return compile(&shim, MUSL).map_err(|second| format!("{first}\n{second}"));
    }
    Err(format!(
        "{first}\nthe guest agent could not be built as a static program. It needs the static C library (Debian: libc6-dev, \
         Fedora: glibc-static) or `rustup target add {MUSL}`; {READY_MADE} may name a ready static program instead"
    ))
}

fn write_shim(shim: &Path, agent: &Path, out: &Path) -> Result<(), String> {
    let agent_path = agent.to_str().ok_or_else(|| format!("{}: not UTF-8", agent.display()))?;
    let manifest = format!(
        "[package]\nname = \"{PROGRAM}\"\nversion = \"0.0.0\"\nedition = \"2024\"\npublish = false\n\n\
         [[bin]]\nname = \"{PROGRAM}\"\npath = \"main.rs\"\n\n\
         [dependencies]\nvm-guest-agent = {{ path = {agent_path:?}, features = [\"linux\"] }}\n\n\
         [profile.release]\nopt-level = \"s\"\nlto = true\ncodegen-units = 1\npanic = \"abort\"\nstrip = true\n\n\
         [workspace]\n"
    );
    let main = "fn main() -> std::process::ExitCode {\n    \
                vm_guest_agent::linux::launch::main(std::env::args_os().skip(1)).into()\n}\n";
    fs::create_dir_all(shim).map_err(|error| format!("{}: {error}", shim.display()))?;
    write_if_changed(&shim.join("Cargo.toml"), manifest.as_bytes())?;
    write_if_changed(&shim.join("main.rs"), main.as_bytes())?;
    // The versions that the outer build chose, which are the ones that are there when there is no network.
    let lock = shim.join("Cargo.lock");
    if !lock.exists()
        && let Some(found) = outer_lock(out).or_else(|| outer_lock(agent))
    {
        fs::copy(&found, &lock).map_err(|error| format!("{}: {error}", found.display()))?;
    }
    Ok(())
}

/// The lock file of the workspace around `inside`, if it knows the agent.
fn outer_lock(inside: &Path) -> Option<PathBuf> {
    inside
        .ancestors()
        .map(|directory| directory.join("Cargo.lock"))
        .find(|lock| fs::read_to_string(lock).is_ok_and(|text| text.contains("\"vm-guest-agent\"")))
}

/// Makes the dependencies available: those at hand if possible, over the network only as the last resort.
fn resolve(shim: &Path, target: &str) -> Result<(), String> {
    let fetch = |offline: bool| {
        let mut command = cargo(shim)?;
        command.arg("fetch").arg("--target").arg(target);
        if offline {
            command.arg("--offline");
        }
        run(command)
    };
    let Err(with_lock) = fetch(true) else { return Ok(()) };
    let lock = shim.join("Cargo.lock");
    let _ = fs::remove_file(&lock);
    if fetch(true).is_ok() {
        return Ok(());
    }
    let _ = fs::remove_file(&lock);
    fetch(false).map_err(|online| format!("{with_lock}\n{online}"))
}

fn compile(shim: &Path, target: &str) -> Result<PathBuf, String> {
    let directory = shim.join("target");
    let mut command = cargo(shim)?;
    command.args(["build", "--release", "--offline", "--target", target]);
    run(command)?;
    let release = directory.join(target).join("release");
    watch(&release.join(format!("{PROGRAM}.d")), shim)?;
    Ok(release.join(PROGRAM))
}

/// Has the build script run again when a source file of the agent or of a crate beside it changes.
fn watch(dep_info: &Path, shim: &Path) -> Result<(), String> {
    let text =
        fs::read_to_string(dep_info).map_err(|error| format!("{}: {error}", dep_info.display()))?;
    let mut watched = BTreeSet::new();
    // Make's syntax: a blank within a name is escaped.
    let names = text.split_once(": ").map_or("", |(_, names)| names.trim());
    for name in names.replace("\\ ", "\0").split(' ') {
        let file = PathBuf::from(name.replace('\0', " "));
        if file.starts_with(shim) || !file.is_absolute() {
            continue;
        }
        let manifest = file
            .ancestors()
            .skip(1)
            .map(|directory| directory.join("Cargo.toml"))
            .find(|path| path.exists());
        watched.extend(manifest);
        watched.insert(file);
    }
    for path in watched {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    Ok(())
}

/// A cargo command in the shim that hears nothing of the outer build but where the registries, the network settings
/// and the free job slots are.
fn cargo(shim: &Path) -> Result<Command, String> {
    let mut command = Command::new(variable("CARGO")?);
    let kept = ["CARGO_HOME", "CARGO_MAKEFLAGS"];
    let kept_families =
        ["CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTRY", "CARGO_REGISTRIES_", "CARGO_SOURCE_"];
    for (name, _) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let foreign = ["CARGO", "RUSTC", "RUSTDOC", "DEP_", "CLIPPY", "RUSTFLAGS"]
            .iter()
            .any(|family| text.starts_with(family));
        let keep =
            kept.contains(&text) || kept_families.iter().any(|family| text.starts_with(family));
        if foreign && !keep {
            command.env_remove(&name);
        }
    }
    for name in [
        "PROFILE",
        "OPT_LEVEL",
        "DEBUG",
        "TARGET",
        "HOST",
        "OUT_DIR",
        "NUM_JOBS",
        "MAKEFLAGS",
        "MFLAGS",
    ] {
        command.env_remove(name);
    }
    let rustc = variable("RUSTC")?;
    command.env("RUSTC", rustc);
    for name in [
        "RUSTC_WRAPPER",
        "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER",
        "CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_LINKER",
    ] {
        if let Some(value) = env::var_os(name) {
            command.env(name, value);
        }
    }
    // Flags given this way replace those of every configuration file.
    command.env(
        "CARGO_ENCODED_RUSTFLAGS",
        format!("-Ctarget-feature=+crt-static\u{1f}--remap-path-prefix={}=/agent", shim.display()),
    );
    command.env("CARGO_TARGET_DIR", shim.join("target"));
    command.env("CARGO_BUILD_BUILD_DIR", shim.join("target"));
    command.env("CARGO_TERM_COLOR", "never");
    command.current_dir(shim);
    Ok(command)
}

fn run(mut command: Command) -> Result<(), String> {
    let described = format!("{command:?}");
    let output = command.output().map_err(|error| format!("{described}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{described}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)))
}

fn target_is_installed(target: &str) -> bool {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc"));
    Command::new(rustc)
        .args(["--print", "target-libdir", "--target", target])
        .output()
        .is_ok_and(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}

/// Leaves a file alone that has these bytes already, so that nothing is built for a new time stamp.
fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<(), String> {
    if fs::read(path).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}
