"""Archives that a Linux kernel unpacks as its first root directory."""

import stat


class Cpio:
    """A newc archive, as the kernel's Documentation/driver-api/early-userspace/buffer-format.rst describes it."""

    def __init__(self):
        self.parts = []

    def file(self, name, content, mode):
        self._entry(name, stat.S_IFREG | mode, content)

    def folder(self, name):
        self._entry(name, stat.S_IFDIR | 0o755, b"")

    def finish(self):
        self._entry("TRAILER!!!", 0, b"")
        return b"".join(self.parts)

    def _entry(self, name, mode, content):
        encoded = name.encode() + b"\0"
        # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        fields = [len(self.parts) + 1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0]
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        self.parts += [padded(header), padded(content)]


def padded(data):
    return data + b"\0" * (-len(data) % 4)
