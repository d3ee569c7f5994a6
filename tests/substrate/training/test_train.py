"""Test the trainer: it resumes to the last bit, stops when asked, names the step that diverged, and follows NeMo's rates.

Most tests run one rank in this process. The kill is a real SIGKILL of two real ranks.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import footprint
from substrate.interface.errors import Diverged, Stopped, UsageError
from substrate.interface.task import Task
from substrate.training.schedule import SHAPES, learning_rates
from tests.support import trainings
from tests.support.trainings import ROOT

# megatron-core 0.16.1 calling itself in ways that it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
GOLDEN = ROOT / "tests" / "golden" / "train_task.json"
# A rank that dies by SIGKILL after the line of step 5, if it is rank 0, and the launcher of two such ranks.
DYING_RANK = """
import os, signal
from substrate.interface import progress; from substrate import train
write = progress.Progress.write
def writing(self, phase, **values):
    write(self, phase, **values)
    if values.get("step") == 5 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
progress.Progress.write = writing
train.main()
"""
# The same rank, but it asks to be stopped there.
STOPPING_RANK = DYING_RANK.replace("os.kill(os.getpid(), signal.SIGKILL)", "open(os.environ['STOP'], 'w').close()")
# Ten trainings, each killed by SIGKILL at a random moment and started again; forked, so that torch is imported once.
KILLED_RUNS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import nemo.core.optim.lr_scheduler
import substrate.model
from substrate.distributed.groups import start
from substrate.interface.task import Task
from substrate.recipes import load_recipe
from substrate.training.run import Training

def child(task):
    if pid := os.fork():
        return pid
    torch.set_num_threads(1)
    Task.read(task).out.mkdir(exist_ok=True)
    read = Task.read(task)
    Training(read, load_recipe(read.recipe), start({axis: 1 for axis in ("tp", "pp", "ep", "cp", "dp")})).run()
    os._exit(0)

for number, path in enumerate(sys.argv[1:]):
    task, generator = Path(path), random.Random(number)
    pid, progress = child(task), Path(path).parent / "out" / "progress.jsonl"
    step = generator.randint(1, 9)
    while not progress.exists() or len(progress.read_text().splitlines()) <= step:
        time.sleep(0.001)
    time.sleep(generator.uniform(0, 0.05))  # anywhere in a step, or in the writing of a checkpoint
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    assert os.waitpid(child(task), 0)[1] == 0
"""
LAUNCHER = """
import sys
from substrate.distributed import launch
launch.GRACE_SECONDS = 2.0
sys.exit(launch.run_ranks("dying_rank", sys.argv[1:], 2))
"""


@pytest.fixture(scope="module")
def uninterrupted(alone, inputs, tmp_path_factory) -> Path:
    """The out folder of a training that nothing disturbed."""
    return trainings.train(trainings.write_task(tmp_path_factory.mktemp("whole"), inputs), alone)


