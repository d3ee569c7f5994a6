"""Test the vLLM entry with a small engine of the same interface, its identity, and the report of agreement."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.stats
import transformers
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign.errors import ConfigError, IntegrityError
from pipeline.config import settings
from pipeline.execution import judge
from substrate.data.tokenizer import Tokenizer
from substrate.generate import Task, work_of
from substrate.inference import agreement
from substrate.interface.errors import DataError
from tests.support import adapters
from tests.support.paths import ROOT

VLLM = ["tasks.engine=vllm", "tasks.engine_version=0.9.9", "cluster.vllm_runtime=/opt/vllm"]
STANDINS = ROOT / "tests" / "standins"  # vllm/, with vLLM's call signatures
DENSE = {name: shape for name, shape in adapters.MODULES.items() if ".experts." not in name and name != "lm_head"}
ASKED = "\nPlease put your final answer inside `\\boxed{}`. For example: `\\boxed{your answer}`"  # the competition's words after a puzzle
END_IDS = (2, 2, 11, 11)  # what the stand-in writes third, by the number of tokens of a prompt modulo 4


@pytest.fixture
def run(tmp_path):
    """Runs the entry on two sets of prompts, with an adapter or a broken one."""
    (tmp_path / "base").mkdir()
    for name in ("tokenizer.json", "tokens.json", "chat_template.jinja"):
        shutil.copyfile(ROOT / "substrate" / "base" / name, tmp_path / "base" / name)
    adapters.write(
        tmp_path / "adapter", modules=DENSE, target_modules=sorted(name.partition("mixer.")[2] for name in DENSE)
    )
    for name, numbers in (("dev", range(1, 8)), ("fresh", range(8, 11))):
        prompts = [{"item_id": f"roman-{n:02d}", "family": "roman", "prompt": "a" * n} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    task = {
        "schema": 1,
        "kind": "generate",
        "config": {
            "model": {"max_sequence_length": 512, "dtype": "bfloat16"},
            "parallelism": {"judge_tp": 2},
            "decoding": {"max_new_tokens": 5, "batch_size": 4},
        },
        "paths": {
            "base": "/base",
            "tokenizer": str(tmp_path / "base" / "tokenizer.json"),
            "adapter": str(tmp_path / "adapter"),
            "sets": {name: str(tmp_path / f"{name}.jsonl") for name in ("dev", "fresh")},
            "out": str(tmp_path / "out"),
        },
    }

    def start(judge_replicas=1, fault="", **decoding) -> subprocess.CompletedProcess[str]:
        task["config"]["decoding"] |= decoding
        task["config"]["parallelism"]["judge_replicas"] = judge_replicas
        (tmp_path / "task.json").write_text(json.dumps(task))
        command = [sys.executable, "-P", "-m", "substrate.generate_vllm", str(tmp_path / "task.json")]
        environment = {"PYTHONPATH": f"{STANDINS}:{ROOT}", "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
        environment["STANDIN_FAULT"] = fault
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return start


def calls(done: subprocess.CompletedProcess[str], name: str = "") -> list[dict]:
    """What vLLM was asked for, in order; one kind of call where it is named."""
    told = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"call"')]
    return [each for each in told if name in ("", each["call"])]


def rows(folder: Path, name: str = "dev") -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / f"{name}.jsonl").read_text().splitlines()]


def test_the_entry_writes_what_the_native_one_writes(run, tmp_path):
    """By what the stand-in answers to a prompt of so many tokens: 50 51 and an end, or five tokens that are cut."""
    done = run()
    assert done.returncode == 0, done.stderr
    (how,) = calls(done, "LLM")
    assert {name: how[name] for name in ("model", "tensor_parallel_size", "max_model_len", "max_lora_rank", "max_num_seqs", "dtype")} == {
        "model": "/base", "tensor_parallel_size": 2, "max_model_len": 512, "max_lora_rank": 32, "max_num_seqs": 4, "dtype": "bfloat16",
    }  # fmt: skip
    end_ids = Tokenizer.from_file(tmp_path / "base" / "tokenizer.json").end_ids
    sizes = {"".join(map(str, each["ids"])): len(each["ids"]) for each in calls(done, "add_request")}
    assert len(sizes) == 10
    for name, numbers in (("dev", range(1, 8)), ("fresh", range(8, 11))):
        found = rows(tmp_path, name)
        assert [row["item_id"] for row in found] == [f"roman-{n:02d}" for n in numbers]
        for row in found:
            assert row["num_tokens"] == (5 if row["truncated"] else 3)
    ended = [END_IDS[size % 4] in end_ids for size in sizes.values() if size % 2]
    assert sum(not row["truncated"] for name in ("dev", "fresh") for row in rows(tmp_path, name)) == sum(ended) > 0
    assert json.loads((tmp_path / "out" / "engine.json").read_text()) == {"engine": "vllm", "version": "0.12.0"}
    assert not list((tmp_path / "out").glob("journal.*"))


@pytest.mark.parametrize("end_ids", [[2], [2, 11]])
def test_each_end_id_of_the_checkpoint_ends_a_sequence(run, tmp_path, end_ids):
    path = tmp_path / "base" / "tokens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"end_ids": end_ids}))
    done = run()
    assert done.returncode == 0, done.stderr
    assert {tuple(each["stop_token_ids"]) for each in calls(done, "add_request")} == {tuple(end_ids)}
    odd = [len(each["ids"]) for each in calls(done, "add_request") if len(each["ids"]) % 2]
    expected = sum(END_IDS[size % 4] in end_ids for size in odd)
    assert sum(not row["truncated"] for name in ("dev", "fresh") for row in rows(tmp_path, name)) == expected


def test_prompts_have_the_chat_form_that_transformers_gives(run, tmp_path):
    """The ids that vLLM gets are those of the template with thinking on, made by another library."""
    done = run()
    base, told = tmp_path / "base", json.loads((tmp_path / "base" / "tokens.json").read_text())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))
    template = (base / "chat_template.jinja").read_text()
    expected = []
    for number in range(1, 11):
        chat = [{"role": "user", "content": "a" * number + ASKED}]
        how = {"chat_template": template, "add_generation_prompt": True, "enable_thinking": True, "tokenize": False}
        text = theirs.apply_chat_template(chat, **(told["template"]["variables"] | how))
        expected.append(theirs(text, add_special_tokens=False)["input_ids"])
    assert sorted(each["ids"] for each in calls(done, "add_request")) == sorted(expected)


def test_all_sets_are_one_queue_of_greedy_requests_with_the_adapter(run, tmp_path):
    done = run()
    names = [each["call"] for each in calls(done)]
    assert names[:2] == ["LLM", "add_lora"] and names.count("LLM") == names.count("add_lora") == 1
    assert names.index("step") == 2 + 10, "every item of both sets is in the queue before the first step"
    for each in calls(done, "add_request"):
        assert (each["temperature"], each["top_p"], each["n"], each["lora"], each["detokenize"]) == (
            0.0,
            1.0,
            1,
            "adapter",
            False,
        )
        assert (each["max_tokens"], each["stop"], each["ignore_eos"], each["repetition_penalty"]) == (
            5,
            None,
            False,
            1.0,
        )
    running = [each["running"] for each in calls(done, "step")]
    assert max(running) == 4 and all(now == 4 for now in running[:6]), (
        "a slot takes the next item as soon as its own has ended"
    )


def test_an_adapter_is_taken_as_it_is_exported(run, tmp_path):
    done = run()
    assert calls(done, "add_lora") == [{"call": "add_lora", "name": "adapter", "number": 1, "modules": len(DENSE)}]


def test_a_stop_text_ends_a_sequence_of_vllm_before_it(run, tmp_path):
    stop = Tokenizer.from_file(tmp_path / "base" / "tokenizer.json").decode([60, 60])
    done = run(stop=[stop])
    assert done.returncode == 0, done.stderr
    assert calls(done, "abort_request"), "what the text ended is taken out of vLLM"
    for row in rows(tmp_path) + rows(tmp_path, "fresh"):
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
    assert sorted(each["gpus"] for each in calls(done, "LLM")) == ["0,1", "2,3"]
    asked = [tuple(each["ids"]) for each in calls(done, "add_request")]
    assert len(asked) == len(set(asked)) == 10, "no item is decoded twice"


@pytest.mark.parametrize(("version", "asked"), [("0.12.0", 9), ("0.11.0", 10)])
def test_a_start_that_finds_a_journal_of_this_version_asks_for_the_other_items(run, tmp_path, version, asked):
    assert run().returncode == 0
    (row,) = [row for row in rows(tmp_path) if row["item_id"] == "roman-03"]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    journal = [
        {"work": work_of(Task.read(tmp_path / "task.json"), ("vllm", version))},
        {"set": "dev"} | row | {"completion": "kept"},
    ]
    (tmp_path / "out" / "journal.0.00.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal))
    done = run()
    assert done.returncode == 0, done.stderr
    assert len(calls(done, "add_request")) == asked
    (row,) = [row for row in rows(tmp_path) if row["item_id"] == "roman-03"]
    assert (row["completion"] == "kept") == (asked == 9)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("drop", "the engine ended without 1 items, such as "),
        ("abort", "for the reason 'abort'; valid is stop or length"),
        ("twice", " twice"),
    ],
)
def test_an_item_that_vllm_does_not_end_is_no_truncated_one(run, tmp_path, fault, words):
    """It ends with an error, and neither waits without end nor counts what the model did not write."""
    done = run(fault=fault)
    assert done.returncode == 1 and words in done.stderr
    assert not list((tmp_path / "out").glob("dev.jsonl"))


def test_items_are_sampled_with_seeds_of_their_own(run, tmp_path):
    seeds = []
    for seed in (1, 1, 2):
        seeds.append([each["seed"] for each in calls(run(temperature=1.0, seed=seed), "add_request")])
        shutil.rmtree(tmp_path / "out")
    assert seeds[0] == seeds[1] and len({*seeds[0], *seeds[2]}) == 20


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: adapters.configure(folder, r=64), "LoRA rank 64 is greater than max_lora_rank 32"),
        (lambda folder: adapters.configure(folder, target_modules=["in_proj"]), "expected target modules in"),
        (lambda folder: adapters.change(folder, lambda all_: all_.update({"other.weight": all_.popitem()[1]})), "other.weight is unsupported"),
    ],
)  # fmt: skip
def test_an_adapter_that_vllm_refuses_is_a_fault_of_data(run, tmp_path, spoil, words):
    spoil(tmp_path / "adapter")
    done = run()
    assert done.returncode == 65
    assert "vLLM 0.12.0 refuses the adapter: " in done.stderr and words in done.stderr


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


def completions(path: Path, texts: list[str], truncated: int = 0) -> Path:
    rows = ({"item_id": f"i{n}", "completion": text, "truncated": n < truncated} for n, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_agreement_by_hand(tmp_path):
    first = completions(tmp_path / "a", [r"one \boxed{1}", r"two \boxed{2}", r"three \boxed{3}"])
    second = completions(tmp_path / "b", [r"one \boxed{1}", r"twice \boxed{2}", r"three \boxed{4}"], truncated=1)
    families = ("roman", "roman", "equation")
    answers = ({"item_id": f"i{n}", "family": family, "answer": str(n + 1)} for n, family in enumerate(families))
    (tmp_path / "answers").write_text("".join(json.dumps(row) + "\n" for row in answers))
    assert agreement.compare(first, second, tmp_path / "answers") == [
        "items 3, same text 1 (33.3 %), same answer 2 (66.7 %), first difference after 8 characters (median)",
        "truncated: A 0, B 1",
        "right: A 3, B 1, A alone 2, B alone 0, p 0.5; roman: A 2, B 1, A alone 1, B alone 0, p 1; equation: A 1, B 0, A alone 1, B alone 0, p 1",
    ]
    (tmp_path / "more").write_text(json.dumps({"item_id": "i9", "family": "roman", "answer": "9"}) + "\n")
    with pytest.raises(DataError, match="has i9, of which"):
        agreement.compare(first, second, tmp_path / "more")
    completions(tmp_path / "b", ["one"])
    with pytest.raises(DataError, match="i1 is in one of"):
        agreement.compare(first, second, None)


@given(st.integers(0, 200), st.integers(0, 200))
def test_the_sign_test_is_scipy_s(first, second):
    expected = scipy.stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert agreement.sign_test(first, second) == pytest.approx(expected)
