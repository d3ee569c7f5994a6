"""How the tests become root and an ordinary user, and the reasons why they cannot here."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
ATTACKS = Path(__file__).parent
USER = 12345 if os.geteuid() == 0 else os.geteuid()
PROGRAMS = ("bwrap", "unshare", "setpriv", "prlimit", "mksquashfs", "unsquashfs", "squashfuse", "fuse-overlayfs")
WHO = ("root", "user")


def command_as(who: str, *command: str) -> list[str]:
    """`command` as root of the machine or as an ordinary user."""
    if who == "user" and os.geteuid() == 0:
        become = [sys.executable, str(ATTACKS / "as_user.py"), str(USER)]
        return ["unshare", "--mount", "--propagation", "slave", *become, *command]
    return list(command)


def environment() -> dict[str, str]:
    """A short environment with a secret in it; no cache of bytecode is written into the checkout."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/tmp",
        "API_TOKEN": "the-secret-of-the-caller",
    }


@cache
def why_not(who: str) -> str:
    """Why these tests cannot run as `who` here; empty when they can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if who == "root" and os.geteuid() != 0:
        return "the tests do not run as root"
    trial = ["unshare", "--mount"] if who == "root" else ["unshare", "-Urm"]
    done = subprocess.run(command_as(who, *trial, "true"), env=environment(), capture_output=True, text=True)
    return f"no mount namespace for {who}: {done.stderr.strip()}" if done.returncode else ""