def test_progress_has_every_key_and_the_loss_falls(uninterrupted):
    start, *steps = trainings.progress(uninterrupted)
    assert start["phase"] == "start" and start["seconds"] > 0
    keys = {"phase", "step", "num_steps", "loss", "grad_norm", "learning_rate", "tokens", "seconds"}
    assert all(set(line) == keys for line in steps)
    assert [line["step"] for line in steps] == list(range(1, 11))
    for name in ("tokens", "seconds"):
        assert all(a[name] < b[name] for a, b in zip(steps, steps[1:], strict=False))
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_stop_file_then_resume_equals_the_uninterrupted_run(alone, inputs, uninterrupted, tmp_path, monkeypatch):
    task = trainings.write_task(tmp_path, inputs)
    trainings.stop_after(monkeypatch, 4, tmp_path / "stop")
    with pytest.raises(Stopped, match="stopped after step 4 of 10; the state is saved") as stopped:
        trainings.train(task, alone)
    assert stopped.value.exit_code == 75
    assert not (tmp_path / "out" / "adapter").exists()
    (tmp_path / "stop").unlink()
    monkeypatch.undo()
    out = trainings.train(task, alone)
    assert trainings.adapter(out) == trainings.adapter(uninterrupted)
    assert [line.get("step") for line in trainings.progress(out)] == [None, 1, 2, 3, 4, None, 5, 6, 7, 8, 9, 10]
    same = ("loss", "grad_norm", "learning_rate", "tokens")
    assert [line[name] for line in trainings.progress(out)[6:] for name in same] == [
        line[name] for line in trainings.progress(uninterrupted)[5:] for name in same
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_recomputed_changes_no_number(alone, inputs, tmp_path, dropout):
    """Same losses, gradient norms and adapter, to the last bit: so the memory plan may choose."""
    found = []
    for mode in ("none", "selective", "full"):
        lora = trainings.config("recipe", "sft_lora")["lora"] | {"dropout": dropout}
        task = trainings.write_task(tmp_path / mode, inputs, lora=lora)
        content = json.loads(task.read_text())
        content["config"]["parallelism"]["recompute"] = mode
        task.write_text(json.dumps(content))
        out = trainings.train(task, alone)
        steps = [(line["loss"], line["grad_norm"]) for line in trainings.progress(out) if line["phase"] == "train"]
        found.append((steps, trainings.adapter(out)))
    assert len(found[0][0]) == 10
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_sees_factors_that_an_optimizer_changed_behind_autograd(alone, inputs, tmp_path, monkeypatch, dtype):
    """Casts are made once a step. An optimizer that writes to `.data`, as NeMo's do, leaves no trace in a tensor's version."""

    class Open(torch.optim.SGD):
        behind = False

        def step(self) -> None:
            for group in self.param_groups:
                for tensor in group["params"]:
                    (tensor.data if self.behind else tensor.detach()).add_(tensor.grad, alpha=-group["lr"])

    class Behind(Open):
        behind = True

    losses = []
    for optimizer in (Open, Behind):
        monkeypatch.setattr(
            "substrate.training.run.make_optimizer", lambda name, given, decay, made=optimizer: made(given, lr=1e-3)
        )  # fmt: skip
        lora = trainings.config("recipe", "sft_lora")["lora"] | {"dropout": 0.0}
        task = trainings.write_task(tmp_path / optimizer.__name__ / dtype, inputs, lora=lora)
        content = json.loads(task.read_text())
        content["config"]["model"]["dtype"] = dtype
        task.write_text(json.dumps(content))
        lines = trainings.progress(trainings.train(task, alone))
        losses.append([line["loss"] for line in lines if line["phase"] == "train"])
    assert losses[0] == losses[1]
    assert losses[0][-1] != losses[0][0]


def test_stopped_before_the_first_step(alone, inputs, uninterrupted, tmp_path):
    task = trainings.write_task(tmp_path, inputs)
    (tmp_path / "stop").touch()
    with pytest.raises(Stopped, match="after step 0"):
        trainings.train(task, alone)
    (tmp_path / "stop").unlink()
    assert trainings.adapter(trainings.train(task, alone)) == trainings.adapter(uninterrupted)


@pytest.mark.slow
def test_killed_ranks_resume_to_the_same_adapter(inputs, tmp_path):
    whole, killed = (trainings.write_task(tmp_path / name, inputs, tp=2) for name in ("whole", "killed"))
    assert trainings.spawn(["-m", "substrate.train"], whole).returncode == 0
    (tmp_path / "dying_rank.py").write_text(DYING_RANK)
    assert trainings.spawn(["-c", LAUNCHER], killed, PYTHONPATH=f"{tmp_path}:{ROOT}").returncode == 128 + 9
    checkpoints = tmp_path / "killed" / "out" / "checkpoints"
    assert [path.name for path in sorted(checkpoints.glob("step_*"))] == ["step_000003"]
    resumed = trainings.spawn(["-m", "substrate.train"], killed)
    assert resumed.returncode == 0, resumed.stderr
    assert trainings.adapter(tmp_path / "killed" / "out") == trainings.adapter(tmp_path / "whole" / "out")
    steps = [line["step"] for line in trainings.progress(tmp_path / "killed" / "out") if line["phase"] == "train"]
    assert steps == list(range(1, 11))


@pytest.mark.slow
def test_ten_killed_runs_resume_to_the_same_adapter(inputs, uninterrupted, tmp_path):
    tasks = [trainings.write_task(tmp_path / f"run{number}", inputs) for number in range(10)]
    done = trainings.spawn(["-c", KILLED_RUNS, *map(str, tasks[:-1])], tasks[-1])
    assert done.returncode == 0, done.stderr
    assert {trainings.adapter(task.parent / "out") for task in tasks} == {trainings.adapter(uninterrupted)}


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(alone, inputs, tmp_path, monkeypatch):
    """TP=1 to 2, and TP=2 to 1, against a run that stayed; with dropout, whose masks are those of one rank at any TP."""
    expected = trainings.progress(trainings.train(trainings.write_task(tmp_path / "whole", inputs), alone))
    narrow = trainings.write_task(tmp_path / "narrow", inputs)
    trainings.stop_after(monkeypatch, 5, tmp_path / "narrow" / "stop")
    with pytest.raises(Stopped):
        trainings.train(narrow, alone)
    monkeypatch.undo()
    (tmp_path / "narrow" / "stop").unlink()
    widened = trainings.spawn(["-m", "substrate.train"], trainings.write_task(tmp_path / "narrow", inputs, tp=2))
    assert widened.returncode == 0, widened.stderr

    (tmp_path / "dying_rank.py").write_text(STOPPING_RANK)
    wide, stop = trainings.write_task(tmp_path / "wide", inputs, tp=2), tmp_path / "wide" / "stop"
    stopped = trainings.spawn(["-c", LAUNCHER], wide, PYTHONPATH=f"{tmp_path}:{ROOT}", STOP=str(stop))
    assert "stopped after step 5 of 10" in stopped.stderr
    stop.unlink()
    trainings.train(trainings.write_task(tmp_path / "wide", inputs), alone)
    for name in ("narrow", "wide"):
        losses = [line["loss"] for line in trainings.progress(tmp_path / name / "out") if line["phase"] == "train"]
        assert losses == pytest.approx([line["loss"] for line in expected[1:]], abs=1e-6)
        ours, theirs = (
            load_file(tmp_path / each / "out/adapter/adapter_model.safetensors") for each in (name, "whole")
        )
        assert ours.keys() == theirs.keys()
        # By norm: Adam divides by the root of a gradient's own square, so one element with next to none moves by 1.4e-6 on some processors.
        # The gradient of keys is a difference of nearly equal terms: .7e-6 with a pass for each row, 1.1e-6 to 1.3e-6 packed, 4.2e-6 with
        # dropout too. Another mask on one rank would be whole percents.
        apart = {key: float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in ours}
        assert max(apart.values()) < 1e-5, max(apart.items(), key=lambda item: item[1])


def test_damaged_checkpoint_is_passed_over(alone, inputs, uninterrupted, tmp_path, monkeypatch):
    task = trainings.write_task(tmp_path, inputs)
    trainings.stop_after(monkeypatch, 7, tmp_path / "stop")
    with pytest.raises(Stopped):
        trainings.train(task, alone)
    monkeypatch.undo()
    (tmp_path / "stop").unlink()
    checkpoints = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000006", "step_000007"]
    newest = next((checkpoints / "step_000007").glob("*.safetensors"))
    config = json.loads(task.read_text())["config"]
    forecast = footprint.checkpoint_bytes(config["model"], config["recipe"])
    assert newest.stat().st_size == pytest.approx(forecast, rel=0.1)  # names and the generator's state are not counted
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match=r"step_000007 is damaged .*safetensors.*\) and skipped"):
        out = trainings.train(task, alone)
    assert trainings.adapter(out) == trainings.adapter(uninterrupted)


