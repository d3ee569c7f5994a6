"""A running sandbox: start bubblewrap, enforce the limits of time and disk space, and kill everything inside."""

import ctypes
import errno
import os
import platform
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.campaign import strict_json
from pipeline.campaign.errors import NotFound, WorkFailed
from pipeline.sandbox.disk_usage import DiskUsage
from pipeline.sandbox.namespace import UNMOVED, Staging

POLL_SECONDS = 0.5  # between two polls of the disk usage in `wait`
LIBC = ctypes.CDLL(None, use_errno=True)
KEYCTL = {"x86_64": 250, "aarch64": 219}  # the system call's number
JOIN_SESSION_KEYRING = 1
KEYRING_TRIES = 100


class Confined:
    """A running sandbox. `poll` and `wait` enforce its limits of time and space; leaving a `with` block kills what runs.

    `returncode` is the command's exit code, or 128 + n where signal n ended it. `timed_out` says whether the wall limit ended it, and
    `overspent` which limit on what it writes did (empty: none).
    """

    def __init__(
        self, process: subprocess.Popen[bytes], init: int, staging: Staging, deadline: float, disk_usage: DiskUsage
    ) -> None:
        self.returncode: int | None = None
        self.timed_out = False
        self.overspent = ""
        self._disk_usage = disk_usage
        self._process = process
        self._init = init  # a pidfd of the sandbox's pid 1: readable when that, and so every process inside, is gone
        self._staging = staging
        self._deadline = deadline

    def __enter__(self) -> "Confined":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def poll(self) -> int | None:
        """The exit code, or None while anything inside still runs."""
        if self.returncode is None:
            if self._is_over(0.0):
                self._finish()
            elif time.monotonic() > self._deadline:
                self.timed_out = True
                self.kill()
            elif overspent := self._disk_usage.excess():
                self.overspent = overspent
                self.kill()
        return self.returncode

    def wait(self) -> int:
        """Wait for the end and return the exit code. The sandbox is killed at a limit."""
        while self.poll() is None:
            self._is_over(min(POLL_SECONDS, max(0.0, self._deadline - time.monotonic())))
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """Kill every process inside, and return when none is left."""
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it may have ended by itself a moment ago
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
            self._finish()

    def _is_over(self, seconds: float | None) -> bool:
        """Wait for the end for at most `seconds` (None: without a limit). Returns whether no process inside is left."""
        gone = select.poll()
        gone.register(self._init, select.POLLIN)
        return bool(gone.poll(None if seconds is None else seconds * 1000))

    def _finish(self) -> None:
        # bubblewrap returns when the command does. Processes that the command left behind die with pid 1 a moment later.
        self._disk_usage.close()
        self._is_over(None)
        os.close(self._init)
        self.returncode = self._process.wait()
        self._staging.remove()


def launch(arguments: list[str], log_path: Path, identity: Mapping[str, Any]) -> tuple[subprocess.Popen[bytes], int]:
    """Start bubblewrap. Returns its process and a pidfd of the sandbox's pid 1.

    Raises NotFound without bubblewrap, and WorkFailed where the sandbox does not start.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise NotFound("There is no program bwrap on this node", "Install bubblewrap 0.8 or newer")
    reader, writer = os.pipe()
    with open(reader, "rb") as info, open(log_path, "ab") as log:
        command = [*UNMOVED, program, "--info-fd", str(writer), *arguments]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        try:
            # bubblewrap gets an empty environment, because its own stays readable inside in /proc/1/environ.
            process = subprocess.Popen(
                command, env={}, pass_fds=(writer,), preexec_fn=_leave_keyring, **streams, **identity
            )
        except subprocess.SubprocessError as error:  # _leave_keyring failed
            raise WorkFailed(
                "The sandbox did not start, because its user may hold no more kernel keys and would have kept the caller's",
                "/proc/key-users shows how many are held; raise kernel.keys.maxkeys, or start fewer sandboxes at once",
            ) from error
        finally:
            os.close(writer)
        try:
            return process, os.pidfd_open(strict_json.read(info.read())["child-pid"])
        except (ValueError, ProcessLookupError) as error:
            process.wait()
            raise WorkFailed(f"The sandbox did not start: {log_path.read_text()[-2000:]}") from error


def _leave_keyring() -> None:
    """Start a new session keyring. Otherwise the child inherits the caller's, with tickets for file systems.

    A user may hold 200 keys, and the kernel frees those of processes that ended a moment later, so a full quota is waited for. Raises
    OSError where it stays full. Other errors mean that no process here can use keys: the kernel has none, or a container forbids them.
    """
    if platform.machine() not in KEYCTL:
        return
    for _ in range(KEYRING_TRIES):
        joined = LIBC.syscall(KEYCTL[platform.machine()], JOIN_SESSION_KEYRING, None)
        if joined >= 0 or ctypes.get_errno() not in (errno.EDQUOT, errno.ENOMEM):
            return
        time.sleep(0.1)
    raise OSError(ctypes.get_errno(), "no session keyring")
