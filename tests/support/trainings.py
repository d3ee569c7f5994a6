"""Trainings for tests: a random base of a few thousand parameters, a hundred puzzles, and task files of ten steps."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from substrate.data.rows import Row
from substrate.interface.task import Task
from tests.support.paths import ROOT

TINY = {"pattern": "ME*", "hidden_size": 32, "attention_head_dim": 8, "mamba_head_dim": 8, "moe_ffn_size": 16}
SHORT = {"num_steps": 10, "batch_size": 4, "micro_batch_tokens": 200, "warmup_steps": 2, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def alone():
    """The process groups of a world of one."""
    import torch

    from substrate.distributed.groups import start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks of a demo have: sums in the same order
    parallel = start({axis: 1 for axis in ("tp", "pp", "ep", "cp", "dp")})
    yield parallel
    parallel.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs(alone, tmp_path_factory):
    """A folder with a random base model of TINY's shape and a hundred solved puzzles."""
    from substrate.model import ModelConfig, build_model, init_weights, save_base
    from substrate.payload import write_payload

    folder = tmp_path_factory.mktemp("inputs")
    write_payload(
        folder, seed=1, level="small", num_per_family=100, families=("roman", "text_cipher", "unit_conversion")
    )
    model = build_model(ModelConfig.from_dict(config("model", "tiny") | TINY), alone)
    init_weights(model, seed=3)
    save_base(model, folder / "model.safetensors")
    return folder


def config(group: str, name: str) -> dict:
    return yaml.safe_load((ROOT / "hydra_conf" / group / f"{name}.yaml").read_text())


def random_rows(lengths: list[int]) -> list[Row]:
    """Rows that take these numbers of tokens in a line; about half of each is learned."""
    chosen = random.Random(5)
    ids = [[chosen.randint(3, 63) for _ in range(length + 1)] for length in lengths]
    families = itertools.cycle(("roman", "text_cipher", "unit_conversion"))
    halves = (len(each) // 2 or 1 for each in ids)
    return [
        Row(str(n), family, each[:half], each[half:], "")
        for n, (each, family, half) in enumerate(zip(ids, families, halves, strict=False))
    ]


def write_task(folder: Path, inputs: Path, *, tp: int = 1, **recipe) -> Path:
    """A task file in `folder`, of the shipped recipe made SHORT; dropout, so that random numbers must resume too."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = config("recipe", "sft_lora")
    content = {
        "schema": 1,
        "kind": "train",
        "config": {
            "model": config("model", "tiny") | TINY,
            "recipe": shipped | SHORT | {"lora": shipped["lora"] | {"dropout": 0.1}} | recipe,
            "parallelism": config("parallelism", "tp2") | {"tp": tp, "recompute": "none"},
            "seed": 11,
        },
        "paths": {
            "base": str(inputs / "model.safetensors"),
            "tokenizer": str(ROOT / "substrate/base/tokenizer.json"),
            "train_data": str(inputs / "data/train.jsonl"),
            "out": str(folder / "out"),
            "stop": str(folder / "stop"),
        },
    }
    path = folder / "task.json"
    path.write_text(json.dumps(content))
    return path


def train(task: Path, parallel) -> Path:
    """One start of a training in this process; returns its out folder."""
    from substrate.recipes import load_recipe
    from substrate.training.run import Training

    checked = Task.read(task)
    checked.out.mkdir(exist_ok=True)
    Training(checked, load_recipe(checked.recipe), parallel).run()
    return checked.out


def adapter(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def progress(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]


def stop_after(monkeypatch, step: int, stop: Path) -> None:
    """Makes the stop file appear when the line of `step` has been written."""
    from substrate.interface.progress import Progress

    write = Progress.write

    def writing(self, phase, **values):
        write(self, phase, **values)
        if values.get("step") == step:
            stop.touch()

    monkeypatch.setattr(Progress, "write", writing)


class Killed(BaseException):
    """What `kill_after` raises; nothing in the trainer catches it."""


def kill_after(monkeypatch, step: int) -> None:
    """Ends the training when the line of `step` has been written, before anything of that step is saved."""
    from substrate.interface.progress import Progress

    write = Progress.write

    def writing(self, phase, **values):
        write(self, phase, **values)
        if phase == "train" and values["step"] == step:
            raise Killed

    monkeypatch.setattr(Progress, "write", writing)


def spawn(code: list[str], task: Path, **env: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
        **env,
    }
    command = [sys.executable, "-P", *code, str(task)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
