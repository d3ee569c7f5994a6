"""Makes a miniature of Nemotron 3 Nano 30B-A3B: every file of the published folder in its form, with random weights.

    python -m substrate.base.make_miniature build/nano_mini

    config.json, generation_config.json             the published fields; a completion ends with id 2 or 11
    tokenizer_config.json, chat_template.jinja      eos is <|im_end|>; an empty system turn first, thinking on by default
    tokenizer.json                                  131,072 ids: 1,000 special ones, 256 bytes, merges
    model-00001-of-00013.safetensors ...            6,243 tensors by their published names, and the index

What breaks with the published files breaks with these: the number and names of tensors, the shards, the width of the
logits, the special ids. Only the sizes in `hydra_conf/model/nano_mini.yaml` are small, and nothing was learned. The
same seed gives the same files. The folder is complete when it exists. `auto_map` is left out of config.json, because
the Python files that it names are not here.

Sources: the public config.json and tokenizer of nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.
"""

import functools
import hashlib
import json
import multiprocessing
import random
import shutil
import string
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from substrate.interface.command_line import Parser, as_umask_says
from substrate.interface.errors import DataError, exit_code_of
from substrate.items import draw_items
from substrate.model import ModelConfig
from substrate.model.layout import named_generator
from substrate.model.published import SAFETENSORS_DTYPES, published_tensors
from substrate.model.weights import initial_tensor
from substrate.tasks import FAMILIES

SEED = 20261127
NUM_SHARDS = 13
NAMED = {0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>", 12: "<think>", 13: "</think>"}
NUM_SPECIAL = 1000  # ids that no text has: those above and <SPECIAL_3>, <SPECIAL_4>, ...
EOS_IDS = (2, 11)
PUZZLES_PER_FAMILY, WORDS = 60, 60_000  # of which the merges are learned; words enough for the published number of ids
# Letters in words, each digit alone, signs, line breaks, blanks: how the published tokenizer cuts a text before it merges.
PIECES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = """\
{%- set enable_thinking = enable_thinking if enable_thinking is defined else True -%}
{%- set ns = namespace(rest=messages) -%}
{%- if messages and messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
{%- set ns.rest = messages[1:] -%}
{%- else -%}
{{- '<|im_start|>system\\n<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in ns.rest -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' + ('<think>\\n' if enable_thinking else '<think></think>') -}}
{%- endif -%}
"""


def make_miniature(folder: Path, config: ModelConfig, seed: int, processes: int = 1) -> None:
    """Writes the folder aside and renames it. Each of `processes` holds one shard at a time. Raises DataError if it exists."""
    if folder.exists():
        raise DataError(f"{folder} exists; remove it, or name another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(partial / "config.json", published_config(config))
    ends = {"bos_token_id": 1, "eos_token_id": list(EOS_IDS), "pad_token_id": 0}
    write_json(partial / "generation_config.json", {"_from_model_config": True, "do_sample": True} | ends)
    (partial / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    write_tokenizer(partial, config.vocab_size, seed)
    write_weights(partial, config, seed, processes)
    partial.rename(folder)


def published_config(config: ModelConfig) -> dict[str, Any]:
    """Returns config.json with the published fields, in their alphabetical order."""
    fields = config.to_transformers() | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "expand": 2,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "intermediate_size": config.moe_ffn_size,
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "n_group": 1,
        "n_shared_experts": 1,
        "norm_eps": config.norm_eps,
        "norm_topk_prob": True,
        "num_hidden_layers": len(config.pattern),
        "num_logits_to_keep": 1,
        "pad_token_id": 0,
        "rescale_prenorm_residual": True,
        "residual_in_fp32": False,
        "sliding_window": None,
        "time_step_floor": 0.0001,
        "time_step_max": 0.1,
        "time_step_min": 0.001,
        "topk_group": 1,
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "use_mamba_kernels": True,
    }
    return dict(sorted(fields.items()))


def write_tokenizer(folder: Path, vocab_size: int, seed: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json. Raises DataError if the texts give too few merges."""
    special = [NAMED.get(number, f"<SPECIAL_{number}>") for number in range(NUM_SPECIAL)]
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(f"{tokenizer.get_vocab_size()} ids came out of the texts, {vocab_size} are needed; raise WORDS")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=True)
    added = {
        str(number): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        | {"special": True}
        for number, token in enumerate(special)
    }
    settings = {
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 262144,
        "pad_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    write_json(folder / "tokenizer_config.json", settings)


def _texts(seed: int) -> Iterator[str]:
    """Puzzles with their answers, then words of random letters that fill the vocabulary."""
    key = hashlib.sha256(f"miniature/{seed}".encode()).digest()
    for family in sorted(FAMILIES):
        for item in draw_items(key, family, "full", PUZZLES_PER_FAMILY, set()):
            yield from (item.prompt, item.answer) * 20  # often enough to be merged before the random words
    rng = random.Random(f"{seed}/words")
    for _ in range(WORDS):
        yield " " + "".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 12)))


def write_weights(folder: Path, config: ModelConfig, seed: int, processes: int) -> None:
    """Writes the shards, each with as many layers, and the index."""
    layers = len(config.pattern)
    shards: list[dict[str, tuple[tuple[int, ...], str]]] = [{} for _ in range(NUM_SHARDS)]
    for name, described in published_tensors(config).items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else 0 if parts[1] == "embeddings" else layers - 1
        shards[layer * NUM_SHARDS // layers][name] = described
    files = [folder / f"model-{number:05d}-of-{NUM_SHARDS:05d}.safetensors" for number in range(1, NUM_SHARDS + 1)]
    write = functools.partial(write_shard, layers=layers, seed=seed)
    if processes == 1:
        sizes = list(map(write, files, shards))
    else:  # spawned, because torch's threads do not survive a fork
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            sizes = list(pool.map(write, files, shards))
    weight_map = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_shard(file: Path, described: dict[str, tuple[tuple[int, ...], str]], layers: int, seed: int) -> int:
    """Writes one file of tensors, given by name as (shape, type). Returns the bytes of the tensors."""
    kinds = {name: kind for kind, name in SAFETENSORS_DTYPES.items()}
    shard = {}
    for name, (shape, dtype) in described.items():
        if name.endswith("e_score_correction_bias"):  # not zero, so that a router without it would be found
            value = torch.empty(shape).uniform_(-0.2, 0.2, generator=named_generator(seed, name))
        else:
            value = initial_tensor(name, shape, layers, seed)
        shard[name] = value.to(kinds[dtype])
    save_file(shard, file, metadata={"format": "pt"})
    as_umask_says(file)
    return sum(tensor.nbytes for tensor in shard.values())


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Reads the command line and makes the folder."""
    parser = Parser(
        prog="substrate.base.make_miniature", description="Make a miniature of the published 30B's checkpoint."
    )
    parser.add_argument("folder", type=Path, help="the folder to make")
    parser.add_argument(
        "--model", type=Path, default=Path("hydra_conf/model/nano_mini.yaml"), help="model configuration"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="of weights and tokenizer")
    parser.add_argument(
        "--processes", type=int, default=1, help="that write the shards; each holds one, 5 GB for the sizes of the 30B"
    )
    asked = parser.parse_args()
    config = ModelConfig.from_dict(yaml.safe_load(asked.model.read_text()))
    make_miniature(asked.folder, config, asked.seed, asked.processes)
    size = sum(path.stat().st_size for path in asked.folder.iterdir())
    print(
        f"{asked.folder}: {size / 1e6:.0f} MB in {NUM_SHARDS} shards; read with experiment=nano_mini cluster.weights_dir={asked.folder}"
    )


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
