#!/usr/bin/env python3
"""Start and stop a real eight-node Slurm on one host: `up`, `down`, `status`.

    eval "$(python3 slurm/testbed/testbed.py up)"    # takes five seconds; then sinfo, sbatch, squeue and sacct work here
    python3 slurm/testbed/testbed.py down

The testbed runs slurmctld, slurmdbd, MariaDB, munge and eight slurmd with ports, sockets, a key and a database of its own. It leaves the
host's own Slurm alone, and two checkouts can each have a cluster. It needs root, Debian's packages of these daemons, and no venv.

    build/testbed/                   stays: the database, the controller's state (so that job ids go on) and logs
    /var/lib/slurm-testbed-<hash>/   is removed by `down`: configuration, key, spool and sockets, whose paths may have 108 characters

Every daemon has TESTBED=<second folder>/<name> in its environment, and the testbed finds its processes by that mark, which unlike a pid
file is never out of date. So `up` starts exactly what is missing and `down` stops exactly what `up` started, even after a kill half-way.
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
JOB = "job"  # the name of every process of the testbed that is not a daemon
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # an ordinary user's PATH lacks sbin
PROGRAMS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch")
PACKAGES = "slurm-wlm slurmdbd munge mariadb-server"
GONE_SECONDS = 3  # a daemon has ended if it had no process for so long
START_SECONDS = 60  # the longest wait for one daemon; each needs about a second on an idle core
STOP_SECONDS = 10  # from SIGTERM to SIGKILL


class TestbedError(Exception):
    """The testbed cannot run here, or a daemon did not start. The message says what to do, or shows the end of the daemon's log."""


@dataclasses.dataclass(frozen=True)
class Daemon:
    """A daemon, and a client command (`question`) whose output holds one of the `replies` once the daemon answers."""

    name: str
    command: str
    question: str
    replies: tuple[str, ...]


def why_not() -> str:
    """Why the testbed cannot run on this host, with the cure; empty if it can."""
    if os.geteuid() != 0:
        return "the Slurm testbed needs root: sudo make testbed-up"
    absent = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
    return f"{', '.join(absent)} not found: apt-get install -y {PACKAGES}" if absent else ""


