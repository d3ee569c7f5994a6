"""Test decoding: with and without cache, in a batch and alone, and the files that docs/contract.md describes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from substrate.data.tokenizer import Tokenizer
from substrate.distributed.groups import start
from substrate.generate import Task, generate, work_of
from substrate.inference.decode import Decoding, decode, sample
from substrate.inference.queue import Queue
from substrate.interface.errors import DataError, UsageError
from substrate.model import ModelConfig, add_lora, build_model, init_weights, save_adapter, save_base
from substrate.model.lora import adapters
from tests.support.paths import ROOT

# megatron-core 0.16.1 calling itself in ways that it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
ALONE = {"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1}
ENDS = (2, 5)  # two, as generation_config.json of the published checkpoint names two
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
    model = build_model(ModelConfig.from_dict(VALUES), parallel)
    init_weights(model, seed=1)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(ROOT / "substrate" / "base" / "tokenizer.json")


def _prompts() -> list[list[int]]:
    """Mixed lengths: shorter than the convolution, around a chunk, longer than two."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in (1, 2, 3, 15, 16, 17, 40, 70)]


def _decode(model, prompts: list[list[int]], max_new_tokens: int, batch_size: int = 64, **how) -> list[list[int]]:
    """What is written after each prompt, in their order."""
    named = [(str(number), prompt) for number, prompt in enumerate(prompts)]
    done = {one.item_id: one for one in decode(model, named, Decoding(max_new_tokens, batch_size, **how), ENDS)}
    assert len(done) == len(prompts)
    return [done[str(number)].ids for number in range(len(prompts))]