def test_checkpoint_of_another_run_is_refused(alone, inputs, tmp_path):
    (tmp_path / "stop").touch()
    with pytest.raises(Stopped):
        trainings.train(trainings.write_task(tmp_path, inputs), alone)
    with pytest.raises(UsageError, match="was written with another recipe"):
        trainings.train(trainings.write_task(tmp_path, inputs, learning_rate=1e-3), alone)


@pytest.mark.parametrize(("rate", "checkpoint_every", "kept"), [(1e30, 3, "none"), (100.0, 1, "step_00000[1-9]")])
def test_a_diverged_run_names_step_and_checkpoint_and_has_no_adapter(
    alone, inputs, tmp_path, rate, checkpoint_every, kept
):
    task = trainings.write_task(tmp_path, inputs, learning_rate=rate, checkpoint_every=checkpoint_every, clip_norm=1e6)
    with pytest.raises(
        Diverged, match=rf"the (loss|gradient norm) of step \d+ is .*; .* checkpoint is {kept}"
    ) as diverged:
        trainings.train(task, alone)
    assert diverged.value.exit_code == 66
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.slow
def test_out_of_memory_is_typed_with_what_was_needed_and_there(inputs, tmp_path):
    """A real failed allocation: the address space of the process is limited below what its batch takes."""
    task = trainings.write_task(tmp_path, inputs, batch_size=512, micro_batch_tokens=2**16)
    limited = """
import resource, sys
from substrate import train
from substrate.interface.errors import exit_code_of
from substrate.training.run import Training
run = Training.run
def limit(self):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
    run(self)
Training.run = limit
sys.exit(exit_code_of(train.main))
"""
    done = trainings.spawn(["-c", limited], task)
    assert done.returncode == 67, done.stderr
    assert "error: rank 0: the base alone is 0.00 GB a rank" in done.stderr
    assert "are free now" in done.stderr


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", ["shipped", "other"])
def test_rates_are_nemos(shape, length):
    """The rates of a run against NeMo's class driven at the run's own peak."""
    import torch

    recipe = trainings.config("recipe", "sft_lora")
    steps, warmup, ratio = (recipe[name] for name in ("num_steps", "warmup_steps", "min_lr_ratio"))
    if length == "other":
        steps, warmup = 30, 5
    rates = learning_rates(shape, peak=0.02, num_steps=steps, warmup_steps=warmup, min_lr_ratio=ratio)
    from nemo.core.optim import lr_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.02)
    scheduler = getattr(lr_scheduler, shape)(optimizer, warmup_steps=warmup, max_steps=steps, min_lr=0.02 * ratio)
    assert len(rates) == steps
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-14, abs=0)
        optimizer.step()
        scheduler.step()


