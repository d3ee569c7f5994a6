"""Test the forms of published weights: each gives every tensor by its published name, or a refusal with its cure."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from substrate.distributed.groups import start
from substrate.formats import published_weights
from substrate.formats.export import merge
from substrate.interface.errors import DataError
from substrate.model import build_model, load_base
from substrate.model.published import published_tensors
from substrate.model.tensors import Checkpoint
from tests.support import adapters
from tests.support.checkpoints import random_tensors, save_shards, tiny_model, write
from tests.support.reference import random_reference, small_config

# megatron-core 0.16.1 calling itself in ways that it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
MODEL = tiny_model()
TENSORS = random_tensors(MODEL)
EMBEDDING, OUTPUT = "backbone.embeddings.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new, 1) if name.startswith(old) else name: each for name, each in tensors.items()}


def stacked(tensors: Tensors) -> Tensors:
    """As transformers 5 saves: the prefix `model.`, and the routed experts of a layer as one tensor."""
    whole = {name: each for name, each in tensors.items() if ".experts." not in name}
    for name in tensors:
        before, found, part = name.partition(".experts.0.")
        if found:
            each = [tensors[f"{before}.experts.{number}.{part}"] for number in range(MODEL.num_experts)]
            whole[f"{before}.experts.{part.removesuffix('.weight')}"] = torch.stack(each)
    return renamed(whole, "backbone.", "model.")


def with_mtp(tensors: Tensors) -> Tensors:
    return tensors | {f"mtp.layers.{number}.weight": torch.zeros(2) for number in range(270)}


def one_file(tensors: Tensors, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def thirteen(tensors: Tensors, folder: Path) -> None:
    save_shards(tensors, folder, 13)


def thirteen_without_index(tensors: Tensors, folder: Path) -> None:
    thirteen(tensors, folder)
    (folder / "model.safetensors.index.json").unlink()


def thirteen_and_a_copy(tensors: Tensors, folder: Path) -> None:
    """A file that the index does not name, as where two downloads share a folder."""
    thirteen(tensors, folder)
    save_file({name: -each for name, each in tensors.items()}, folder / "consolidated.safetensors")


FORMS: dict[str, tuple[Callable[[Tensors], Tensors], Callable[[Tensors, Path], None]]] = {
    "backbone, 13 shards with an index": (dict, thirteen),
    "13 shards without an index": (dict, thirteen_without_index),
    "an index, and a file that it does not name": (dict, thirteen_and_a_copy),
    "a single file without an index": (dict, one_file),
    "model, experts stacked": (stacked, one_file),
    "model, experts stacked, 13 shards": (stacked, thirteen),
    "model, experts one by one": (lambda each: renamed(each, "backbone.", "model."), one_file),
    "embedding in the singular": (lambda each: renamed(each, EMBEDDING, "backbone.embedding.weight"), one_file),
    "model, embedding in the singular": (lambda each: renamed(stacked(each), "model.embeddings", "model.embedding"), one_file),
    "270 tensors mtp": (with_mtp, thirteen),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_gives_every_tensor(tmp_path, form):
    change, save = FORMS[form]
    save(change(TENSORS), tmp_path)
    number = 1 if save is one_file else 13
    left_out = 270 if "mtp" in form else 0
    assert published_weights.check(tmp_path, vars(MODEL)) == (
        f"{len(change(TENSORS))} tensors in {number} files; an output layer of its own; {left_out} of multi-token prediction left out"
    )
    with Checkpoint(tmp_path) as checkpoint:
        for name, (shape, _) in published_tensors(MODEL).items():
            assert torch.equal(checkpoint.read(name, shape, slice(None)), TENSORS[name]), name
            assert torch.equal(checkpoint.read(name, shape, slice(0, 1)), TENSORS[name][:1])


def test_a_tied_relative_computes_what_transformers_computes(tmp_path):
    """transformers 5.23 ties no Nemotron-H, whatever config.json says; its output layer is given the embedding by hand."""
    config = small_config()
    reference = random_reference(config)
    with torch.no_grad():
        reference.lm_head.weight.copy_(reference.model.embeddings.weight)
    reference.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    save_file({name: each for name, each in held.items() if name != OUTPUT}, tmp_path / "model.safetensors")
    write(tmp_path, "config.json", json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True})
    assert "an output layer tied to the embedding" in published_weights.check(tmp_path, vars(config))
    parallel = start({axis: 1 for axis in ("tp", "pp", "ep", "cp", "dp")})
    try:
        model = build_model(config, parallel).eval()
        load_base(model, tmp_path)
        tokens = torch.randint(3, 64, (2, 19), generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            torch.testing.assert_close(model(tokens, None, None), reference(tokens).logits, rtol=1e-4, atol=1e-4)
    finally:
        parallel.shutdown()


def tied(folder: Path, config_json: str | None) -> None:
    one_file({name: each for name, each in TENSORS.items() if name != OUTPUT}, folder)
    if config_json is not None:
        (folder / "config.json").write_text(config_json)


def without(name: str) -> Tensors:
    return {each: tensor for each, tensor in TENSORS.items() if each != name}


def broken_index(folder: Path, content: str) -> None:
    thirteen(TENSORS, folder)
    (folder / "model.safetensors.index.json").write_text(content)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard is missing": (
        lambda folder: (thirteen(TENSORS, folder), (folder / "model-00007-of-00013.safetensors").unlink())[0],
        "lacks model-00007-of-00013.safetensors, which its index names; copy the published file again",
    ),
    "a shard is a pointer": (
        lambda folder: (
            thirteen(TENSORS, folder),
            (folder / "model-00002-of-00013.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1"),
        )[0],
        "model-00002-of-00013.safetensors is a pointer of Git LFS; run `git lfs pull`",
    ),
    "a shard is cut": (
        lambda folder: (
            thirteen(TENSORS, folder),
            (folder / "model-00002-of-00013.safetensors").write_bytes((folder / "model-00002-of-00013.safetensors").read_bytes()[:99]),
        )[0],
        "model-00002-of-00013.safetensors is not a safetensors file .*; copy or make it again",
    ),
    "an empty folder": (lambda folder: folder.mkdir(parents=True, exist_ok=True), "nor a folder with one; give one of the two"),
    "an index of another folder": (
        lambda folder: broken_index(folder, json.dumps({"weight_map": {EMBEDDING: "../model.safetensors"}})),
        "must name files of its own folder.*; take the published file again",
    ),
    "an index that is cut": (lambda folder: broken_index(folder, '{"weight_map": {'), "is no index of shards .*; take the published"),
    "an index without a map": (lambda folder: broken_index(folder, "{}"), "is no index of shards .*; take the published"),
    "two copies without an index": (
        lambda folder: (one_file(TENSORS, folder), save_file(stacked(TENSORS), folder / "other.safetensors"))[0],
        "the same tensor; remove the files of one copy",
    ),
    "no output layer, untied": (lambda folder: tied(folder, '{"tie_word_embeddings": false}'), "lacks lm_head.weight; .* tie_word_embeddings"),
    "no output layer, no config.json": (lambda folder: tied(folder, None), "lacks lm_head.weight; .* tie_word_embeddings"),
    "no output layer, config.json cut": (lambda folder: tied(folder, "{"), "config.json is not JSON: .*; take the published file again"),
    "a tensor is missing": (
        lambda folder: one_file(without("backbone.layers.0.mixer.in_proj.weight"), folder),
        r"lacks backbone.layers.0.mixer.in_proj.weight; a tensor of shape \[",
    ),
    "a tensor too many": (
        lambda folder: one_file(TENSORS | {"visual.patch.weight": torch.zeros(1)}, folder), "visual.patch.weight, which model form does not have"
    ),
    "fewer experts": (
        lambda folder: one_file(
            {name: each[:-1] if name.endswith("experts.up_proj") else each for name, each in stacked(TENSORS).items()}, folder
        ),
        "experts.up_proj has shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_a_form_is_refused_with_its_cure(tmp_path, form):
    make, words = REFUSED[form]
    make(tmp_path)
    with pytest.raises(DataError, match=words) as refused:
        published_weights.check(tmp_path, vars(MODEL))
    assert "\n" not in str(refused.value)


def test_a_merged_model_keeps_what_its_base_says_of_tokens_and_says_what_it_leaves_out(tmp_path, capsys):
    config = small_config()
    one_file(with_mtp(random_tensors(config)), tmp_path / "base")
    write(tmp_path / "base", "config.json", {"eos_token_id": [2, 11], "pad_token_id": 0, "hidden_size": 9})
    write(tmp_path / "base", "additional_chat_templates/tool_use.jinja", "a template")
    merge(adapters.write(tmp_path / "adapter"), tmp_path / "base", vars(config), tmp_path / "merged")
    assert "warning: 270 tensors mtp.* of" in capsys.readouterr().err
    with Checkpoint(tmp_path / "merged") as merged:
        assert merged.names == set(published_tensors(config))
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written == config.to_transformers() | {"eos_token_id": [2, 11], "pad_token_id": 0}
    assert (tmp_path / "merged" / "additional_chat_templates" / "tool_use.jinja").exists()
