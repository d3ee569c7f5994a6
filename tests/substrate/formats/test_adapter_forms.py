"""Test the forms of other people's adapters for this base, as public files have them: each is added to the weights as its fields say."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from substrate.formats.export import merge
from substrate.formats.export import submission as pack
from substrate.interface.errors import DataError
from substrate.model import build_model, load_adapter, load_base
from substrate.model.published import published_tensors
from substrate.model.tensors import Checkpoint
from tests.support import adapters
from tests.support.adapters import NULLS
from tests.support.checkpoints import random_tensors, save_shards
from tests.support.reference import small_config

# megatron-core 0.16.1 calling itself in ways that it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
CONFIG = small_config()
REMOTE = {
    "auto_mapping": {"base_model_class": "NemotronHForCausalLM", "parent_library": "transformers_modules.nvidia.modeling_nemotron_h"}
}  # fmt: skip
TARGETS = ["q_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj"]
LINEAR = {
    name.removesuffix(".weight"): shape
    for name, (shape, _) in published_tensors(CONFIG).items()
    if len(shape) == 2 and "embeddings" not in name and ".gate." not in name
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "rank 32, alpha 32": {"rank": 32, "lora_alpha": 32},
    "rank 32, alpha 64": {"rank": 32, "lora_alpha": 64},
    "targets in random order": {"target_modules": random.Random(1).sample(TARGETS, len(TARGETS))},
    "all-linear": {"target_modules": "all-linear"},
    "a module that the model has not": {"target_modules": [*TARGETS, "gate_proj"]},
    "out_proj": {"target_modules": [*TARGETS, "out_proj"]},
    "auto_mapping of remote code": REMOTE,
    "fields that are present and null": NULLS | dict.fromkeys(
        ("lora_bias", "corda_config", "eva_config", "trainable_token_indices", "qalora_group_size", "arrow_config", "target_parameters")
    ),
}  # fmt: skip


def adapter_of(folder: Path, **fields: Any) -> Path:
    """An adapter with a pair for every module that its targets name; "all-linear" leaves out the output layer."""
    targets = fields.setdefault("target_modules", TARGETS)
    taken = {
        module: shape
        for module, shape in LINEAR.items()
        if (module != "lm_head" if targets == "all-linear" else module.rpartition(".")[2] in targets)
    }
    return adapters.write(folder, modules=taken, **fields)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_shards({name: each / 5 for name, each in random_tensors(CONFIG).items()}, folder, 13)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_added_as_its_fields_say(base, alone, tmp_path, form):
    """W + alpha / r B A, by hand, is what `merge` writes; and the model with the adapter computes what the merged one does."""
    folder = adapter_of(tmp_path / "adapter", **FORMS[form])
    merge(folder, base, vars(CONFIG), tmp_path / "merged")
    fields, pairs = json.loads((folder / adapters.CONFIG).read_text()), adapters.load_file(folder / adapters.WEIGHTS)
    with Checkpoint(base) as plain, Checkpoint(tmp_path / "merged") as merged:
        for name, (shape, _) in published_tensors(CONFIG).items():
            expected = plain.read(name, shape, slice(None))
            factor = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
            if factor.format("A") in pairs:
                delta = torch.from_numpy(pairs[factor.format("B")] @ pairs[factor.format("A")])
                expected = expected + fields["lora_alpha"] / fields["r"] * delta
            torch.testing.assert_close(merged.read(name, shape, slice(None)), expected, rtol=1e-6, atol=1e-6)
    tokens = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(4))
    logits = []
    for weights, adapter in ((base, folder), (tmp_path / "merged", None)):
        model = build_model(CONFIG, alone).eval()
        load_base(model, weights)
        if adapter is not None:
            load_adapter(model, adapter)
        with torch.no_grad():
            logits.append(model(tokens, None, None))
    assert logits[0].isfinite().all()
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_a_target_that_nothing_matches_is_refused_where_a_submission_would_be_lost(tmp_path):
    folder = adapter_of(tmp_path / "adapter", target_modules=[*TARGETS, "gate_proj"])
    with pytest.raises(DataError, match="names the target gate_proj, for which .*; take it out of target_modules"):
        pack(folder, tmp_path / "submission.zip")