def _assert_greedy(model, prompt: list[int], written: list[int]) -> None:
    """Every written token is the argmax of one uncached pass over prompt and completion, ties aside."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + written]), None, None)[0, len(prompt) - 1 : -1]
    behind = logits.max(-1).values - logits[torch.arange(len(written)), torch.tensor(written)]
    assert behind.max() < TIE


def test_cached_decoding_is_the_uncached_argmax(model):
    for prompt, written in zip(_prompts(), _decode(model, _prompts(), 24), strict=True):
        assert len(written) == 24 or written[-1] in ENDS
        _assert_greedy(model, prompt, written)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_an_item_does_not_depend_on_its_batch(model, batch_size):
    """Slots that are freed and filled again, prompts of all lengths beside running sequences, and an emptying batch."""
    prompts = _prompts() * 2
    together, other = _decode(model, prompts, 24), _decode(model, prompts, 24, batch_size)
    for prompt, written, again in zip(prompts, together, other, strict=True):
        if again != written:  # then both are greedy, and parted at a tie
            _assert_greedy(model, prompt, written)
            _assert_greedy(model, prompt, again)


def test_sampling_depends_on_seed_and_item_alone(model):
    how = {"temperature": 1.5, "top_p": 0.9}
    first = _decode(model, _prompts(), 12, 8, seed=1, **how)
    assert first == _decode(model, _prompts(), 12, 3, seed=1, **how)
    assert first != _decode(model, _prompts(), 12, 8, seed=2, **how)
    assert _decode(model, _prompts(), 12, temperature=1e-6) == _decode(model, _prompts(), 12)


def test_sampled_frequencies_are_the_nucleus():
    """Against the definition: the smallest set of likeliest tokens that holds top_p, renormalised."""
    probabilities = torch.tensor([0.4, 0.1, 0.3, 0.15, 0.05])
    draws = (torch.arange(4000) + 0.5) / 4000
    for top_p, kept in ((0.5, [0, 2]), (0.75, [0, 2, 3]), (0.4, [0]), (1.0, [0, 1, 2, 3, 4])):
        tokens, log_probs = sample(probabilities.log().expand(4000, 5), top_p, draws)
        expected = torch.zeros(5)
        expected[kept] = probabilities[kept] / probabilities[kept].sum()
        torch.testing.assert_close(torch.bincount(tokens, minlength=5) / 4000, expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(log_probs.exp(), expected[tokens].double(), rtol=1e-6, atol=0)


def test_log_probabilities_are_those_of_an_uncached_pass(model):
    named = [(str(number), prompt) for number, prompt in enumerate(_prompts())]
    for one in decode(model, named, Decoding(8, 4, temperature=0.7, log_probs=True), ENDS):
        prompt = list(one.prompt)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + one.ids]), None, None)[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1)[torch.arange(len(one.ids)), torch.tensor(one.ids)]
        torch.testing.assert_close(torch.tensor(one.log_probs), expected, rtol=1e-4, atol=2e-4)


def test_a_stop_text_ends_a_completion_before_it(task, parallel):
    body = json.loads(task.read_text())
    generate(Task.read(task), parallel)
    out = Path(body["paths"]["out"])
    whole = json.loads((out / "dev.jsonl").read_text().splitlines()[0])["completion"]
    (out / "dev.jsonl").unlink()
    stop = whole[3:5]
    body["config"]["decoding"]["stop"] = [stop]
    task.write_text(json.dumps(body))
    generate(Task.read(task), parallel)
    row = json.loads((out / "dev.jsonl").read_text().splitlines()[0])
    assert row["completion"] == whole[: whole.index(stop)]
    assert not row["truncated"]


def test_only_the_facts_beside_the_tokenizer_of_the_image_end_a_completion(task, parallel):
    """What a trial leaves beside its adapter, or a site beside the weights, is not read; what the image says is."""
    body = json.loads(task.read_text())
    image, out = ROOT / "substrate" / "base", Path(body["paths"]["out"])
    generate(Task.read(task), parallel)
    expected = (out / "dev.jsonl").read_bytes()
    edited = json.loads((image / "tokens.json").read_text()) | {"end_ids": list(range(VALUES["vocab_size"]))}
    for folder in ("adapter", "base"):
        (task.parent / folder / "tokens.json").write_text(json.dumps(edited))
        (task.parent / folder / "generation_config.json").write_text(json.dumps({"eos_token_id": edited["end_ids"]}))
        (task.parent / folder / "chat_template.jinja").write_text("another prompt")
    shutil.rmtree(out)
    generate(Task.read(task), parallel)
    assert (out / "dev.jsonl").read_bytes() == expected
    fork = shutil.copytree(image, task.parent / "fork", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (fork / "tokens.json").write_text(json.dumps(edited))
    task.write_text(json.dumps(body | {"paths": body["paths"] | {"tokenizer": str(fork / "tokenizer.json")}}))
    shutil.rmtree(out)
    generate(Task.read(task), parallel)
    rows = [json.loads(line) for line in (out / "dev.jsonl").read_text().splitlines()]
    assert {(row["num_tokens"], row["truncated"], row["completion"]) for row in rows} == {(1, False, "")}


def test_killed_anywhere_only_missing_items_are_decoded(task, parallel, monkeypatch):
    """Stopped at each row in turn, as by SIGKILL in the middle of its line: a new start decodes what has no whole line."""
    from substrate.inference import queue

    out = Path(json.loads(task.read_text())["paths"]["out"])
    generate(Task.read(task), parallel)
    expected = {name: (out / f"{name}.jsonl").read_bytes() for name in ("dev", "fresh")}
    add, num_decoded = queue.Journal.add, []
    for allowed in range(8):  # 7 items; the last time the kill comes between the rows and the sets
        shutil.rmtree(out)
        rows = iter(range(100))

        def cut(journal, item, row, rows=rows, allowed=allowed):
            if next(rows) == allowed:
                journal._file.write(b'{"set": "dev", "item_id": "rom')
                journal._file.flush()
                raise KeyboardInterrupt
            add(journal, item, row)

        monkeypatch.setattr(queue.Journal, "add", cut)
        if allowed == 7:
            monkeypatch.setattr(queue, "write_json_lines", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(Task.read(task), parallel)
        monkeypatch.undo()
        decoded: list[str] = []

        def counted(journal, item, row, decoded=decoded):
            decoded.append(item.item_id)
            add(journal, item, row)

        monkeypatch.setattr(queue.Journal, "add", counted)
        generate(Task.read(task), parallel)
        monkeypatch.undo()
        assert {name: (out / f"{name}.jsonl").read_bytes() for name in expected} == expected
        left = sorted(path.name for path in out.iterdir())
        assert left == ["dev.jsonl", "engine.json", "fresh.jsonl", "progress.jsonl"]
        num_decoded.append(len(decoded))
    assert num_decoded == [7, 6, 5, 4, 3, 2, 1, 0]


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def _change(task: Path, out: Path, what: str) -> None:
    """Changes one thing from which completions follow, or the engine that the journal names."""
    body = json.loads(task.read_text())
    if what == "version":
        path = out / "journal.00.0.jsonl"
        first, *rows = path.read_text().splitlines(keepends=True)
        work = work_of(Task.read(task), ("native", "2.0.0"))
        assert work != json.loads(first)["work"]
        path.write_text("".join([json.dumps({"work": work}) + "\n", *rows]))
    elif what == "adapter":
        path = Path(body["paths"]["adapter"]) / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file({name: 2 * tensor for name, tensor in tensors.items()}, path)
    elif what == "prompts":
        path = Path(body["paths"]["sets"]["fresh"])
        path.write_text(path.read_text().replace('"prompt": "', '"prompt": "not '))
    else:
        changes = {
            "decoding": {"max_new_tokens": 3},
            "seed": {"temperature": 1.0, "seed": 5},
            "batch": {"batch_size": 2},
        }
        body["config"]["decoding"] |= changes[what]
        task.write_text(json.dumps(body))


@pytest.mark.parametrize("what", ["version", "adapter", "prompts", "decoding", "seed", "batch"])
def test_rows_of_other_work_do_not_count(task, parallel, monkeypatch, what):
    """A journal of another adapter, engine or decoding is left aside, whatever its items; one of another batch is not."""
    from substrate.inference import queue

    out = Path(json.loads(task.read_text())["paths"]["out"])
    monkeypatch.setattr(queue, "write_json_lines", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(Task.read(task), parallel)
    monkeypatch.undo()
    _change(task, out, what)
    decoded: list[str] = []
    add = queue.Journal.add

    def counted(journal, item, row):
        decoded.append(item.item_id)
        add(journal, item, row)

    monkeypatch.setattr(queue.Journal, "add", counted)
    generate(Task.read(task), parallel)
    assert len(decoded) == (0 if what == "batch" else 7)
    found = (out / "dev.jsonl").read_bytes()
    shutil.rmtree(out)
    generate(Task.read(task), parallel)
    assert found == (out / "dev.jsonl").read_bytes()


@pytest.mark.parametrize("end", ENDS)
def test_decoding_stops_at_each_end_and_at_the_limit(parallel, end):
    model = build_model(ModelConfig.from_dict(VALUES), parallel).eval()
    init_weights(model, seed=1)
    ((first, *_),) = _decode(model, [[5, 6, 7]], 1)
    with torch.no_grad():  # the token that comes first is now an end
        weight = model.output_layer.weight
        weight[[first, end]] = weight[[end, first]]
    assert _decode(model, [[5, 6, 7]], 24) == [[end]]
    # At the limit a completion that ends is whole, and one that does not is truncated.
    for ends, truncated in ((ENDS, False), ((), True)):
        (one,) = decode(model, [("a", [5, 6, 7])], Decoding(1, 1), ends)
        assert (one.ids, one.truncated) == ([end], truncated)
    (longest,) = _decode(model, [[9] * 150], 24)
    assert len(longest) <= VALUES["max_sequence_length"] - 150


def test_a_damaged_line_is_decoded_again(task, parallel):
    out = Path(json.loads(task.read_text())["paths"]["out"])
    generate(Task.read(task), parallel)
    expected = (out / "dev.jsonl").read_bytes()
    shutil.rmtree(out)
    out.mkdir()
    first = json.dumps({"work": work_of(Task.read(task), ("native", torch.__version__))}).encode()
    damaged = (
        b'\0\0\0\n{"set": "dev", "item_id": "roman-000001"}\n[1]\n"dev"\n{"set": [], "item_id": {}}\n{"set": "dev"'
    )
    (out / "journal.00.0.jsonl").write_bytes(first + b"\n" + damaged)
    (out / "journal.00.1.jsonl").write_bytes(damaged)
    (out / "journal.00.2.jsonl").write_bytes(first[:-9])
    generate(Task.read(task), parallel)
    assert (out / "dev.jsonl").read_bytes() == expected


def test_an_item_that_comes_twice_is_named(tokenizer, tmp_path):
    row = {"item_id": "roman-000003", "family": "roman", "prompt": "7"}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    with pytest.raises(DataError, match="dev name roman-000003 twice"):
        Queue({"dev": tmp_path / "dev.jsonl"}, tokenizer, 160, tmp_path)


def test_a_prompt_that_does_not_fit_is_named(tokenizer, tmp_path):
    row = {"item_id": "roman-000003", "family": "roman", "prompt": "7 " * 200}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="roman-000003 has 4.. tokens; the model's longest sequence is 160"):
        Queue({"dev": tmp_path / "dev.jsonl"}, tokenizer, 160, tmp_path)


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


def test_entry_writes_the_contract_alike_with_ranks_and_replicas(task):
    outputs = []
    for judge_tp, judge_replicas in ((1, 1), (2, 1), (1, 2)):
        body = json.loads(task.read_text())
        body["config"]["parallelism"] |= {"judge_tp": judge_tp, "judge_replicas": judge_replicas}
        task.write_text(json.dumps(body))
        ran = _run(task)
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr.startswith("kernels on ")
        assert ran.stderr.count("\n") == 1
        out = Path(body["paths"]["out"])
        outputs.append([json.loads(line) for line in (out / "dev.jsonl").read_text().splitlines()])
        progress = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
        assert (progress[-1]["done"], progress[-1]["total"]) == (7, 7)
        assert progress[-1]["tokens"] == sum(row["num_tokens"] for row in outputs[-1]) + sum(
            json.loads(line)["num_tokens"] for line in (out / "fresh.jsonl").read_text().splitlines()
        )
        assert set(progress[0]) == {
            "phase", "done", "total", "tokens", "seconds", "items_per_second", "seconds_left"
        }  # fmt: skip
        shutil.rmtree(out)
    assert outputs[0] == outputs[1] == outputs[2]
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
        (
            lambda body: body["config"]["decoding"].update(batch_size=0),
            "batch_size is 0; valid is an integer of at least 1",
        ),
        (lambda body: body["config"]["decoding"].update(top_p=0), "top_p is 0; valid is a number above 0"),
        (
            lambda body: body["config"]["decoding"].update(beams=4),
            "beams is 4; valid is one of the keys max_new_tokens,",
        ),
        (lambda body: body["paths"].pop("sets"), "'sets'"),
    ],
)
def test_a_wrong_task_is_a_usage_error(task, change, words):
    body = json.loads(task.read_text())
    change(body)
    task.write_text(json.dumps(body))
    with pytest.raises(UsageError, match=words):
        Task.read(task)
