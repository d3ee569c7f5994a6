"""Every path of a campaign. Other modules ask these classes for a path instead of joining names.

    runs/<campaign>/
      campaign.yaml  ledger.h5  log.jsonl  hydra/round/r0001.yaml  vault/  code/<digest>/  image/
      rounds/r0001/  config.yaml  plan.json  submitted.json  slurm/
                     a0/attempt_00/...   a0.h5   evidence.json   decisions/00.json   closed.json
      outbox/0003.json  outbox/0003/         a submission that is ready for the external target

Stages exchange values through this folder alone. `files.write_file` writes each file to a temporary name and renames it, so a file that
exists is complete. A worker claims an attempt by an exclusive mkdir and seals an adapter by an exclusive link. The paths are SharedPaths
(shared_path.py), because other machines write here too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.campaign.errors import ConfigError, NotFound, OtherVersion, WorkFailed
from pipeline.campaign.files import read_json
from pipeline.campaign.records import Plan
from pipeline.campaign.shared_path import SharedPath

CODE_ROOT = Path(__file__).resolve().parents[2]
"""The checkout or frozen code that this file belongs to; it holds `pipeline/`, `constitution/` and `hydra_conf/`."""
ROUND = re.compile(r"r[0-9]{4}")


@dataclass(frozen=True)
class _Folder:
    """A folder of a campaign, in which every path is a SharedPath."""

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", SharedPath(self.folder))


@dataclass(frozen=True)
class Attempt(_Folder):
    """One try at an arm, `rounds/r0001/a3/attempt_00/`. Only the worker that claimed it, and its helpers, write there."""

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
    agent_dir = property(lambda self: self.folder / "agent")
    agent_report = property(lambda self: self.folder / "agent" / "report.json")
    transcript = property(lambda self: self.folder / "agent" / "transcript.jsonl")
    fork_diff = property(lambda self: self.folder / "agent" / "fork.diff")

    @property
    def number(self) -> int:
        return int(self.folder.name.removeprefix("attempt_"))


@dataclass(frozen=True)
class Round(_Folder):
    """The folder of one round, such as `rounds/r0001/`."""

    config = property(lambda self: self.folder / "config.yaml")
    plan = property(lambda self: self.folder / "plan.json")
    forecast = property(lambda self: self.folder / "forecast.json")
    submitted = property(lambda self: self.folder / "submitted.json")
    jobs = property(lambda self: self.folder / "jobs.jsonl")
    operational = property(lambda self: self.folder / "operational.json")
    slurm_request = property(lambda self: self.folder / "slurm_request.json")
    cancelled = property(lambda self: self.folder / "cancelled.jsonl")
    slurm_dir = property(lambda self: self.folder / "slurm")
    logs_dir = property(lambda self: self.folder / "logs")
    meta_dir = property(lambda self: self.folder / "meta")
    evidence = property(lambda self: self.folder / "evidence.json")
    decisions_dir = property(lambda self: self.folder / "decisions")
    proposals_dir = property(lambda self: self.folder / "proposals")
    server_dir = property(lambda self: self.folder / "agent_server")  # of the job that serves the agents' model
    server_address = property(lambda self: self.folder / "agent_server" / "address.json")
    server_log = property(lambda self: self.folder / "agent_server" / "vllm.log")
    closed = property(lambda self: self.folder / "closed.json")
    report = property(lambda self: self.folder / "report.html")
    lock = property(lambda self: self.folder / ".lock")  # of the process that runs the round
    meta_lock = property(lambda self: self.folder / ".meta.lock")
    reference_lock = property(lambda self: self.folder / ".reference.lock")

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def server_key(self) -> Path:
        """The API key of the round's model server. The vault is closed to everybody but the user, and bound into no sandbox."""
        return self.campaign.vault / "agent_server" / f"{self.name}.key"

    @property
    def server_certificate(self) -> Path:
        """The certificate of the round's model server with its private key, as PEM."""
        return self.campaign.vault / "agent_server" / f"{self.name}.pem"

    @property
    def number(self) -> int:
        return int(self.name[1:])

    @property
    def campaign(self) -> Campaign:
        return Campaign(self.folder.parent.parent)

    def frozen_plan(self) -> Plan:
        """Read the round's plan. Raises NotFound before it is frozen, OtherVersion where the file is not a plan of this version."""
        if not self.plan.exists():
            raise NotFound(f"round {self.name} is not frozen", "`python -m pipeline round DIR --no-submit` freezes it")
        try:
            return Plan.from_json(read_json(self.plan))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OtherVersion(
                f"{self.plan} is not a plan of this version ({error})", "Restore it from a copy"
            ) from error

    def proposal(self, number: int, name: str) -> Path:
        """Return the path of a proposal's bytes; name: request or response."""
        return self.proposals_dir / f"{number:02d}.{name}.json"

    def published(self, arm: str) -> Path:
        """Return the path of an arm's published result, such as `a3.h5`."""
        return self.folder / f"{arm}.h5"

    def attempts(self, arm: str) -> list[Attempt]:
        """Return the arm's attempts, the oldest first."""
        folders = (self.folder / arm).glob("attempt_*")
        return sorted((Attempt(folder) for folder in folders), key=lambda attempt: attempt.number)

    def claim_attempt(self, arm: str) -> Attempt:
        """Make and return the next attempt, by an exclusive mkdir: two workers that ask at once get different ones.

        Raises WorkFailed where the folder cannot be made.
        """
        number = 0
        while True:
            earlier = self.attempts(arm)
            number = max(number, earlier[-1].number + 1 if earlier else 0)
            attempt = Attempt(self.folder / arm / f"attempt_{number:02d}")
            try:
                attempt.folder.mkdir(parents=True)
            except FileExistsError:  # another worker's, which this machine may not list yet
                number += 1
                continue
            except OSError as error:
                raise WorkFailed(
                    f"cannot claim {attempt.folder}: {error.strerror}",
                    "Free space or rights there, then start the arm again",
                ) from error
            return attempt


