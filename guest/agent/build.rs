//! Tells the build scripts of crates that depend on this one where its manifest is: `DEP_VM_GUEST_AGENT_MANIFEST_DIR`.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Ok(directory) = env::var("CARGO_MANIFEST_DIR") {
        println!("cargo::metadata=manifest_dir={directory}");
    }
}
