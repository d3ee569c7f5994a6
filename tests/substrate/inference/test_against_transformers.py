"""Test that decoding writes the tokens that transformers would: the tiny base model, 500 prompts, one sequence at a time and 64 together."""

from pathlib import Path

import pytest
import torch
import yaml

from substrate.inference.decode import Decoding, decode
from substrate.model import ModelConfig, build_model, load_base, save_base
from tests.support.paths import ROOT
from tests.support.reference import load_reference, reference_config

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
TIE = 1e-4  # of the largest logit: closer ones may fall either way in float32


@pytest.mark.parametrize("batch", [1, 64])
def test_every_token_of_500_prompts_is_transformers_argmax(alone, tmp_path: Path, batch: int) -> None:
    config = ModelConfig.from_dict(yaml.safe_load((ROOT / "hydra_conf" / "model" / "tiny.yaml").read_text()))
    model = build_model(config, alone)
    load_base(model, ROOT / "substrate" / "base" / "model.safetensors")
    save_base(model, tmp_path)
    reference_config(config).save_pretrained(tmp_path)
    theirs = load_reference(tmp_path)
    draw = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 120, (500,), generator=draw).tolist()
    prompts = [(str(n), torch.randint(3, 512, (length,), generator=draw).tolist()) for n, length in enumerate(lengths)]
    written = {one.item_id: one.ids for one in decode(model.eval(), prompts, Decoding(16, batch), ())}
    ties = 0
    for name, ids in prompts:
        with torch.no_grad():
            logits = theirs(torch.tensor([ids + written[name]])).logits[0, len(ids) - 1 : -1]
        short_of_best = logits.amax(-1) - logits.gather(1, torch.tensor(written[name]).unsqueeze(1)).squeeze(1)
        assert short_of_best.max() < TIE * logits.abs().max()
        ties += int((short_of_best > 0).sum())
    assert ties <= 8  # of 8,000 tokens; none was seen
