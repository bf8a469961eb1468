"""Debian's packages, fetched and unpacked without installing any: shared by `setup` and `kernel`."""

import os
import re
import shutil
import subprocess

from layout import LabError

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class Apt:
    """apt with lists and caches of its own, so that the machine's stay untouched.

    With a suite it sees that suite alone, on the mirror that `machines` has Debian from, and takes nothing for installed.
    """

    def __init__(self, root, suite=None, machines=None):
        for program in ("apt-get", "apt-cache", "dpkg-deb"):
            if not shutil.which(program):
                raise LabError(f"{program} is missing: the lab is made of Debian packages and needs a Debian-like machine")
        self.root = root
        (root / "lists/partial").mkdir(parents=True)
        (root / "cache/archives/partial").mkdir(parents=True)
        self.options = [
            f"-oDir::State::Lists={root / 'lists'}",
            f"-oDir::Cache={root / 'cache'}",
            "-oDebug::NoLocking=true",
            "-oAPT::Sandbox::User=root",
            "-oAcquire::Languages=none",
            "-oAcquire::Retries=3",
        ]
        self.quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
        if suite:
            (root / "status").touch()
            (root / "sources.list").write_text(f"deb [signed-by={KEYRING}] {machines.mirror()} {suite} main\n")
            self.options += [
                f"-oDir::State::status={root / 'status'}",
                f"-oDir::Etc::sourcelist={root / 'sources.list'}",
                "-oDir::Etc::sourceparts=-",
            ]
            self.update()

    def mirror(self):
        """The first mirror with Debian's main archive."""
        form = "$(ORIGIN) $(LABEL) $(REPO_URI)"
        for line in self.run("apt-get", "indextargets", "--format", form).splitlines():
            if line.startswith("Debian Debian "):
                return line.split()[2]
        raise LabError("apt on this machine knows no mirror of Debian")

    def run(self, program, *arguments, cwd=None):
        return run([program, *self.options, *arguments], env=self.quiet, cwd=cwd)

    def update(self):
        # apt-get takes an unreachable mirror for a warning; without any list the next step could only guess.
        output = self.run("apt-get", "update")
        if not any("_Packages" in file.name for file in self.lists()):
            raise LabError(f"no package lists from the mirrors of this machine; is it offline?\n{output[-2000:]}")

    def lists(self):
        return (self.root / "lists").iterdir()

    def behind(self, metapackage, name):
        """The package that `metapackage` stands for, whose name starts with `name`."""
        found = re.search(rf"^\s*Depends: ({name}-\S+)", self.run("apt-cache", "depends", metapackage), re.M)
        if not found:
            raise LabError(f"the package {metapackage} is in none of the mirrors of this machine (or names no {name})")
        return found[1]

    def download(self, package, folder):
        folder = self.root / folder
        folder.mkdir()
        self.run("apt-get", "download", package, cwd=folder)
        return list(folder.glob("*.deb"))

    def download_whole(self, package, parts):
        """The package with those parts of all that it depends on."""
        self.run("apt-get", "install", "--download-only", "--yes", "--no-install-recommends", package)
        return [file for file in (self.root / "cache/archives").glob("*.deb") if parts.match(file.name)]

    def download_with_libraries(self, packages):
        """The packages and whatever they need that is not installed."""
        self.run("apt-get", "install", "--download-only", "--yes", "--no-install-recommends", *packages)
        return list((self.root / "cache/archives").glob("*.deb"))


def unpack(package, folder):
    """Unpack a package's files into a folder, which may hold others'."""
    folder.mkdir(parents=True, exist_ok=True)
    run(["dpkg-deb", "--extract", str(package), str(folder)])


def run(command, env=None, cwd=None, stdin=b""):
    """Run a command to its end; returns its stdout: text, or bytes where `stdin` is given."""
    try:
        done = subprocess.run(command, env=env, cwd=cwd, input=stdin, capture_output=True)
    except OSError as error:
        raise LabError(f"cannot run {command[0]}: {error}") from error
    if done.returncode != 0:
        words = " ".join(word for word in command if not word.startswith("-o"))
        output = done.stderr if stdin else done.stdout + done.stderr
        tail = "\n".join(output.decode(errors="replace").strip().splitlines()[-12:])
        raise LabError(f"`{words}` failed with status {done.returncode}:\n{tail}")
    return done.stdout if stdin else done.stdout.decode(errors="replace")
