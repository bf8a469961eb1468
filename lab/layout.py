"""Where the lab keeps its files: shared by `setup` and `run`."""

import fcntl
import os
import shutil
from pathlib import Path

# Raised whenever `setup` builds something else, so that an older build is replaced.
FORMAT = "6"

# The exit status for a lab that could not do its work, as `docker run` and `env` have it.
LAB_FAILED = 125

# Where the lab has its copy of passt, which runs as a user who may not reach the target directory.
PASST = "/run/lab/passt/passt"

WORKSPACE = Path(__file__).resolve().parent.parent


class LabError(Exception):
    """Something the user has to know, in words meant for them."""


class Layout:
    """The paths of one lab build."""

    def __init__(self, root):
        self.root = Path(root)
        self.tools = self.root / "tools"
        self.busybox = self.tools / "bin/busybox"
        self.qemu = self.root / "qemu"
        self.passt = self.root / "passt"
        self.kernel = self.root / "host/vmlinux"
        self.modules = self.root / "host/lib/modules"
        self.initramfs = self.root / "host/initramfs"
        self.guest = self.root / "guest"
        self.env = self.root / "env"
        self.stamp = self.root / "stamp"

    def ready(self):
        """Whether a finished build of this format is here."""
        try:
            return self.stamp.read_text() == FORMAT
        except OSError:
            return False

    def qemu_command(self):
        """The unpacked QEMU. It comes with all its libraries, the C library and its loader among them."""
        libraries = self.qemu / "usr/lib/x86_64-linux-gnu"
        command = [libraries / "ld-linux-x86-64.so.2", "--library-path", libraries, self.qemu / "usr/bin/qemu-system-x86_64"]
        for firmware in ("share/seabios", "share/qemu", "lib/ipxe/qemu"):
            command += ["-L", self.qemu / "usr" / firmware]
        return [str(part) for part in command]

    def tool_env(self):
        """The environment for unpacked tools: their libraries come first."""
        libraries = [self.tools / "usr/lib/x86_64-linux-gnu", self.tools / "lib/x86_64-linux-gnu"]
        known = os.environ.get("LD_LIBRARY_PATH")
        path = [str(library) for library in libraries] + ([known] if known else [])
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(path)}

    def tool(self, name):
        """A program and its environment: the one on PATH, else the unpacked one; None without either."""
        installed = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
        if installed:
            return [installed], dict(os.environ)
        for folder in ("usr/bin", "bin"):
            unpacked = self.tools / folder / name
            if unpacked.exists():
                return [str(unpacked)], self.tool_env()
        return None


def target_dir():
    """cargo's target directory for this workspace."""
    chosen = os.environ.get("CARGO_TARGET_DIR")
    return Path(os.path.abspath(chosen)) if chosen else WORKSPACE / "target"


def lock(target, exclusive):
    """Take the lock that keeps `setup` from replacing a lab that runs; held until the file is closed."""
    target.mkdir(parents=True, exist_ok=True)
    file = open(target / "lab.lock", "a")
    fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    return file