@pytest.mark.slow
def test_a_start_imports_nemo_without_what_its_dependencies_find_beside_it():
    """Both packages are installed here. They can be imported afterwards, and NeMo's class gives the same rates with them there before."""
    alone = (
        "import sys\nimport substrate.model\nfrom substrate.training.schedule import UNNEEDED, nemo_rates\n"
        "print(nemo_rates('CosineAnnealing', 30, 5, 0.1))\nassert not set(UNNEEDED) & set(sys.modules), sys.modules.keys()\n"
        "import importlib.metadata, scipy, transformers\nassert importlib.metadata.version('transformers')"
    )
    beside = alone.replace("import sys\n", "import scipy, sys, transformers\n").replace("not set", "set")
    printed = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        for code in (alone, beside)
    ]
    assert [done.returncode for done in printed] == [0, 0], [done.stderr for done in printed]
    assert printed[0].stdout == printed[1].stdout and len(json.loads(printed[0].stdout)) == 30


def test_cosine_rates_follow_the_published_formula():
    peak, steps, warmup, lowest = 0.004, 300, 20, 0.0004
    rates = learning_rates("CosineAnnealing", peak=peak, num_steps=steps, warmup_steps=warmup, min_lr_ratio=0.1)
    for step, rate in enumerate(rates):
        if step <= warmup:
            expected = peak * (step + 1) / (warmup + 1)
        else:
            expected = lowest + (peak - lowest) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert rate == pytest.approx(expected, rel=1e-12, abs=0) or step == warmup
    assert rates[warmup] == pytest.approx(peak)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dpo"}, "recipe.method is 'dpo'; valid are grpo, rft, sft_full, sft_lora"),
        ({"rank": 8}, "unknown key recipe.rank; valid keys are num_steps, batch_size"),
        ({"schedule": "Cosine"}, "recipe.schedule is 'Cosine'; valid is one of CosineAnnealing"),
        ({"num_steps": 1.5}, "recipe.num_steps is 1.5; it must be of type int"),
        ({"lora": {"rank": 0}}, "missing key recipe.lora.alpha, recipe.lora.dropout, recipe.lora.targets"),
        ({"mix": {"roman": 0.0}}, "recipe.mix is {'roman': 0.0}; valid is shares"),
    ],
)
def test_wrong_recipes_say_what_is_valid(change, message):
    from substrate.recipes import load_recipe

    with pytest.raises(UsageError) as wrong:
        load_recipe(trainings.config("recipe", "sft_lora") | change)
    assert str(wrong.value).startswith(message)


