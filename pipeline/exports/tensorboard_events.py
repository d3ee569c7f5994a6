"""Write runs as TensorBoard event files. Only this module imports tensorboard.

    r0001/a3/events.out.tfevents.0000000000.postrain     train/loss, train/learning_rate, ... by step and wall time
    scores/a3/events.out.tfevents.0000000000.postrain    score/dev_accuracy, score/fresh_accuracy, ... by the number of the round

The names hold no time and no host, so the same campaign gives the same files.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.campaign.layout import Round
from pipeline.exports import curves
from pipeline.exports.curves import Point
from pipeline.exports.folder import Written, counted, needs
from pipeline.exports.reading import FIRST
from pipeline.exports.runs import Run
from pipeline.reporting.status import gpus_of_an_arm

FILE = "events.out.tfevents.0000000000.postrain"  # TensorBoard finds event files by `tfevents` in their names
VERSION = "brain.Event:2"
POLL_SECONDS = 5.0  # between two looks at arms that train


def write(runs: Iterable[Run], folder: Path) -> list[Written]:
    """Write the event files of all runs. Raises NotFound without tensorboard, OSError as writing does."""
    written, scored = [], set()
    for run in runs:
        if run.curve:
            add_curve(folder / run.round / run.arm, run.curve)
            written.append(Written(f"{run.round}/{run.arm}", counted(len(run.curve), "step")))
        if run.scores:
            # a0 of r0000 is the reference, which is no earlier a0 of a round, and a1 the base.
            name = run.tags["role"] if run.round == FIRST else run.arm
            values = {f"score/{score}": value for score, value in run.scores.items()}
            add(folder / "scores" / name, [(run.number, run.ended, values)])
            scored.add(name)
    if scored:
        written.append(Written("scores", f"scores by round: {', '.join(sorted(scored))}"))
    return written


def add_curve(folder: Path, points: Iterable[Point]) -> None:
    """Append the points of a training curve to the event file in `folder`."""
    add(folder, [(p.step, p.wall_time, {f"train/{name}": value for name, value in p.values.items()}) for p in points])


def add(folder: Path, points: Iterable[tuple[int, float, Mapping[str, float]]]) -> None:
    """Append (step, wall time in seconds since the epoch, tag -> value) to the event file in `folder`, which is made if it is missing."""
    with needs("tensorboard", "tensorboard"):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    folder.mkdir(parents=True, exist_ok=True)
    is_new = not (folder / FILE).exists()
    with (folder / FILE).open("ab") as file:
        records = RecordWriter(file)
        for number, (step, wall_time, values) in enumerate(points):
            if is_new and not number:
                records.write(Event(wall_time=wall_time, file_version=VERSION).SerializeToString())
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
            records.write(Event(wall_time=wall_time, step=step, summary=summary).SerializeToString())


class Follower:
    """Writes the curves of a round as its arms train, and those of r0000, whose arms run beside the first round.

    events: the folder of the form in an export. A step that a resumed attempt makes again is not written twice; the export that follows
    once the round is closed has the steps that count.
    """

    def __init__(self, folder: Round, events: Path) -> None:
        self._round, self._events = folder, events
        self._last: dict[Path, int] = {}  # the newest step that this object has written for an arm
        self._read: dict[Path, object] = {}  # the versions of an arm's files at its last look

    def look(self) -> int:
        """Write the steps that are new since the last look, at the first look all of them. Returns their number."""
        count = 0
        for folder in (self._round.campaign.round(FIRST), self._round):
            gpus = gpus_of_an_arm(folder.config)
            for arm in folder.frozen_plan().arms:
                place = self._events / folder.name / arm.name
                version = _version(folder, arm.name)
                if self._read.get(place) == version:  # most arms wait, or have ended
                    continue
                self._read[place] = version
                new = [p for p in curves.of_arm(folder, arm.name, gpus) if p.step > self._last.get(place, -1)]
                if not new:
                    continue
                if place not in self._last:
                    shutil.rmtree(place, ignore_errors=True)  # of an earlier export, which had a part of these steps
                add_curve(place, new)
                self._last[place] = new[-1].step
                count += len(new)
        return count

    def follow(self) -> None:
        """Look again and again until the round is closed, for at most a tenth of the time. Raises OSError as writing does."""
        while not self._round.closed.exists():
            began = time.monotonic()
            self.look()
            time.sleep(max(POLL_SECONDS, 9 * (time.monotonic() - began)))


def _version(folder: Round, arm: str) -> object:
    """What changes whenever an arm's curve may have changed: size and time of the files that it is read from."""
    paths = [
        folder.published(arm),
        *(path for attempt in folder.attempts(arm) for path in (attempt.progress, attempt.phases)),
    ]
    found = [(path, path.stat()) for path in paths if path.exists()]
    return [(path, about.st_size, about.st_mtime_ns) for path, about in found]
