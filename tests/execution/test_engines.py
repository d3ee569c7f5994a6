"""Test the vLLM entry with a small engine of the same interface, its identity, and the report of agreement."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.campaign.errors import ConfigError, IntegrityError
from pipeline.config import settings
from pipeline.execution import judge
from substrate.data.tokenizer import Tokenizer
from substrate.inference import agreement
from substrate.interface.errors import DataError
from tests.support.paths import ROOT

VLLM = ["tasks.engine=vllm", "tasks.engine_version=0.9.9", "cluster.vllm_runtime=/opt/vllm"]
# What of vLLM's interface the entry uses. Every other sequence writes ENDS[number] third, of the ids that it was told to
# stop at, as vLLM returns it; an engine that ignores one of them writes on to the limit.
ENGINE = """
import json, os, sys, types
__version__ = "0.9.9"
class SamplingParams:
    def __init__(self, **how): self.__dict__.update(how)
class LLM:
    def __init__(self, **how):
        print("LLM", json.dumps(how), file=sys.stderr)
        print("GPUs", os.environ.get("CUDA_VISIBLE_DEVICES"), file=sys.stderr)
        self.llm_engine = Engine(how["max_num_seqs"])
class Engine:
    def __init__(self, slots):
        self.slots, self.waiting, self.running = slots, [], []
    def add_lora(self, request):
        if not (__import__("pathlib").Path(request.path) / "adapter_config.json").exists():
            raise ValueError("adapter_config.json is not there")
        return True
    def add_request(self, request_id, prompt, params, arrival_time=None, lora_request=None):
        assert (params.temperature, params.detokenize) == (0.0, False) and not hasattr(params, "ignore_eos")
        number = len(prompt["prompt_token_ids"])
        ids = ([50, 51, (2, 2, 11, 11)[number % 4]] if number % 2 else [40]) + [60] * params.max_tokens
        self.waiting.append((request_id, iter(ids), params, []))
    def abort_request(self, request_ids):
        self.running = [each for each in self.running if each[0] not in request_ids]
    def has_unfinished_requests(self):
        return bool(self.waiting or self.running)
    def step(self):
        while self.waiting and len(self.running) < self.slots:
            self.running.append(self.waiting.pop(0))
        outputs = []
        for each in list(self.running):
            request_id, ids, params, written = each
            written.append(next(ids))
            row = types.SimpleNamespace(token_ids=list(written), finish_reason=None)
            if written[-1] in params.stop_token_ids:
                row.finish_reason = "stop"
            elif len(written) == params.max_tokens:
                row.finish_reason = "length"
            if row.finish_reason:
                self.running.remove(each)
            outputs.append(types.SimpleNamespace(request_id=request_id, finished=bool(row.finish_reason), outputs=[row]))
        return outputs
"""
LORA = """
class LoRARequest:
    def __init__(self, name, number, path): self.path = path
