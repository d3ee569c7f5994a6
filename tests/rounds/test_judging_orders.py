"""Play what can happen around a judge job in random orders: every order ends in a log that the audit takes, and in a decision."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.audit import log_schema
from pipeline.audit.findings import Report
from pipeline.campaign import canonical
from pipeline.campaign.errors import ConfigError, JudgeWanted, SlurmRefused, WorkFailed
from pipeline.campaign.layout import Round
from pipeline.campaign.log import Log
from pipeline.cluster import slurm_jobs, slurm_submit
from pipeline.decision import board_submissions, derive
from pipeline.rounds import control, judging, meta


class Killed(BaseException):
    """The process was killed here."""


@dataclass
class Site:
    """The round, its Slurm, and what waits there. unrecorded: what a judge job was submitted for, where nobody recorded it."""

    folder: Round
    slurm: SimpleNamespace
    patch: pytest.MonkeyPatch
    draw: random.Random
    reference: bytes = b""
    told: list[str] = field(default_factory=list)
    unrecorded: list[tuple[str, ...]] = field(default_factory=list)

    def killing(self, module: Any, name: str, at: int, act: Callable[[], object]) -> None:
        """Do something, and be killed before or after a call of a function, the `at`-th; what the process refuses is no matter."""
        real, calls, is_before = getattr(module, name), [0], self.draw.random() < 0.5

        def counted(*words: Any, **options: Any) -> Any:
            calls[0] += 1
            if is_before and calls[0] == at:
                raise Killed
            given = real(*words, **options)
            if calls[0] == at:
                raise Killed
            return given

        with self.patch.context() as patch:
            patch.setattr(module, name, counted)
            try:
                act()
            except (Killed, JudgeWanted, WorkFailed, ConfigError) as error:
                self.told.append(f"  {type(error).__name__} {error}")

    def meta(self) -> None:
        """The meta stage, as somebody types it or as Slurm requeues it, killed at some record of the log or not at all."""
        at = self.draw.choice([0, 0, *range(1, 16)])
        asked = self.draw.choice([[], [], ["reference"], ["submission 1", "submission 7"], *map(list, self.unrecorded)])
        self.killing(Log, "_write", at, lambda: meta.close(self.folder.campaign, self.folder, asked=asked))

    def submit(self) -> None:
        """The chain submits what the log asks for; sbatch refuses it, or the chain is killed before or after its record."""
        if self.draw.random() < 0.2:

            def refuse(*words: Any, **options: Any) -> Any:
                raise SlurmRefused("sbatch refused it")

            with self.patch.context() as patch:
                patch.setattr(slurm_submit, "submit", refuse)
                with (
                    pytest.raises(SlurmRefused)
                    if judging.requested(self.folder.campaign, self.folder)
                    else patch.context()
                ):
                    judging.submit(self.folder.campaign, self.folder)
            return
        before = len(self.slurm.calls)
        at = self.draw.choice([0, 0, 1])
        self.killing(slurm_jobs, "record_submission", at, lambda: judging.submit(self.folder.campaign, self.folder))
        self.unrecorded += [
            tuple(word.removeprefix("--asked=") for word in call.meta[3:]) for call in self.slurm.calls[before:]
        ]

    def job(self) -> None:
        """A job that judges starts, runs or ends; or a person scores one submission (`board local`)."""
        self.slurm.states |= {
            f"{number}{role}": self.draw.choice(["PENDING", "RUNNING", "FAILED"])
            for number in range(len(self.slurm.calls))
            for role in "689"
        }
        for what in judging.unjudged(self.folder.campaign, self.folder):
            if self.draw.random() < 0.3:
                self.judge(what)

    def rerun(self) -> None:
        self.killing(
            slurm_jobs,
            "record_submission",
            0,
            lambda: control.rerun(
                self.folder.campaign, self.folder, [], failed=False, dry_run=False, watch=lambda: None
            ),
        )

    def judge(self, what: str) -> None:
        if what == "reference":
            (self.folder.folder / "reference.h5").write_bytes(self.reference)
            return
        campaign, number = self.folder.campaign, int(what.split()[1])
        (each,) = [
            each for each in board_submissions.submissions_in(Log(campaign.log).records()) if each.number == number
        ]
        score = {"number": number, "adapter_digest": each.adapter_digest, "score": "0.50"}
        place = campaign.board_dir / f"{number:04d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "score.json").write_bytes(canonical.encoded(score))


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3))])
def test_every_order_ends_in_a_decision_and_in_a_log_that_the_audit_takes(
    boarded: Round, slurm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    reference = boarded.folder / "reference.h5"
    site = Site(boarded, slurm, monkeypatch, random.Random(seed), reference.read_bytes())
    reference.unlink()
    for _ in range(10):
        act = site.draw.choice([site.meta, site.meta, site.meta, site.submit, site.submit, site.job, site.rerun])
        site.told.append(act.__name__)
        act()
    slurm.states.clear()  # every job has ended
    site.judge("reference")
    asked: list[str] = []
    for _ in range(3):
        try:
            decision = meta.close(boarded.campaign, boarded, asked=asked)
            break
        except JudgeWanted:  # the board's submissions, if no meta stage came so far
            asked = judging.requested(boarded.campaign, boarded)
    assert decision.state == "decided", site.told
    records = Log(boarded.campaign.log).records()
    report = Report()
    assert log_schema.check_records(records, report) and not report.findings, (report.findings, site.told)
    derive.check_submissions(records)
    for record in records:
        if record["event"] == "decision":
            derived = derive.derive(records[: record["seq"]], record["round"])
            assert canonical.plain(asdict(derived.decision)) == record["decision"]
