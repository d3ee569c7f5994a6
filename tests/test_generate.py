"""Decoding: cached equals uncached, a batch equals its items, and the entry writes what docs/contract.md says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from substrate.errors import DataError, UsageError
from substrate.generate import Task, complete, decode_batch, generate
from substrate.model import ModelConfig, add_lora, build_model, init_weights, save_adapter, save_base
from substrate.model.lora import adapters
from substrate.parallel import start
from substrate.tokenizer import EOS_ID, Tokenizer

# megatron-core 0.16.1 calling itself in ways that it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]

ROOT = Path(__file__).parent.parent
ALONE = {"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1}
TIE = 1e-4  # between two logits that are closer, rounding decides
VALUES = yaml.safe_load((ROOT / "hydra_conf" / "model" / "tiny.yaml").read_text()) | {
    "hidden_size": 48,
    "mamba_chunk_size": 16,
    "max_sequence_length": 160,
}


@pytest.fixture(scope="module")
def parallel():
    torch.set_num_threads(1)
    parallel = start(ALONE)
    yield parallel
    parallel.shutdown()


@pytest.fixture(scope="module")
def model(parallel):
    model = build_model(ModelConfig.from_dict(VALUES), parallel, sequence_parallel=False)
    init_weights(model, seed=1)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(ROOT / "substrate" / "base" / "tokenizer.json")


def _prompts() -> list[list[int]]:
    """Mixed lengths: shorter than the convolution, around a chunk, longer than two."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in (1, 2, 3, 15, 16, 17, 40, 70)]


def _assert_greedy(model, prompt: list[int], written: list[int]) -> None:
    """Every written token is the argmax of one uncached pass over prompt and completion, ties aside."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + written]), None, None)[0, len(prompt) - 1 : -1]
    behind = logits.max(-1).values - logits[torch.arange(len(written)), torch.tensor(written)]
    assert behind.max() < TIE


def test_cached_decoding_is_the_uncached_argmax(model):
    for prompt, written in zip(_prompts(), decode_batch(model, _prompts(), 24), strict=True):
        assert len(written) == 24 or written[-1] == EOS_ID
        _assert_greedy(model, prompt, written)


def test_an_item_does_not_depend_on_its_batch(model):
    together = decode_batch(model, _prompts(), 24)
    for prompt, written in zip(_prompts(), together, strict=True):
        (alone,) = decode_batch(model, [prompt], 24)
        if alone != written:  # then both are greedy, and parted at a tie
            _assert_greedy(model, prompt, written)
            _assert_greedy(model, prompt, alone)


def test_decoding_stops_at_the_end_of_sequence_and_at_the_limit(parallel):
    model = build_model(ModelConfig.from_dict(VALUES), parallel, sequence_parallel=False).eval()
    init_weights(model, seed=1)
    ((first, *_),) = decode_batch(model, [[5, 6, 7]], 1)
    with torch.no_grad():  # the token that comes first is now the end of sequence
        weight = model.output_layer.weight
        weight[[first, EOS_ID]] = weight[[EOS_ID, first]]
    assert decode_batch(model, [[5, 6, 7]], 24) == [[EOS_ID]]
    (longest,) = decode_batch(model, [[9] * 150], 24)
    assert len(longest) <= VALUES["max_sequence_length"] - 150


def test_a_prompt_that_does_not_fit_is_named(model, tokenizer):
    items = [{"item_id": "roman-000003", "family": "roman", "prompt": "7 " * 200}]
    with pytest.raises(DataError, match="roman-000003 has 4.. tokens; the model's longest sequence is 160"):
        list(complete(model, tokenizer, items, 4, 2))


@pytest.fixture
def task(model, parallel, tmp_path) -> Path:
    """A task file with a base, a random adapter and two sets."""
    adapted = build_model(ModelConfig.from_dict(VALUES), parallel)
    init_weights(adapted, seed=1)
    save_base(adapted, tmp_path / "base" / "model.safetensors")
    add_lora(adapted, rank=4, alpha=8, dropout=0.0, targets=["q_proj", "in_proj", "o_proj"], seed=0)
    for adapter in adapters(adapted):
        torch.nn.init.normal_(adapter.B_OR, std=0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(adapted, tmp_path / "adapter")
    prompts = [f"Write {'1' * n} as a numeral." for n in (5, 1, 30, 2, 12)]
    for name, chosen in (("dev", prompts), ("fresh", prompts[:2])):
        rows = [{"item_id": f"roman-{n:06d}", "family": "roman", "prompt": prompt} for n, prompt in enumerate(chosen)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    body = {
        "schema": 1,
        "kind": "generate",
        "config": {
            "model": VALUES,
            "parallelism": ALONE | {"judge_tp": 1},
            "decoding": {"max_new_tokens": 12, "batch_size": 2},
        },
        "paths": {
            "base": str(tmp_path / "base" / "model.safetensors"),
            "tokenizer": str(ROOT / "substrate" / "base" / "tokenizer.json"),
            "adapter": str(tmp_path / "adapter"),
            "sets": {name: str(tmp_path / f"{name}.jsonl") for name in ("dev", "fresh")},
            "out": str(tmp_path / "out"),
        },
    }
    path = tmp_path / "task.json"
    path.write_text(json.dumps(body))
    return path


def _run(task: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "substrate.generate", str(task)],
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_entry_writes_the_contract_alike_at_one_and_two_ranks(task):
    outputs = []
    for judge_tp in (1, 2):
        body = json.loads(task.read_text())
        body["config"]["parallelism"]["judge_tp"] = judge_tp
        task.write_text(json.dumps(body))
        ran = _run(task)
        assert (ran.returncode, ran.stderr) == (0, "")
        out = Path(body["paths"]["out"])
        outputs.append([json.loads(line) for line in (out / "dev.jsonl").read_text().splitlines()])
        progress = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
        assert [(line["set"], line["done"], line["total"]) for line in progress] == [
            ("dev", 2, 5), ("dev", 4, 5), ("dev", 5, 5), ("fresh", 2, 2)
        ]  # fmt: skip
        assert set(progress[0]) == {"phase", "set", "done", "total", "tokens", "seconds"}
    assert outputs[0] == outputs[1]
    assert [row["item_id"] for row in outputs[0]] == [f"roman-{n:06d}" for n in range(5)]
    for row in outputs[0]:
        assert set(row) == {"item_id", "completion", "num_tokens", "truncated"}
        assert row["num_tokens"] == 12 if row["truncated"] else row["num_tokens"] <= 12


def test_without_its_adapter_nothing_is_decoded(task, parallel):
    body = json.loads(task.read_text())
    body["paths"]["adapter"] = str(task.parent / "nowhere")
    task.write_text(json.dumps(body))
    with pytest.raises(DataError, match="adapter_config.json"):
        generate(Task.read(task), parallel)
    assert not Path(body["paths"]["out"]).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body.update(kind="train"), r"valid is \(1, 'generate'\)"),
        (lambda body: body["config"]["decoding"].update(batch_size=0), "batch_size is 0; at least 1"),
        (lambda body: body["paths"].pop("sets"), "'sets'"),
    ],
)
def test_a_wrong_task_is_a_usage_error(task, change, words):
    body = json.loads(task.read_text())
    change(body)
    task.write_text(json.dumps(body))
    with pytest.raises(UsageError, match=words):
        Task.read(task)