def test_recipe_fields_are_the_keys_of_its_yaml():
    import dataclasses

    from substrate.recipes.base_recipe import Lora
    from substrate.recipes.sft_lora import SftLora

    values = trainings.config("recipe", "sft_lora")
    assert {field.name for field in dataclasses.fields(SftLora)} == set(values)
    assert {field.name for field in dataclasses.fields(Lora)} == set(values["lora"])


def test_shipped_base_is_the_reviewed_one():
    import hashlib

    base = ROOT / "substrate" / "base" / "model.safetensors"
    assert base.stat().st_size <= 4 * 2**20
    assert hashlib.sha256(base.read_bytes()).hexdigest() in (ROOT / "substrate" / "README.md").read_text()


def test_golden_task_is_valid_and_holds_the_shipped_configuration():
    from substrate.recipes import load_recipe

    task = Task.read(GOLDEN)
    assert task.model == trainings.config("model", "tiny")
    assert task.recipe == trainings.config("recipe", "sft_lora")
    assert task.parallelism == trainings.config("parallelism", "tp2") | {"recompute": "none", "judge_tp": 1}, (
        "as a plan resolves auto"
    )
    load_recipe(task.recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "generate"}, "valid is (1, 'train')"),
        ({"config": {"seed": 1}}, "valid keys are ['model', 'parallelism', 'recipe', 'seed']"),
        ({"parallelism": {"tp": "two"}}, "config.parallelism.tp"),
        ({"recipe": {"method": "dpo"}}, "recipe.method is 'dpo'; valid are grpo, rft, sft_full, sft_lora"),
    ],
)
def test_wrong_task_file_exits_64_with_one_line(change, message, tmp_path):
    content = json.loads(GOLDEN.read_text())
    if not set(change) & set(content):  # a part of config
        change = {"config": content["config"] | change}
    (tmp_path / "task.json").write_text(json.dumps(content | change))
    ended = trainings.spawn(["-m", "substrate.train"], tmp_path / "task.json")
    assert (ended.returncode, ended.stdout) == (64, "")
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and message in ended.stderr


def test_package_from_elsewhere_is_refused(tmp_path):
    ended = trainings.spawn(["-m", "substrate.train"], GOLDEN, SUBSTRATE_ROOT=str(tmp_path))
    assert ended.returncode == 64 and "substrate was imported from" in ended.stderr