@dataclass(frozen=True)
class Campaign(_Folder):
    """The folder of one campaign, `runs/<campaign>/`."""

    frozen = property(lambda self: self.folder / "campaign.yaml")
    ledger = property(lambda self: self.folder / "ledger.h5")
    report = property(lambda self: self.folder / "report.html")
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
        """Return the campaign in `folder`, which need not exist yet. Raises ConfigError for a file."""
        if os.path.isfile(folder):
            raise ConfigError(f"{folder} is a file", "Valid: the folder of a campaign, such as runs/demo")
        return cls(Path(folder).resolve())  # so that a link is not taken for another campaign

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def has_ended(self) -> bool:
        """Whether `end` was logged, so that no round may follow. It looks at the bytes of canonical JSON, because `status` must be quick."""
        return self.log.exists() and b'"event":"end"' in self.log.read_bytes().rpartition(b"\n")[0]

    def overrides(self, round_name: str) -> Path:
        """Return the path of a round's override file."""
        return self.hydra_dir / "round" / f"{round_name}.yaml"

    def known_rounds(self) -> list[str]:
        """Return the names of the rounds with an override file, in order: those that have run and the next one."""
        return sorted(path.stem for path in (self.hydra_dir / "round").glob("r*.yaml"))

    def round(self, name: str) -> Round:
        """Return a round by its name. Raises ConfigError where `name` is not like r0001."""
        if not ROUND.fullmatch(name):
            raise ConfigError(f"'{name}' is not a round", "Rounds are named r0001, r0002, ...")
        return Round(self.folder / "rounds" / name)

    def frozen_rounds(self) -> Iterable[Round]:
        """Return the rounds that have a plan, in order."""
        return (Round(path.parent) for path in sorted((self.folder / "rounds").glob("r*/plan.json")))
