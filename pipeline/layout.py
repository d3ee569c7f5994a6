"""Every path of a campaign, in one place: nobody else joins strings into paths.

    runs/<campaign>/
      campaign.yaml  ledger.h5  log.jsonl  hydra/round/r0001.yaml  vault/  code/<digest>/  image/
      rounds/r0001/  config.yaml  plan.json  submitted.json  slurm/
                     a0/attempt_00/...   a0.h5   evidence.json   decisions/00.json   closed.json
      outbox/0003.json  outbox/0003/         what is to be sent to the external target

The folder is the interface between stages. Files are written aside, synced and renamed (`write_file`), so that a name that exists
is complete; a claim is an exclusive mkdir, a seal an exclusive create.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import pwd
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, IntegrityError, NotFound, WorkFailed
from pipeline.records import Plan

ROUND = re.compile(r"r[0-9]{4}")


def write_file(path: Path, data: bytes | str, mode: int = 0o644) -> None:
    """Write whole or not at all: aside in the same folder, fsync, os.replace, fsync of the folder.

    Raises WorkFailed when the disk is full or the folder cannot be written; the earlier file is then untouched.
    """
    payload = data.encode() if isinstance(data, str) else data
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, mode)
        os.replace(aside, path)
        aside = None
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise WorkFailed(
            f"cannot write {path}: {error.strerror}", "Free space or rights there, then run it again"
        ) from error
    finally:
        if aside is not None:
            Path(aside).unlink(missing_ok=True)


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`. Raises ConfigError naming who holds it: several people may share a campaign."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"another {what} runs now ({file.read().strip() or 'nobody knows whose'})",
                "Wait for it, or look at `status`",
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} of {user_name(os.getuid())} on {platform.node()}\n")
        file.flush()
        yield


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def is_alive(pid: int) -> bool:
    """Whether this process of this host is one of the pipeline's and runs; a number may be another's by now."""
    try:
        return b"pipeline" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def whose(error: PermissionError) -> str:
    """Which file of whom is closed to whom: two people on one campaign meet here."""
    path = Path(error.filename or ".")
    while not os.path.exists(path) and path != path.parent:  # Path.exists raises where a folder above is closed
        path = path.parent
    try:
        owner = user_name(path.stat().st_uid)
    except OSError:
        owner = "somebody else"
    me = user_name(os.geteuid())
    return (
        f"{error.filename} is closed to {me}; it belongs to {owner}. A campaign is acted on by the one who made it (its vault holds "
        f"the secret seeds); others may look: `status`, `logs` and `report` need no more than reading"
    )


def read_json(path: Path) -> Any:
    """Raises NotFound when absent, IntegrityError when it is not whole JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except ValueError as error:
        raise IntegrityError(f"{path} is not valid JSON ({error})") from error


