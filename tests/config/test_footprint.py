"""Test the memory plan against models that are built and trained here, and what it refuses."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from safetensors.torch import load_file

from pipeline.__main__ import main
from pipeline.campaign.errors import ConfigError
from pipeline.config import footprint, settings
from substrate.distributed.groups import Parallel, start
from substrate.inference.decode import Decoding, decode
from substrate.model import ModelConfig, add_lora, build_model, init_weights, token_log_probs
from substrate.model.full import add_full
from substrate.recipes.grpo import Grpo
from substrate.training.pipeline_stages import accumulate_gradients
from tests.support import trainings
from tests.support.live_bytes import LiveBytes
from tests.support.paths import ROOT
from tests.support.ports import free_ports

pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
CONFIGS = ROOT / "hydra_conf" / "model"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "shared_experts.up_proj", "shared_experts.down_proj"]
OPTIONS = {"sft_steps": 2, "samples_per_prompt": 2, "updates_per_rollout": 1, "temperature": 1.0, "top_p": 1.0}
OPTIONS |= {"max_new_tokens": 60, "decode_batch_size": 8, "clip": 0.2, "kl_weight": 0.1, "learning_rate_scale": 0.5}
ALONE = {"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1, "recompute": "none"}
NANO = ["experiment=nano_30b", "cluster=slurm_pyxis"]
# model file, what is changed in it, layout, sequences x tokens of a micro-batch
SHORT = {"pattern": "ME*M"}
CASES = {
    "tiny": ("tiny", {}, ALONE, (4, 128)),
    "small": ("small", {}, ALONE, (1, 256)),
    "bfloat16": ("small", SHORT | {"dtype": "bfloat16"}, ALONE, (2, 256)),
    "recompute": ("small", SHORT, ALONE | {"recompute": "full"}, (2, 256)),
    "recompute bfloat16": ("small", SHORT | {"dtype": "bfloat16"}, ALONE | {"recompute": "full"}, (2, 256)),
    "selective": ("small", SHORT, ALONE | {"recompute": "selective"}, (2, 256)),
    "selective bfloat16": ("small", SHORT | {"dtype": "bfloat16"}, ALONE | {"recompute": "selective"}, (2, 256)),
    "tp2 selective": ("small", SHORT, ALONE | {"tp": 2, "recompute": "selective"}, (2, 256)),
    "short chunks": ("small", {"pattern": "MMM", "mamba_chunk_size": 16}, ALONE | {"recompute": "full"}, (1, 256)),
    "large vocabulary": ("small", {"pattern": "M*E", "vocab_size": 65536}, ALONE | {"recompute": "full"}, (2, 512)),
    "many experts": ("small", {"pattern": "MEME", "num_experts": 32}, ALONE, (2, 256)),
    "tp2": ("small", SHORT, ALONE | {"tp": 2}, (2, 256)),
    "tp2 recompute": ("small", SHORT, ALONE | {"tp": 2, "recompute": "full"}, (2, 256)),
    "tp2 ep2": ("small", SHORT, ALONE | {"tp": 2, "ep": 2}, (2, 256)),
    "dp2 ep2": ("small", SHORT, ALONE | {"dp": 2, "ep": 2}, (2, 256)),
    "pp2": ("small", SHORT, ALONE | {"pp": 2}, (2, 256)),
    "full": ("small", SHORT, ALONE, (2, 256)),  # whole weights of the targets
    "full bfloat16 tp2": ("small", SHORT | {"dtype": "bfloat16"}, ALONE | {"tp": 2}, (2, 256)),
}


class Line(NamedTuple):
    """A micro-batch as the trainer makes it: packed rows."""

    tokens_1L: torch.Tensor
    lengths: list[int]


def _lengths(sequences: int, length: int) -> list[int]:
    """Pairs of rows an eighth longer and shorter than `length`, which attention pads to one length."""
    return [length] if sequences == 1 else [length + length // 8, length - length // 8] * (sequences // 2)


def planned(case: str, targets: list[str]) -> footprint.Footprint:
    name, changes, layout, (sequences, length) = CASES[case]
    recipe = {
        "method": "sft_full" if case.startswith("full") else "sft_lora",
        "selection": {"choice": "last"},
        "options": {},
        "optimizer": "adamw",
        "lora": {"rank": 16, "targets": targets},
        "micro_batch_tokens": sequences * length,
        "batch_size": 2 * sequences * layout["dp"],
        "sequence_length": length,
    }
    return footprint.training(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) | changes, layout, recipe)


def targets_of(case: str) -> list[str]:
    """Those that the pattern has layers for."""
    name, changes, _, _ = CASES[case]
    pattern = changes.get("pattern") or yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["pattern"]
    kinds = {"M": ["in_proj"], "*": TARGETS[:4], "E": TARGETS[5:]}
    return [target for letter in "*ME" if letter in pattern for target in kinds[letter]]


def built(parallel: Parallel, case: str) -> dict[str, int]:
    """Bytes of a rank that makes a real step of two micro-batches."""
    name, changes, layout, (sequences, length) = CASES[case]
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) | changes
    model = build_model(ModelConfig.from_dict(values), parallel, recompute=layout["recompute"])
    init_weights(model, seed=1)
    base = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if case.startswith("full"):
        add_full(model, targets_of(case))
    else:
        add_lora(model, 16, 32, 0.0, targets_of(case), seed=1)
    trainable = [tensor for tensor in model.parameters() if tensor.requires_grad]
    adapter = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) - base
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    state = [optimizer.state[each] for each in trainable]
    for each, tensor in zip(state, trainable, strict=True):
        each |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
        tensor.grad = torch.zeros_like(tensor)
    kept = [*model.parameters(), *model.buffers(), *(tensor.grad for tensor in trainable)]
    kept += [tensor for each in state for tensor in each.values()]
    generator = torch.Generator().manual_seed(1)
    batches = [
        Line(torch.randint(3, 500, (1, sequences * length), generator=generator), _lengths(sequences, length))
        for _ in range(2)
    ]
    with LiveBytes(kept) as counted:
        accumulate_gradients(
            model,
            batches,
            lambda batch: token_log_probs(model, batch.tokens_1L, batch.tokens_1L, batch.lengths),
            lambda log_probs, batch: -log_probs.mean(),
        )
        parallel.finalize_gradients(model)
        optimizer.step()
    moments = sum(tensor.nbytes for each in state for tensor in each.values())
    gradients = sum(tensor.grad.nbytes for tensor in trainable)
    return {"weights": base, "adapter": adapter, "gradients": gradients, "optimizer": moments, "peak": counted.peak}


def _num_ranks(case: str) -> int:
    return CASES[case][2]["tp"] * CASES[case][2]["pp"] * CASES[case][2]["dp"]


def _rank_main(rank: int, ports: dict[str, int], folder: Path) -> None:
    torch.set_num_threads(1)
    for case, port in ports.items():
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        parallel = start(CASES[case][2])
        (folder / f"{case}.{rank}.json").write_text(json.dumps(built(parallel, case)))
        parallel.shutdown()


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> dict[str, dict[str, int]]:
    """Of every case, the rank with the highest peak."""
    torch.set_num_threads(1)
    parallel = start(ALONE)
    found = {case: built(parallel, case) for case in CASES if _num_ranks(case) == 1}
    parallel.shutdown()
    folder = tmp_path_factory.mktemp("built")
    names = [case for case in CASES if _num_ranks(case) == 2]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    mp.spawn(_rank_main, (ports, folder), nprocs=2)
    for case in ports:
        ranks = [json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in range(2)]
        found[case] = max(ranks, key=lambda each: each["peak"])
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_a_real_rank_holds(real, case):
    plan = planned(case, targets_of(case))
    exact = {name: getattr(plan, name) for name in ("weights", "adapter", "gradients", "optimizer")}
    assert exact == {name: real[case][name] for name in exact}
    assert plan.peak == pytest.approx(real[case]["peak"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "more"), [("float32", []), ("float32", ["experts.up_proj"]), ("bfloat16", [])])
def test_the_plan_of_decoding_is_what_a_real_rank_holds(alone, dtype, more):
    """64 slots whose prompts fill a pass, with an adapter, which in float32 is merged into copies of its weights."""
    values = yaml.safe_load((CONFIGS / "small.yaml").read_text()) | SHORT | {"dtype": dtype, "max_sequence_length": 512}
    targets = [target for target in TARGETS if not target.startswith("experts.")] + more
    model = build_model(ModelConfig.from_dict(values), alone)
    init_weights(model, seed=1)
    add_lora(model, 16, 32, 0.0, targets, seed=1)
    prompts = [(str(number), [3 + number] * (footprint.PROMPT_TOKENS // 64)) for number in range(64)]
    with LiveBytes([*model.parameters(), *model.buffers()]) as counted:
        list(decode(model.eval(), prompts, Decoding(256, 64), (), lambda ids: len(ids) > 2))
    plan = footprint.decoding(values, 1, {"decode_batch_size": 64}, {"rank": 16, "targets": targets})
    assert 0.95 < plan.peak / counted.peak < 1.15


def test_every_target_is_counted(alone):
    """All eleven, routed experts and lm_head among them."""
    targets = [*TARGETS, "out_proj", "experts.up_proj", "experts.down_proj", "lm_head"]
    values = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    model = build_model(ModelConfig.from_dict(values), alone)
    init_weights(model, seed=1)
    before = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    factors = sum(tensor.nbytes for tensor in add_lora(model, 16, 32, 0.0, targets, seed=1))
    after = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    plan = planned("tiny", targets)
    assert (plan.weights, plan.adapter, plan.gradients) == (before, after - before, factors)


def test_the_published_30b_on_one_gpu():
    """63.2 GB of weights; 6,144 bytes of keys and values a token; scan states of about 48 MB a sequence."""
    config = settings.compose([*NANO, "parallelism=tp2", "parallelism.tp=1"]).to_dict()
    plan = footprint.of_arm(config)["decoding"]
    assert plan.weights / 1e9 == pytest.approx(63.2, abs=0.05)
    assert plan.activations / config["tasks"]["decode_batch_size"] == pytest.approx(6144 * 8192 + 48.2e6, rel=0.02)


def test_a_row_that_grpo_draws_is_planned_as_a_row_of_the_file_is():
    """1,024 tokens of a prompt and 7,680 of its completion are more than the model takes, which bounds them."""
    short = [*NANO, "parallelism=tp1", "recipe.micro_batch_tokens=1024", "recipe.sequence_length=1024"]
    grpo = ["recipe=grpo", "recipe.options.decode_batch_size=1"]
    for drawn, longest in ((7680, 8192), (1024, 2048)):
        limit = f"recipe.options.max_new_tokens={drawn}"
        sampled, learned, kept = (
            settings.compose([*short, *own]).to_dict()
            for own in ([*grpo, limit], [f"recipe.sequence_length={longest}"], ["recipe=rft", limit])
        )
        assert footprint.longest_row(sampled["model"], sampled["recipe"]) == longest
        plans = [footprint.of_arm(config)["training"] for config in (sampled, learned)]
        assert plans[0].activations + plans[0].working >= plans[1].activations + plans[1].working
        assert footprint.longest_row(kept["model"], kept["recipe"]) == 1024, "rft keeps no longer one"


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("sft_lora", {}),
        ("sft_lora", {"optimizer": "adagrad"}),
        ("sft_lora", {"selection": {"choice": "average", "last_k": 3, "family_weights": {}}}),
        ("sft_full", {}),
        ("grpo", {"options": OPTIONS}),
    ],
)
@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "in_proj"]], ids=["all", "one of three in a fused matrix"])
def test_a_real_checkpoint_has_the_size_that_is_told(inputs, alone, tmp_path, method, changes, targets):
    """Its last one, of step 9 of 10; the states of generators, of some kilobytes, are not counted."""
    lora = trainings.config("recipe", "sft_lora")["lora"] | {"targets": targets}
    task = trainings.write_task(tmp_path, inputs, method=method, lora=lora, **changes)
    out = trainings.train(task, alone)
    config = json.loads(task.read_text())["config"]
    saved = load_file(out / "checkpoints" / "step_000009" / "state-00000-00000.safetensors")
    numbers = sum(tensor.nbytes for name, tensor in saved.items() if not name.startswith("random/"))
    assert numbers == footprint.checkpoint_bytes(config["model"], config["recipe"])
    if method != "sft_full":
        handed_out = load_file(out / "adapter" / "adapter_model.safetensors")
        trained = sum(tensor.numel() for tensor in handed_out.values())
        assert trained == footprint.trained_parameters(config["model"], config["recipe"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment=nano_mini"], "told to stop (its steps are over before recipe.checkpoint_every = 50), and keeps"),
        (
            ["experiment=smoke", "cluster.checkpoint_minutes=5"],
            "MB at least every 5 minutes, when it is told to stop (",
        ),
        (
            ["recipe=sft_full", "cluster.checkpoint_minutes=0"],
            "MB every 50 steps, when it is told to stop, and keeps the last two.",
        ),
    ],
)
def test_what_an_arm_trains_and_saves_is_told(capsys, words, said):
    main(["plan-memory", *words])
    config = settings.compose(words).to_dict()
    printed, sizes = capsys.readouterr().out, (config["model"], config["recipe"])
    assert said in printed
    assert f"An arm trains {footprint.trained_parameters(*sizes) / 1e6:,.2f} million parameters" in printed
    assert f"a checkpoint of {footprint.checkpoint_bytes(*sizes) / 1e6:,.1f} MB" in printed


def test_whole_weights_are_more_than_their_factors():
    """The targets' matrices of the 30B by hand: hidden size 2,688, six attention, 23 Mamba and 23 expert layers."""
    model = settings.compose(NANO).to_dict()["model"]
    recipe = settings.compose([*NANO, "recipe=sft_full"]).to_dict()["recipe"]
    attention, mamba = 2688 * (2 * 4096 + 2 * 256), 2688 * (2 * 4096 + 2 * 8 * 128 + 64)
    assert footprint.trained_parameters(model, recipe) == 6 * attention + 23 * mamba + 23 * 2 * 2688 * 3712