"""


@pytest.fixture
def run(tmp_path):
    """Runs the entry on two sets of prompts, with an adapter or a broken one."""
    package = tmp_path / "site" / "vllm"
    (package / "lora").mkdir(parents=True)
    (package / "__init__.py").write_text(ENGINE)
    (package / "lora" / "__init__.py").touch()
    (package / "lora" / "request.py").write_text(LORA)
    (tmp_path / "base").mkdir()
    for name in ("tokenizer.json", "tokens.json", "chat_template.jinja"):
        shutil.copyfile(ROOT / "substrate" / "base" / name, tmp_path / "base" / name)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    prompts = [{"item_id": f"roman-{n}", "family": "roman", "prompt": "a" * n} for n in range(1, 8)]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    task = {
        "schema": 1,
        "kind": "generate",
        "config": {
            "model": {"max_sequence_length": 512, "dtype": "bfloat16"},
            "parallelism": {"judge_tp": 2},
            "decoding": {"max_new_tokens": 5, "batch_size": 1},
        },
        "paths": {
            "base": "/base",
            "tokenizer": str(tmp_path / "base" / "tokenizer.json"),
            "adapter": str(tmp_path / "adapter"),
            "sets": {"dev": str(tmp_path / "dev.jsonl")},
            "out": str(tmp_path / "out"),
        },
    }

    def start(judge_replicas=1, **decoding) -> subprocess.CompletedProcess[str]:
        task["config"]["decoding"] |= decoding
        task["config"]["parallelism"]["judge_replicas"] = judge_replicas
        (tmp_path / "task.json").write_text(json.dumps(task))
        command = [sys.executable, "-P", "-m", "substrate.generate_vllm", str(tmp_path / "task.json")]
        environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "PATH": "/usr/bin:/bin"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return start


@pytest.mark.parametrize(("end_ids", "ends", "cut"), [([2], 5, True), ([2, 11], 3, False)])
def test_the_entry_writes_what_the_native_one_writes(run, tmp_path, end_ids, ends, cut):
    path = tmp_path / "base" / "tokens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"end_ids": end_ids}))
    done = run()
    assert done.returncode == 0, done.stderr
    how = json.loads(done.stderr.splitlines()[0].removeprefix("LLM "))
    assert (how["tensor_parallel_size"], how["max_model_len"], how["max_lora_rank"]) == (2, 512, 32)
    rows = [json.loads(line) for line in (tmp_path / "out" / "dev.jsonl").read_text().splitlines()]
    assert [row["item_id"] for row in rows] == [f"roman-{n}" for n in range(1, 8)]
    assert [(row["num_tokens"], row["truncated"]) for row in rows] == [(5, True), (3, False), (5, True), (ends, cut)] + [
        (5, True), (3, False), (5, True)
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "engine.json").read_text()) == {"engine": "vllm", "version": "0.9.9"}
    assert not list((tmp_path / "out").glob("journal.*"))


def test_a_stop_text_ends_a_sequence_of_vllm_before_it(run, tmp_path):
    stop = Tokenizer.from_file(tmp_path / "base" / "tokenizer.json").decode([60, 60])
    assert run(stop=[stop]).returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "dev.jsonl").read_text().splitlines()]
    for row in rows:
        assert not row["truncated"] and stop not in row["completion"]
        assert row["num_tokens"] in (3, 5)  # 40 60 60; 50 51 and its end; 50 51 11 60 60, where 11 ends nothing


def test_replicas_share_the_items_and_the_gpus(run, tmp_path):
    alone = run()
    assert alone.returncode == 0, alone.stderr
    expected = (tmp_path / "out" / "dev.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "out")
    done = run(judge_replicas=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "dev.jsonl").read_bytes() == expected
    assert sorted(line for line in done.stderr.splitlines() if line.startswith("GPUs")) == ["GPUs 0,1", "GPUs 2,3"]


def test_an_adapter_that_does_not_load_is_a_fault_of_data(run, tmp_path):
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    done = run()
    assert done.returncode == 65
    assert "vLLM 0.9.9 refuses the adapter: adapter_config.json is not there" in done.stderr


def test_what_only_the_native_engine_does_is_refused(run):
    done = run(log_probs=True)
    assert done.returncode == 64
    assert "tasks.engine=native has them" in done.stderr


@pytest.mark.parametrize(
    ("left_out", "words"), [(1, "tasks.engine_version = empty"), (2, "cluster.vllm_runtime = empty")]
)
def test_an_engine_without_its_version_or_runtime_is_refused(left_out, words):
    with pytest.raises(ConfigError, match=words):
        settings.compose([each for number, each in enumerate(VLLM) if number != left_out])


def test_another_version_than_the_campaigns_is_no_score(tmp_path):
    chosen = settings.compose(VLLM)
    (tmp_path / "engine.json").write_text('{"engine": "vllm", "version": "0.9.9"}')
    assert judge.engine_of(tmp_path, chosen) == "vllm 0.9.9"
    (tmp_path / "engine.json").write_text('{"engine": "vllm", "version": "0.10.0"}')
    with pytest.raises(
        IntegrityError, match=r"vllm 0\.10\.0 decoded, but the campaign's scores come from vllm 0\.9\.9"
    ):
        judge.engine_of(tmp_path, chosen)


def completions(path: Path, texts: list[str]) -> Path:
    rows = ({"item_id": f"i{n}", "completion": text} for n, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_agreement_by_hand(tmp_path):
    first = completions(tmp_path / "a", [r"one \boxed{1}", r"two \boxed{2}", r"three \boxed{3}"])
    second = completions(tmp_path / "b", [r"one \boxed{1}", r"twice \boxed{2}", r"three \boxed{4}"])
    (tmp_path / "answers").write_text(
        "".join(json.dumps({"item_id": f"i{n}", "answer": str(n + 1)}) + "\n" for n in range(3))
    )
    assert agreement.compare(first, second, tmp_path / "answers") == [
        "items 3, same text 1 (33.3 %), same answer 2 (66.7 %), first difference after 8 characters (median)",
        "right: A 3, B 2, one of the two 1",
    ]
    completions(tmp_path / "b", ["one"])
    with pytest.raises(DataError, match="i1 is in one of"):
        agreement.compare(first, second, None)