def parse_yaml(content: str | bytes) -> Any:
    """Plain YAML, by libyaml where it is there: every command reads a campaign's facts, 30 ms in Python and 2 so. Raises yaml.YAMLError."""
    import yaml  # here, for whoever audits needs no more than the standard library

    return yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def read_json_lines(path: Path) -> list[Any]:
    """All complete lines; a last line without its newline is still being written and is left out."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    try:
        return [json.loads(line) for line in content.split(b"\n")[:-1]]
    except ValueError as error:
        raise IntegrityError(f"{path} has a line that is not JSON ({error})") from error


@dataclass(frozen=True)
class Attempt:
    """One try at an arm: `rounds/r0001/a3/attempt_00/`, made by the worker that claimed it and written by nobody else."""

    folder: Path

    claim = property(lambda self: self.folder / "claim.json")
    phases = property(lambda self: self.folder / "phases.jsonl")
    task_dir = property(lambda self: self.folder / "task")
    trial_log = property(lambda self: self.folder / "trial.log")
    judge_log = property(lambda self: self.folder / "judge.log")
    progress = property(lambda self: self.folder / "progress.jsonl")
    probe = property(lambda self: self.folder / "probe.json")
    adapter_dir = property(lambda self: self.folder / "adapter")
    data_card = property(lambda self: self.folder / "data_card.json")
    saved_dir = property(lambda self: self.folder / "checkpoints")
    sealed = property(lambda self: self.folder / "sealed.json")
    decoded_dir = property(lambda self: self.folder / "decoded")
    completions_dir = property(lambda self: self.folder / "completions")
    result = property(lambda self: self.folder / "result.h5")
    interrupted = property(lambda self: self.folder / "interrupted.json")

    @property
    def number(self) -> int:
        return int(self.folder.name.removeprefix("attempt_"))


@dataclass(frozen=True)
class Round:
    """`rounds/r0001/`."""

    folder: Path

    config = property(lambda self: self.folder / "config.yaml")
    plan = property(lambda self: self.folder / "plan.json")
    submitted = property(lambda self: self.folder / "submitted.json")
    jobs = property(lambda self: self.folder / "jobs.jsonl")
    operational = property(lambda self: self.folder / "operational.json")
    slurm_dir = property(lambda self: self.folder / "slurm")
    logs_dir = property(lambda self: self.folder / "logs")
    meta_dir = property(lambda self: self.folder / "meta")
    evidence = property(lambda self: self.folder / "evidence.json")
    decisions_dir = property(lambda self: self.folder / "decisions")
    proposals_dir = property(lambda self: self.folder / "proposals")
    closed = property(lambda self: self.folder / "closed.json")
    report = property(lambda self: self.folder / "report.html")

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def number(self) -> int:
        return int(self.name[1:])

    @property
    def campaign(self) -> Campaign:
        return Campaign(self.folder.parent.parent)

    def frozen_plan(self) -> Plan:
        """The plan as a record. Raises NotFound before it is frozen, IntegrityError when it is not a plan."""
        if not self.plan.exists():
            raise NotFound(f"round {self.name} is not frozen", "`python -m pipeline round DIR --no-submit` freezes it")
        try:
            return Plan.from_json(read_json(self.plan))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"{self.plan} is not a plan of this version ({error})", "Restore it from a copy"
            ) from error

    def proposal(self, number: int, name: str) -> Path:
        """name: request or response."""
        return self.proposals_dir / f"{number:02d}.{name}.json"

    def published(self, arm: str) -> Path:
        return self.folder / f"{arm}.h5"

    def attempts(self, arm: str) -> list[Attempt]:
        folders = (self.folder / arm).glob("attempt_*")
        return sorted((Attempt(folder) for folder in folders), key=lambda attempt: attempt.number)

    def claim_attempt(self, arm: str) -> Attempt:
        """The next free attempt, by exclusive mkdir: of two workers that ask at once each gets its own."""
        while True:
            taken = self.attempts(arm)
            attempt = Attempt(self.folder / arm / f"attempt_{taken[-1].number + 1 if taken else 0:02d}")
            try:
                attempt.folder.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise WorkFailed(f"cannot claim {attempt.folder}: {error.strerror}") from error
            return attempt


@dataclass(frozen=True)
class Campaign:
    """`runs/<campaign>/`; the only class that knows where things are."""

    folder: Path

    frozen = property(lambda self: self.folder / "campaign.yaml")
    ledger = property(lambda self: self.folder / "ledger.h5")
    log = property(lambda self: self.folder / "log.jsonl")
    paused = property(lambda self: self.folder / "paused")
    hydra_dir = property(lambda self: self.folder / "hydra")
    vault = property(lambda self: self.folder / "vault")
    seeds = property(lambda self: self.folder / "vault" / "seeds.json")
    signing_key = property(lambda self: self.folder / "vault" / "signing_key.pem")
    held_out_dir = property(lambda self: self.folder / "vault" / "real")
    board_dir = property(lambda self: self.folder / "vault" / "board")
    board_lock = property(lambda self: self.folder / ".board.lock")
    outbox = property(lambda self: self.folder / "outbox")
    code_dir = property(lambda self: self.folder / "code")
    image = property(lambda self: self.folder / "image" / "substrate.sqsh")

    @classmethod
    def at(cls, folder: str | Path) -> Campaign:
        return cls(Path(folder).resolve())  # a link to it must not look like another campaign

    @property
    def name(self) -> str:
        return self.folder.name

    def overrides(self, round_name: str) -> Path:
        return self.hydra_dir / "round" / f"{round_name}.yaml"

    def known_rounds(self) -> list[str]:
        """Rounds that have overrides, in order: those that ran and the one that is next."""
        return sorted(path.stem for path in (self.hydra_dir / "round").glob("r*.yaml"))

    def round(self, name: str) -> Round:
        if not ROUND.fullmatch(name):
            raise ConfigError(f"'{name}' is not a round", "Rounds are named r0001, r0002, ...")
        return Round(self.folder / "rounds" / name)

    def frozen_rounds(self) -> Iterable[Round]:
        return (Round(path.parent) for path in sorted((self.folder / "rounds").glob("r*/plan.json")))