class Testbed:
    """The cluster of one folder. `up` and `down` work in any state that a crash can leave."""

    __test__ = False  # keeps pytest from taking this for a class of tests

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder.resolve()
        self.key = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        self.run_dir = run = Path(f"/var/lib/slurm-testbed-{self.key}")
        self.conf = run / "slurm.conf"
        # This replaces the caller's environment, whose SLURM_* and SBATCH_* variables would leak into every job.
        # MYSQL_UNIX_PORT names the database's socket to slurmdbd's client library; slurmdbd has no setting for it.
        self.environ = {"PATH": PATH, "SLURM_CONF": str(self.conf), "MYSQL_UNIX_PORT": f"{run}/mariadb.socket"}
        munged = f"munged --foreground --socket={run}/munge.socket --key-file={run}/munge.key"
        munged += f" --seed-file={run}/munge.seed --pid-file={run}/munged.pid"
        mariadbd = f"mariadbd --no-defaults --user=root --skip-networking --datadir={run}/lasting/database"
        mariadbd += f" --socket={run}/mariadb.socket --pid-file={run}/mariadbd.pid"
        mariadbd += " --performance-schema=OFF --innodb-flush-log-at-trx-commit=0"
        # slurmctld does not start before accounting knows its cluster, so the question to slurmdbd also adds the cluster.
        add_cluster = "sacctmgr --immediate add cluster testbed"
        self.services = (  # in the order in which they start, because each needs the one before it
            Daemon("munged", munged, f"munge --no-input --socket={run}/munge.socket", ("MUNGE:",)),
            Daemon("mariadbd", mariadbd, "mariadb-admin --no-defaults ping", ("is alive",)),
            Daemon("slurmdbd", "slurmdbd -D", add_cluster, ("Adding Cluster", "already exists")),
            Daemon("slurmctld", "slurmctld -D", "scontrol ping", ("is UP",)),
        )
        serving = ("[idle]", "[mix]", "[alloc]", "[comp]")
        self.slurmds = tuple(
            Daemon(node, f"slurmd -D -N {node}", f"sinfo --noheader --nodes={node} --format=[%t]", serving)
            for node in NODES
        )

    def up(self) -> None:
        """Start what is not running, and return when all eight nodes accept jobs. Raises TestbedError."""
        if reason := why_not():
            raise TestbedError(reason)
        with self._lock():
            if not self.conf.exists() or not self.processes():
                self._prepare()
            for daemon in self.services:
                self._start(daemon)
            # Bring nodes back that a test or a crash took out of service.
            if absent := self._ask("sinfo --noheader --partition=main --states=down,drain --format=%N").strip():
                self._ask(f"scontrol update nodename={absent} state=resume")
            self._start(*self.slurmds)

    def down(self) -> None:
        """Cancel the jobs, stop the daemons in the reverse order of their start, and remove the second folder."""
        with self._lock():
            if "slurmctld" in self.processes().values():
                self._ask(f"scancel {self._ask('squeue -h -o %F')}")  # the next `up` would requeue jobs only killed
                _wait(lambda: not self._ask("squeue --noheader"), STOP_SECONDS)
            self._stop(JOB, *NODES)
            for daemon in reversed(self.services):
                self._stop(daemon.name)
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def processes(self) -> dict[int, str]:
        """Process id -> the daemon's name or JOB, for every process whose environment has the testbed's mark."""
        daemon_mark, job_mark = f"TESTBED={self.run_dir}/".encode(), f"SLURM_CONF={self.conf}".encode()
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environ = (entry / "environ").read_bytes().split(b"\0")
                program = (entry / "comm").read_text().strip()
            except OSError:  # the process has ended meanwhile
                continue
            names = [item.removeprefix(daemon_mark).decode() for item in environ if item.startswith(daemon_mark)]
            if names:
                # A slurmstepd inherits the mark from its slurmd.
                found[int(entry.name)] = JOB if program == "slurmstepd" else names[0]
            elif job_mark in environ and any(item.startswith(b"SLURM_JOB_ID=") for item in environ):
                found[int(entry.name)] = JOB
        return found

    def _start(self, *daemons: Daemon) -> None:
        """Start the daemons that do not run, then wait until each answers. Raises TestbedError if one does not."""
        running = self.processes().values()
        for daemon in (daemon for daemon in daemons if daemon.name not in running):
            environ = self.environ | {"TESTBED": f"{self.run_dir}/{daemon.name}"}
            with open(self._output(daemon), "wb") as output:
                # With setsid --fork the daemon is not our child, so that it leaves no zombie when a test kills it.
                command = ["setsid", "--fork", *daemon.command.split()]
                subprocess.run(
                    command, cwd="/", env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=True
                )
        for daemon in daemons:
            deadline = (seen := time.monotonic()) + START_SECONDS
            while not self._answers(daemon):
                if daemon.name in self.processes().values():
                    seen = time.monotonic()
                # A process has no environment for a moment while it starts a program, so it is missed only after a while.
                if time.monotonic() > min(deadline, seen + GONE_SECONDS):
                    output_path = self._output(daemon)
                    tail = output_path.read_text(errors="replace").splitlines()[-15:]
                    raise TestbedError("\n".join([f"{daemon.name} does not answer; {output_path} ends:", *tail]))
                time.sleep(0.1)

    def _stop(self, *names: str) -> None:
        """Send SIGTERM to the processes of these names, and SIGKILL to those that do not end."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            for pid, name in self.processes().items():
                if name in names:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, sent)
            if _wait(lambda: not set(names) & set(self.processes().values()), STOP_SECONDS):
                return

    def _prepare(self) -> None:
        """Make configuration, key and devices of a cluster that does not run, and its database if there is none."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        for folder in (self.run_dir / "spool", self.folder / "log", self.folder / "state"):
            folder.mkdir(parents=True, exist_ok=True)
        # Daemons reach the first folder through a link, because its own name may hold a space, which Slurm does not allow.
        (self.run_dir / "lasting").symlink_to(self.folder)
        for i in range(8):
            os.mknod(self.run_dir / f"gpu{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # the same device as /dev/null
        key = self.run_dir / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        port = self._free_ports(2 + len(NODES))
        ports = {
            "slurmctld_port": port,
            "slurmdbd_port": port + 1,
            "slurmd_ports": f"{port + 2}-{port + 1 + len(NODES)}",
        }
        values = {"run": self.run_dir, "host": socket.gethostname().split(".")[0], **ports}
        for template in TEMPLATES.glob("*.conf.in"):
            conf = self.run_dir / template.stem
            # slurmdbd refuses a file that others may read.
            conf.touch(mode=0o600 if conf.name == "slurmdbd.conf" else 0o644)
            conf.write_text(string.Template(template.read_text()).substitute(values))
        if not (self.folder / "database").exists():
            unfinished = self.folder / "database.new"  # renamed when complete: a killed `up` leaves no half database
            shutil.rmtree(unfinished, ignore_errors=True)
            options = "--no-defaults --user=root --auth-root-authentication-method=socket --skip-test-db"
            command = ["mariadb-install-db", *options.split(), f"--datadir={self.run_dir}/lasting/{unfinished.name}"]
            subprocess.run(command, env=self.environ, stdout=subprocess.DEVNULL, check=True)
            unfinished.rename(self.folder / "database")
        # udev gives this mode everywhere, but some container hosts do not, and then no user's job can mount an image.
        if os.path.exists("/dev/fuse"):
            os.chmod("/dev/fuse", 0o666)

    def _free_ports(self, count: int) -> int:
        """The first of `count` consecutive free ports below the ephemeral range. Each checkout starts its search elsewhere."""
        firsts = range(20000, 30000, count)
        begin = int(self.key, 16) % len(firsts)
        for first in (*firsts[begin:], *firsts[:begin]):
            if all(_is_free(port) for port in range(first, first + count)):
                return first
        raise TestbedError(
            f"no {count} consecutive ports between 20000 and 30000 are free; stop a program that uses many"
        )

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """A lock that lets one `up` or `down` run at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _answers(self, daemon: Daemon) -> bool:
        output = self._ask(daemon.question)
        return any(reply in output for reply in daemon.replies)

    def _ask(self, command: str) -> str:
        """The standard output of a client command; empty if it hangs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return subprocess.run(command.split(), env=self.environ, capture_output=True, text=True, timeout=10).stdout
        return ""

    def _output(self, daemon: Daemon) -> Path:
        """The file that gets what a daemon prints. Slurm's daemons also keep a log with times, `<name>.log`."""
        return self.folder / "log" / f"{daemon.name}.out"


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until the condition holds. Returns whether it did within so many seconds."""
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
    """Run a command. Returns 0 if it worked (`status`: if the testbed runs), else 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(description="A real eight-node Slurm on this host.")
    parser.add_argument("verb", choices=("up", "down", "status"))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the folder that stays (default: %(default)s)")
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
        print(f"testbed: these do not run: {' '.join(absent)}; next: make testbed-up", file=sys.stderr)
        return 1
    print(f"export SLURM_CONF={testbed.conf}")
    print(f"testbed: it runs, logs in {testbed.folder}/log; next: eval the line above, then sinfo", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