@pytest.mark.parametrize("method", ["rft", "grpo"])
def test_slots_that_sample_in_training_need_what_slots_of_judging_need(method):
    """With so many slots that decoding is the larger part, caches and working memory of both are the same."""
    config = settings.compose([*NANO, "parallelism=tp1", f"recipe={method}", "recipe.options.decode_batch_size=64"]).to_dict()  # fmt: skip
    sampling, judging = footprint.of_arm(config).values()
    assert (sampling.activations, sampling.working) == (judging.activations, judging.working)


def test_no_pass_of_a_real_grpo_run_is_longer_than_planned(inputs, alone, tmp_path, monkeypatch):
    """Completions of a random model reach their limit, so its passes are longer than any row of the training file."""
    lengths = []
    outputs = Grpo.outputs
    monkeypatch.setattr(
        Grpo, "outputs", lambda self, model, batch, *rest: lengths.append(batch.tokens_1L.shape[1]) or outputs(self, model, batch, *rest)
    )  # fmt: skip
    options = OPTIONS | {"max_new_tokens": 150}
    lora = trainings.config("recipe", "sft_lora")["lora"]
    changes = {"sequence_length": 110, "micro_batch_tokens": 110, "num_steps": 4, "warmup_steps": 1}
    task = trainings.write_task(tmp_path, inputs, method="grpo", options=options, lora=lora, **changes)
    trainings.train(task, alone)
    config = json.loads(task.read_text())["config"]
    assert 110 < max(lengths) <= footprint.longest_row(config["model"], config["recipe"]) == 260


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallelism.recompute=false", "recipe.micro_batch_tokens=32768"], "training needs .*recompute=full"),
        (["tasks.decode_batch_size=4096"], "decoding needs .*decode_batch_size"),
        (
            ["parallelism.recompute=full", "parallelism.judge_tp=1", "cluster.capacity.gpu_memory_gib=40"],
            "decoding needs .*judge_tp",
        ),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_made(tmp_path, capsys, overrides, words):
    with pytest.raises(ConfigError, match=words):
        footprint.check_memory(settings.compose([*NANO, *overrides]).to_dict())
    assert main(["plan-memory", *NANO, *overrides]) == 2
    assert main(["round", str(tmp_path / "runs" / "nano"), *NANO, *overrides]) == 2
    assert "gpu_memory_gib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_shipped_30b_layout_fits(capsys):
    assert main(["plan-memory", *NANO]) == 0
    assert "it fits, but `round` refuses it on this machine: " in capsys.readouterr().out  # it names no weights


