"""Test the path of the 30B on its miniature: the published files, parity with transformers, and one whole round.

The miniature has the 30B's pattern, experts, ids, tensors and shards (`make miniature`). What passes only on the tiny model is not done.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from pipeline.campaign import files
from pipeline.campaign.errors import ConfigError
from pipeline.campaign.layout import Campaign
from pipeline.config import settings
from pipeline.execution import base_weights
from pipeline.execution.results import read_attributes
from substrate.base import make_miniature
from substrate.distributed.groups import start
from substrate.formats import published_tokenizer
from substrate.items import draw_items
from substrate.model import ModelConfig, build_model, load_base, token_log_probs
from substrate.model.published import published_tensors
from substrate.tasks import FAMILIES
from tests.support.paths import ROOT
from tests.support.reference import load_reference, transformers

MODELS = ROOT / "hydra_conf" / "model"
ALONE = {"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1}
PROMPT = draw_items(b"m" * 32, "roman", "full", 1)[0].prompt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]


def run_make(*arguments: str) -> str:
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site") / "nano_mini"
    run_make("miniature", f"MINIATURE={path}")
    return path


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_dict(yaml.safe_load((MODELS / "nano_mini.yaml").read_text()))


def test_it_has_the_shape_of_the_30b_and_its_files(folder: Path, config: ModelConfig) -> None:
    large = ModelConfig.from_dict(yaml.safe_load((MODELS / "nemotron3_nano_30b.yaml").read_text()))
    for name in ("pattern", "vocab_size", "num_experts", "moe_top_k", "mamba_num_groups", "num_query_groups", "dtype"):
        assert getattr(config, name) == getattr(large, name), name
    shards = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-{number:05d}-of-00013.safetensors" for number in range(1, 14)]
    found = {}
    for path in shards:
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    expected = {name: shape for name, (shape, _) in published_tensors(config).items()}
    assert found == expected and set(found) == set(published_tensors(large)) and len(found) == 6243
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 11]


def test_the_experiment_of_its_files_is_told_where_another_is_chosen(folder: Path) -> None:
    nano, mini = (settings.compose([f"experiment={name}"]).to_dict()["model"] for name in ("nano_30b", "nano_mini"))
    with pytest.raises(
        ConfigError, match="config.json: head_dim is 16, but 128 .* It is a checkpoint for experiment=nano_mini: choose"
    ):
        base_weights.describe(str(folder), nano)
    assert base_weights.describe(str(folder), mini)[0].startswith("6243 tensors in 13 files")


def test_the_same_seed_gives_the_same_files(folder: Path, config: ModelConfig, tmp_path: Path) -> None:
    make_miniature.make_miniature(tmp_path / "again", config, make_miniature.SEED)
    assert files.tree_digest(tmp_path / "again") == files.tree_digest(folder)


def test_its_tokenizer_and_template_are_read_by_transformers_as_by_us(folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = published_tokenizer.check(folder)
    assert ours.vocab_size == len(theirs) == 131072
    assert theirs.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert theirs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<think>", "</think>"]) == [10, 11, 12, 13]
    assert theirs.eos_token == "<|im_end|>"
    for family in FAMILIES:
        text = draw_items(b"m" * 32, family, "full", 1)[0].prompt
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert ours.decode(ours.encode(text)) == text
    turn = theirs.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True)
    start_of_turns = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n"
    assert turn == f"{start_of_turns}{PROMPT}<|im_end|>\n<|im_start|>assistant\n<think>\n"


def test_log_probabilities_equal_those_of_transformers(folder: Path, config: ModelConfig) -> None:
    torch.set_num_threads(1)
    ids = published_tokenizer.check(folder).encode_prompt(PROMPT)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = load_reference(folder)(tokens[:, :-1]).logits
        expected = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        parallel = start(ALONE)
        try:
            model = build_model(ModelConfig.from_dict(vars(config) | {"dtype": "float32"}), parallel)
            load_base(model, folder)
            ours = token_log_probs(model.eval(), tokens[:, :-1], tokens[:, 1:])
        finally:
            parallel.shutdown()
    assert expected.std() > 0.1  # the logits differ, so that equality says something
    assert (ours - expected).abs().max() < 1e-4


@pytest.mark.long  # three minutes on two quiet cores; first_contact/test_gates.py takes the miniature up to one judged arm in CI
@pytest.mark.skipif(os.geteuid() != 0, reason="loop mounts and dropping to an unprivileged uid need root")
def test_a_whole_round_runs(folder: Path, tmp_path: Path) -> None:
    campaign = Campaign.at(tmp_path / "mini")
    said = run_make(
        "round", "EXPERIMENT=nano_mini", f"MINIATURE={folder}", f"RUNS={tmp_path}", "CAMPAIGN=mini", "CLUSTER=local"
    )
    played = campaign.round("r0001")
    statuses = {f"a{index}": read_attributes(played.published(f"a{index}"))["status"] for index in range(8)}
    assert statuses == dict.fromkeys(statuses, "completed"), said
    decision = json.loads((played.decisions_dir / "00.json").read_text())
    assert decision["state"] == "decided" and campaign.overrides("r0002").exists()
    audited = subprocess.run(
        [str(ROOT / ".venv/bin/python"), "-m", "pipeline", "audit", str(campaign.folder)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert audited.returncode == 0, audited.stdout + audited.stderr
