#!/usr/bin/env python3
"""A real eight-node Slurm on one host: `up`, `down`, `status`.

    eval "$(python3 slurm/testbed/testbed.py up)"    # five seconds; then sinfo, sbatch, squeue and sacct work here
    python3 slurm/testbed/testbed.py down

Real slurmctld, slurmdbd, MariaDB, munge and eight slurmd, with ports, sockets, key and database of their own: the
host's own Slurm is not touched, and two checkouts can each have a cluster. It needs root (a slurmd becomes the user
who submitted) and Debian's packages of these daemons, and runs with the system's Python before any venv exists.

Two folders, for two reasons:

    build/testbed/                   what lasts: database, controller state, logs. A later `up` goes on counting jobs
    /var/lib/slurm-testbed-<hash>/   what runs: configuration, key, spool, sockets (their paths end at 108 characters).
                                     Gone after `down`

There are no pid files to go stale: every daemon is started with TESTBED=<second folder>/<name> in its environment, and
what carries that mark is ours. So `up` starts exactly what is missing, and `down` stops exactly what `up` started, also
when either was killed half-way.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import signal
import socket
import stat
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TEMPLATES = Path(__file__).resolve().parent
FOLDER = TEMPLATES.parent.parent / "build" / "testbed"
NODES = tuple(f"n{i}" for i in range(1, 9))
JOB = "job"  # the name, among our processes, of everything that is not a daemon
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # an ordinary user's PATH lacks sbin
PROGRAMS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch")
PACKAGES = "slurm-wlm slurmdbd munge mariadb-server"
GONE_SECONDS = 3  # without a process of that name: it has ended
START_SECONDS = 60  # the longest wait for one daemon; each needs about a second on an idle core
STOP_SECONDS = 10  # from SIGTERM to SIGKILL


class TestbedError(Exception):
    """There is no testbed to be had here, or a daemon did not come up; the message says what to do or shows its log."""


@dataclasses.dataclass(frozen=True)
class Daemon:
    """A daemon, and the question that shows it answers: a client command whose reply holds one of these words."""

    name: str
    command: str
    question: str
    replies: tuple[str, ...]


def why_not() -> str:
    """What stands in the way of a testbed on this host, with its cure; empty where nothing does."""
    if os.geteuid() != 0:
        return "the Slurm testbed needs root: sudo make testbed-up"
    absent = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
    return f"{', '.join(absent)} not found: apt-get install -y {PACKAGES}" if absent else ""


class Testbed:
    """The cluster of one folder. `up` and `down` may be called in any state that a crash can leave."""

    __test__ = False  # not a class of tests, whatever pytest makes of the name

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder.resolve()
        self.key = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        self.run_dir = run = Path(f"/var/lib/slurm-testbed-{self.key}")
        self.conf = run / "slurm.conf"
        # Whole, not added to the caller's: SLURM_* and SBATCH_* of a caller would leak into every job.
        # slurmdbd has no setting for the database's socket; its client library reads MYSQL_UNIX_PORT.
        self.environ = {"PATH": PATH, "SLURM_CONF": str(self.conf), "MYSQL_UNIX_PORT": f"{run}/mariadb.socket"}
        self.services = (  # in the order of their start: each needs the one before it
            Daemon(
                "munged",
                f"munged --foreground --socket={run}/munge.socket --key-file={run}/munge.key"
                f" --seed-file={run}/munge.seed --pid-file={run}/munged.pid",
                f"munge --no-input --socket={run}/munge.socket",
                ("MUNGE:",),
            ),
            Daemon(
                "mariadbd",
                f"mariadbd --no-defaults --user=root --skip-networking --datadir={run}/lasting/database"
                f" --socket={run}/mariadb.socket --pid-file={run}/mariadbd.pid"
                " --performance-schema=OFF --innodb-flush-log-at-trx-commit=0",
                "mariadb-admin --no-defaults ping",
                ("is alive",),
            ),
            Daemon(
                "slurmdbd",
                "slurmdbd -D",
                # slurmctld refuses to start before accounting knows its cluster, so the question is to enter it.
                "sacctmgr --immediate add cluster testbed",
                ("Adding Cluster", "already exists"),
            ),
            Daemon("slurmctld", "slurmctld -D", "scontrol ping", ("is UP",)),
        )
        serving = ("[idle]", "[mix]", "[alloc]", "[comp]")
        self.slurmds = tuple(
            Daemon(node, f"slurmd -D -N {node}", f"sinfo --noheader --nodes={node} --format=[%t]", serving)
            for node in NODES
        )

    def up(self) -> None:
        """Start what is not running; return when all eight nodes take jobs."""
        if reason := why_not():
            raise TestbedError(reason)
        with self._lock():
            if not self.conf.exists() or not self.processes():
                self._prepare()
            for daemon in self.services:
                self._start(daemon)
            # What a test or a crash took out of service comes back.
            if absent := self._ask("sinfo --noheader --states=down,drain --format=%N").strip():
                self._ask(f"scontrol update nodename={absent} state=resume")
            self._start(*self.slurmds)

    def down(self) -> None:
        """Cancel the jobs, stop the daemons in the reverse order of their start, remove what only runs."""
        with self._lock():
            if "slurmctld" in self.processes().values():
                self._ask("scancel --partition=main")  # not just killed: the next `up` would requeue them
                _wait(lambda: not self._ask("squeue --noheader"), STOP_SECONDS)
            self._stop(JOB, *NODES)
            for daemon in reversed(self.services):
                self._stop(daemon.name)
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def processes(self) -> dict[int, str]:
        """Every process of this testbed, found by its environment: pid, and the daemon's name or JOB."""
        daemon_mark, job_mark = f"TESTBED={self.run_dir}/".encode(), f"SLURM_CONF={self.conf}".encode()
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environ = (entry / "environ").read_bytes().split(b"\0")
                program = (entry / "comm").read_text().strip()
            except OSError:  # it has ended since
                continue
            names = [item.removeprefix(daemon_mark).decode() for item in environ if item.startswith(daemon_mark)]
            if names:
                # A slurmstepd inherits the mark of its slurmd.
                found[int(entry.name)] = JOB if program == "slurmstepd" else names[0]
            elif job_mark in environ and any(item.startswith(b"SLURM_JOB_ID=") for item in environ):
                found[int(entry.name)] = JOB
        return found

    def _start(self, *daemons: Daemon) -> None:
        """Start those that do not run, then wait until each answers."""
        running = self.processes().values()
        for daemon in daemons:
            if daemon.name in running:
                continue
            environ = self.environ | {"TESTBED": f"{self.run_dir}/{daemon.name}"}
            with open(self._output(daemon), "wb") as output:
                # setsid --fork: as our child, a daemon that a test kills would stay a zombie of the test session.
                command = ["setsid", "--fork", *daemon.command.split()]
                subprocess.run(
                    command, cwd="/", env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=True
                )
        for daemon in daemons:
            seen = time.monotonic()
            deadline = seen + START_SECONDS
            while not self._answers(daemon):
                if daemon.name in self.processes().values():
                    seen = time.monotonic()
                # One that begins another program has no environment for a moment, and is not to be known by it.
                if time.monotonic() > min(deadline, seen + GONE_SECONDS):
                    output_path = self._output(daemon)
                    tail = output_path.read_text(errors="replace").splitlines()[-15:]
                    raise TestbedError("\n".join([f"{daemon.name} does not answer; {output_path} ends:", *tail]))
                time.sleep(0.1)

    def _stop(self, *names: str) -> None:
        """SIGTERM, and where that does not do SIGKILL, to the processes of these names."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            for pid, name in self.processes().items():
                if name in names:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, sent)
            if _wait(lambda: not set(names) & set(self.processes().values()), STOP_SECONDS):
                return

    def _prepare(self) -> None:
        """Configuration, key and devices of a cluster that does not run; the database where there is none yet."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        for folder in (self.run_dir / "spool", self.folder / "log", self.folder / "state"):
            folder.mkdir(parents=True, exist_ok=True)
        # No daemon is told the lasting folder's own name: it may hold a space, and Slurm's configuration cannot.
        (self.run_dir / "lasting").symlink_to(self.folder)
        for i in range(8):
            os.mknod(self.run_dir / f"gpu{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # each another /dev/null
        key = self.run_dir / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        port = self._free_ports(2 + len(NODES))
        values = {
            "run": self.run_dir,
            "host": socket.gethostname().split(".")[0],
            "slurmctld_port": port,
            "slurmdbd_port": port + 1,
            "slurmd_ports": f"{port + 2}-{port + 1 + len(NODES)}",
        }
        for template in TEMPLATES.glob("*.conf.in"):
            conf = self.run_dir / template.stem
            conf.touch(mode=0o600 if conf.name == "slurmdbd.conf" else 0o644)  # slurmdbd refuses a readable one
            conf.write_text(string.Template(template.read_text()).substitute(values))
        if not (self.folder / "database").exists():
            unfinished = self.folder / "database.new"  # renamed when whole: a killed `up` leaves no half of one
            shutil.rmtree(unfinished, ignore_errors=True)
            options = "--no-defaults --user=root --auth-root-authentication-method=socket --skip-test-db"
            command = ["mariadb-install-db", *options.split(), f"--datadir={self.run_dir}/lasting/{unfinished.name}"]
            subprocess.run(command, env=self.environ, stdout=subprocess.DEVNULL, check=True)
            unfinished.rename(self.folder / "database")
        # As udev leaves it everywhere; some hosts of containers close it, and then no user's job can mount an image.
        if os.path.exists("/dev/fuse"):
            os.chmod("/dev/fuse", 0o666)

    def _free_ports(self, count: int) -> int:
        """The first of `count` ports in a row that nobody has, below the ephemeral range; folders begin apart."""
        firsts = range(20000, 30000, count)
        begin = int(self.key, 16) % len(firsts)
        for first in (*firsts[begin:], *firsts[:begin]):
            if all(_is_free(port) for port in range(first, first + count)):
                return first
        raise TestbedError(f"no {count} free ports in a row between 20000 and 30000")

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One `up` or `down` at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _answers(self, daemon: Daemon) -> bool:
        said = self._ask(daemon.question)
        return any(reply in said for reply in daemon.replies)

    def _ask(self, command: str) -> str:
        """What a client command says on stdout; one that fails or hangs has said nothing yet."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return subprocess.run(command.split(), env=self.environ, capture_output=True, text=True, timeout=10).stdout
        return ""

    def _output(self, daemon: Daemon) -> Path:
        """What a daemon prints; those of Slurm keep a log with times beside it, `<name>.log`."""
        return self.folder / "log" / f"{daemon.name}.out"


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def main() -> int:
    """0 done (`status`: it runs), 1 not, the reason on stderr. Stdout is for the shell: `eval "$(testbed.py up)"`."""
    parser = argparse.ArgumentParser(description="A real eight-node Slurm on this host.")
    parser.add_argument("verb", choices=("up", "down", "status"))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="what lasts (default: %(default)s)")
    arguments = parser.parse_args()
    testbed = Testbed(arguments.folder)
    if arguments.verb == "down":
        testbed.down()
        return 0
    if arguments.verb == "up":
        try:
            testbed.up()
        except (TestbedError, subprocess.CalledProcessError) as error:
            print(f"testbed: {error}", file=sys.stderr)
            return 1
    running = testbed.processes().values()
    absent = [daemon.name for daemon in (*testbed.services, *testbed.slurmds) if daemon.name not in running]
    if absent:
        print(f"testbed: not running: {' '.join(absent)}; next: make testbed-up", file=sys.stderr)
        return 1
    print(f"export SLURM_CONF={testbed.conf}")
    print(f"testbed: runs, logs in {testbed.folder}/log; next: eval that line, then sinfo", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
