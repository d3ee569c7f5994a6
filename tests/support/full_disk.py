"""A disk that is really full: a child runs Python code on a small tmpfs, in a mount namespace of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PREPARE = """
import os
from pathlib import Path

disk = Path({disk!r})

def fill():
    with open(disk / "ballast", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
"""


def run_on_small_disk(code: str, disk: Path) -> str:
    """What `code` prints; in it, `disk` is a folder with 256 KiB of space and `fill()` uses up what is left of it."""
    disk.mkdir(exist_ok=True)
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    mount = ["sh", "-ec", 'mount -t tmpfs -o size=256k tmpfs "$0"; exec "$@"', str(disk)]
    probe = subprocess.run([*unshare, *mount, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no small file system can be mounted here: {probe.stderr.strip()}")
    child = [sys.executable, "-W", "error", "-c", PREPARE.format(disk=str(disk)) + code]
    done = subprocess.run([*unshare, *mount, *child], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
