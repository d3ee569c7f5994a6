"""Test checkpoints by the clock: a run that is killed loses no more than the interval, and its adapter has the same bytes whenever it saved."""

from pathlib import Path

import pytest

from substrate.interface.errors import Stopped, UsageError
from substrate.interface.progress import Progress
from substrate.training import checkpoint
from tests.support import trainings

# megatron-core 0.16.1 calling itself in ways that it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]


class Killed(BaseException):
    """Ends a training in the middle, as SIGKILL would: nothing more is saved."""


@pytest.fixture(scope="module")
def undisturbed(alone, inputs, tmp_path_factory) -> Path:
    """The out folder of a training without a clock."""
    return trainings.train(trainings.write_task(tmp_path_factory.mktemp("whole"), inputs), alone)


@pytest.fixture
def saved(monkeypatch) -> list[int]:
    """The steps after which a checkpoint was saved."""
    steps, save = [], checkpoint.save

    def saving(folder, tensors, record):
        steps.append(record["step"])
        save(folder, tensors, record)

    monkeypatch.setattr(checkpoint, "save", saving)
    return steps


def by_the_clock(monkeypatch, seconds: str) -> None:
    monkeypatch.setenv(checkpoint.VARIABLE, seconds)
    monkeypatch.setattr(checkpoint, "SHARE", 1e6)  # saving may take all of the time


def kill_after(monkeypatch, step: int) -> None:
    write = Progress.write

    def writing(self, phase, **values):
        write(self, phase, **values)
        if values.get("step") == step + 1:
            raise Killed

    monkeypatch.setattr(Progress, "write", writing)


def test_case_16_when_checkpoints_are_saved_changes_no_byte_of_the_adapter(
    alone, inputs, undisturbed, tmp_path, monkeypatch, saved
):
    by_the_clock(monkeypatch, "1e-9")
    out = trainings.train(trainings.write_task(tmp_path, inputs), alone)
    assert saved == list(range(1, 10))  # of ten steps; the recipe counts to three
    assert trainings.adapter(out) == trainings.adapter(undisturbed)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_000008", "step_000009"]


def test_case_16_a_killed_run_resumes_from_the_clock_s_checkpoint(
    alone, inputs, undisturbed, tmp_path, monkeypatch, saved
):
    """The recipe counts to three; without a clock the run would go on from step 3."""
    by_the_clock(monkeypatch, "1e-9")
    task = trainings.write_task(tmp_path, inputs)
    with monkeypatch.context() as killing:
        kill_after(killing, 5)
        with pytest.raises(Killed):
            trainings.train(task, alone)
    assert saved[-1] == 5
    out = trainings.train(task, alone)
    trained = [line["step"] for line in trainings.progress(out) if line["phase"] == "train"]
    assert trained == list(range(1, 11)) and saved[5:] == [6, 7, 8, 9]
    assert trainings.adapter(out) == trainings.adapter(undisturbed)


def test_without_a_clock_the_recipe_counts_and_no_step_is_saved_twice(alone, inputs, tmp_path, monkeypatch, saved):
    monkeypatch.delenv(checkpoint.VARIABLE, raising=False)
    trainings.stop_after(monkeypatch, 6, tmp_path / "stop")
    with pytest.raises(Stopped, match="stopped after step 6"):
        trainings.train(trainings.write_task(tmp_path, inputs), alone)
    assert saved == [3, 6]


def test_saving_takes_a_twentieth_of_the_time_at_most(monkeypatch):
    now, takes = [0.0], [1.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint, "save", lambda *_: now.__setitem__(0, now[0] + takes[0]))

    def due(saver, step=1):
        return saver.is_due(step, lambda mine: mine)

    saver = checkpoint.Saver(100, 600.0)
    assert not due(saver) and due(saver, 200)
    now[0] = 600.0
    assert due(saver)
    saver.save(None, (), {"step": 1})
    assert not due(saver)
    now[0] = 1201.0
    assert due(saver)
    takes[0] = 60.0  # a whole model, not an adapter: the next one is due after twenty minutes
    saver.save(None, (), {"step": 2})
    now[0] = 1261.0 + 1199.0
    assert not due(saver)
    now[0] += 1.0
    assert due(saver)
    assert not due(checkpoint.Saver(100, 0.0))


def test_one_rank_s_clock_counts_for_all():
    asked = []
    assert checkpoint.Saver(100, 600.0).is_due(1, lambda mine: asked.append(mine) or True)
    assert asked == [False]


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "soon", ""])
def test_a_wrong_interval_is_refused(monkeypatch, text):
    monkeypatch.setenv(checkpoint.VARIABLE, text)
    with pytest.raises(UsageError, match="must be a number of seconds"):
        checkpoint.Saver.from_environment(1)