def test_the_refusal_that_comes_next_is_told(tmp_path, capsys):
    fits = ["cluster.capacity.gpu_memory_gib=139", "experiment=smoke"]
    for words, refusal in (
        (NANO, "ConfigError: this model's weights are not in the image, and cluster.weights_dir is empty"),
        (
            [*NANO, f"cluster.weights_dir={tmp_path}/none"],
            f"ConfigError: cluster.weights_dir = {tmp_path}/none is not a folder",
        ),
        ([*fits, "recipe.num_steps=100000000"], "Refused: article 4"),
        ([*fits, "tasks.train_csv=none.csv"], "ConfigError: tasks.train_csv = none.csv is not a file"),
    ):
        assert main(["plan-memory", *words]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[-2].startswith(f"it fits, but `round` refuses it on this machine: {refusal}"), said[-2:]
        assert said[-1].startswith("next: python -m pipeline round runs/NAME ") and said[-1].endswith(
            "--dry-run    (once that is mended)"
        )
        assert main(["plan-memory", *words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["refusal"].startswith(refusal)
    assert main(["plan-memory", *fits]) == 0
    assert "it fits\nnext: python -m pipeline round runs/NAME " in capsys.readouterr().out


def test_for_programs(capsys):
    assert main(["plan-memory", *NANO, "cluster.capacity.price_per_gpu_hour=2.5", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    parts = dict(found["bytes_per_rank"]["training"])
    assert parts.pop("peak") == sum(parts.values())
    assert found["forecast"]["cost"] == pytest.approx(2.5 * found["forecast"]["hours"])
    assert found["forecast"]["source"].startswith("assumed")
