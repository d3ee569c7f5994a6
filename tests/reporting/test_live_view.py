"""Test how often `status --watch` asks Slurm."""

import pytest

from pipeline.cluster import slurm_jobs
from pipeline.cluster.slurm_jobs import Job
from pipeline.reporting import live_view


def test_asking_becomes_seldom_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], []

    def query(ids: object) -> slurm_jobs.Report:
        asked.append(now[0])
        return slurm_jobs.Report({"4": Job("4", "RUNNING")})

    monkeypatch.setattr(live_view.time, "monotonic", lambda: now[0])
    asker = live_view.Asker(query, shortest=2, longest=30)
    for tenth in range(2000):
        now[0] = tenth / 10
        asker.states(["4"])
    gaps = [round(b - a) for a, b in zip(asked, asked[1:], strict=False)]
    assert gaps[:5] == [2, 4, 8, 16, 30] and set(gaps[4:]) == {30}
