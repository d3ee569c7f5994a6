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

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, WorkFailed
from pipeline.campaign.files import read_json
from pipeline.campaign.records import Plan

CODE_ROOT = Path(__file__).resolve().parents[2]
"""Where this code lies: a checkout, or the frozen code of a campaign. `constitution/` and `hydra_conf/` are beside `pipeline/`."""
ROUND = re.compile(r"r[0-9]{4}")


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
