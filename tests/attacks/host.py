"""The host of the attack tests: become root or an ordinary user, make a world to protect, and run the arena in it."""

import json
import os
import pty
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.sandbox import image

ROOT = Path(__file__).parents[2]
ATTACKS = Path(__file__).parent
USER = 12345 if os.geteuid() == 0 else os.geteuid()
PROGRAMS = ("bwrap", "unshare", "setpriv", "prlimit", "mksquashfs", "unsquashfs", "squashfuse", "fuse-overlayfs")
# A key for the session's keyring; the system call's number is that of x86_64.
ADD_KEY = "import ctypes; print(ctypes.CDLL(None).syscall(248, b'user', b'arena', b'the secret', 10, -3))"
LOOKS = ("read", "take", "keep", "clean", "judge")
WHO = ("root", "user")
SECRETS = (
    "vault/seed",
    "ledger.h5",
    "answers.jsonl",
    "constitution/constitution.yaml",
    "a1/attempt_00/result.h5",
    "rounds/r0000/a0.h5",
)

# Says what it finds in the places from which libraries load what an earlier process compiled.
HONEST = """
import os, sys
runtime = tuple(sys.path[1:] + [sys.prefix])  # a checkout may itself lie in /tmp
found = [p for d in ("/tmp", "/dev/shm", "/out", os.environ["HOME"]) for at, ds, fs in os.walk(d) for p in ds + fs
         if not at.startswith(runtime) and not any(way.startswith(os.path.join(at, p)) for way in runtime)]
print("honest", sorted(found), sys.modules.get("usercustomize"), __spec__.cached and os.path.exists(__spec__.cached))
"""


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


class Arena:
    """A running arena.py, and the world around it."""

    def __init__(self, who: str, world: Path, has_terminal: bool = True) -> None:
        self.who, self.world = who, world
        # A worker that somebody started by hand has a terminal, which is one more thing to attack.
        self.terminals = pty.openpty()
        if os.geteuid() == 0:
            os.fchown(self.terminals[1], USER if who == "user" else 0, -1)
        terminal = os.ttyname(self.terminals[1]) if has_terminal else "/dev/null"
        arguments = (str(ATTACKS / "arena.py"), str(world), terminal)
        command = command_as(who, sys.executable, "-W", "error", *arguments)
        self.errors = open(world.parent / "arena.log", "w+")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, env=environment(), text=True, start_new_session=True, **pipes)
        ready = self._line()
        assert ready["ready"]
        self.backends, self.uid = ready["backends"], ready["uid"]
        # For the table of `make attacks`: what stood in the way since somebody cleared it.
        self.refusals: set[str] = set()

    def _line(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise AssertionError(f"the arena ended: {self.errors.read()}")
        return json.loads(line)

    def send(self, do: str, *arguments: str, **more: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, "arguments": arguments, **more}) + "\n")
        self.process.stdin.flush()

    def ask(self, do: str, *arguments: str, **more: Any) -> dict[str, Any]:
        # Those that look at what the attack before them has left.
        for path in (self.world / "out").iterdir() if do not in LOOKS else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.send(do, *arguments, **more)
        answered = self._line()
        self.refusals |= set(answered.get("refused", []))
        if "error" in answered:
            self.refusals.add(answered["kind"])
        return answered

    @property
    def backend(self) -> str:
        return f"{'+'.join(self.backends)} as {'root' if self.who == 'root' else 'an ordinary user'}"

    def attack(self, name: str, *arguments: str, **more: Any) -> Any:
        answered = self.ask("attack", name, *arguments, **more)
        assert answered.get("code") == 0, answered
        return answered["got"]

    def outside(self, *command: str) -> int:
        """The exit code of a command that the arena's own uid runs outside the sandbox."""
        return self.ask("outside", *command)["code"]

    def close(self) -> tuple[int, str]:
        """End it, where nobody has; its exit code and its complaints."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        code = self.process.wait(timeout=30)
        self.process.stdout.close()
        for terminal in self.terminals:
            os.close(terminal)
        with self.errors:
            self.errors.seek(0)
            return code, self.errors.read()


def lay_out(who: str, folder: Path) -> Path:
    """A campaign's worth of things that a trial must not see, and one image."""
    world = folder / "world"
    for name in ("scratch", "out", "task"):
        (world / name).mkdir(parents=True)
    for name in SECRETS:
        (world / name).parent.mkdir(parents=True, exist_ok=True)
        (world / name).write_text("what a trial must not see")
        (world / name).chmod(0o600)
    (world / "vault").chmod(0o700)
    for name in ("acts.py", "inside.py", "leavings.py"):
        shutil.copy(ATTACKS / name, world / "task")
    payload = folder / "payload"
    (payload / "substrate").mkdir(parents=True)
    (payload / "substrate/train.py").write_text(HONEST)
    (payload / "manifest.yaml").write_text("name: arena\n")
    image.build(payload, world / "image.sqsh")
    if who == "user" and os.geteuid() == 0:
        for path in (world, *world.rglob("*")):
            os.chown(path, USER, USER)
    return world
