"""Shared by the attacks inside the sandbox: try an act, and record how it was refused for the table of `make attacks`."""

import ctypes
import errno
import subprocess
from collections.abc import Iterable
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
MS_REMOUNT, MS_BIND, MNT_DETACH, CLONE_NEWNS, CLONE_NEWUSER, PTRACE_ATTACH = 0x20, 0x1000, 2, 0x20000, 0x10000000, 16
REFUSED: set[str] = set()  # what stood in the way, as the kernel or the program names it

Act = tuple[Any, ...]  # a name, a function, its arguments


def refused(error: Exception | int | None) -> str:
    """Note a refusal and return its name."""
    number = error if isinstance(error, int) else getattr(error, "errno", None)
    if number and number > 0:  # that of a name server's answer is not the kernel's
        name = errno.errorcode.get(number, str(number))
    elif isinstance(error, subprocess.CalledProcessError):
        # A shell's line tells by its last words why; what else refuses says it in many.
        words = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        said = words[-1].replace("error: ", "").replace(",", ";").strip() if words and error.cmd[0] == "sh" else ""
        name = said.split('"')[0].strip()[:70] or f"{error.cmd[0]} exit {error.returncode}"
    else:
        name = type(error).__name__
    REFUSED.add(name)
    return name


def successes(acts: Iterable[Act]) -> list[str]:
    """The names of the acts that were not refused."""
    done = []
    for name, act, *arguments in acts:
        try:
            result = act(*arguments)
        except (OSError, ValueError, MemoryError, subprocess.SubprocessError) as error:
            refused(error)
            continue
        if isinstance(result, int) and result == -1:  # a libc call that failed
            refused(ctypes.get_errno())
        else:
            done.append(name)
    return done


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=5)
