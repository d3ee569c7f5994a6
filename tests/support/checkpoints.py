"""Makes small folders in the forms that published checkpoints have: real special ids, a few thousand weights, no network."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from substrate.model import ModelConfig
from substrate.model.published import published_tensors
from tests.support.trainings import TINY, config

SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>", 12: "<think>", 13: "</think>"}
NUM_SPECIAL = 20  # ids 3 to 9 and 14 to 19 are <SPECIAL_3> and so on, as in the published file
MERGES = [("Ċ", "Ċ"), ("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("i", "n"), ("in", "g"), (">", "Ċ"), ("e", "r")]
# The published template's form: an empty system turn first, then the turns; thinking on opens a tag, off closes the pair.
CHAT = """\
{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\\n<|im_end|>\\n' }}{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' + ('<think>\\n' if enable_thinking else '<think></think>') }}
{%- endif -%}
"""

# The same prompts by what the family's newer templates do on the way: macros, namespaces, effort, tools, thinking of earlier turns.
NEWER = """\
{% macro render_extra_keys(json_dict, handled_keys) %}
    {%- if json_dict is mapping %}
        {%- for json_key in json_dict if json_key not in handled_keys %}
            {%- if json_dict[json_key] is mapping or (json_dict[json_key] is sequence and json_dict[json_key] is not string) %}
                {{- '\\n<' ~ json_key ~ '>' ~ (json_dict[json_key] | tojson | safe) ~ '</' ~ json_key ~ '>' }}
            {%- else %}
                {{- '\\n<' ~ json_key ~ '>' ~ (json_dict[json_key] | string) ~ '</' ~ json_key ~ '>' }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{% endmacro %}
{%- set enable_thinking = enable_thinking if enable_thinking is defined else True %}
{%- set low_effort = low_effort if low_effort is defined else False %}
{%- set truncate_history_thinking = truncate_history_thinking if truncate_history_thinking is defined else True %}
{%- set ns = namespace(last_user_idx = -1, system = none) %}
{%- if messages[0]["role"] == "system" %}{% set ns.system = messages[0]["content"] %}{% set loop_messages = messages[1:] %}
{%- else %}{% set loop_messages = messages %}{% endif %}
{%- for m in loop_messages %}{% if m["role"] == "user" %}{% set ns.last_user_idx = loop.index0 %}{% endif %}{% endfor %}
{{- "<|im_start|>system\\n" ~ (ns.system | default("", true)) }}
{%- if tools is iterable and tools | length > 0 %}{{ render_extra_keys(tools[0], ["name"]) }}{% endif %}
{{- "<|im_end|>\\n" }}
{%- for message in loop_messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content | default("", true) %}
        {%- if message.reasoning_content is defined and message.reasoning_content is string %}
            {%- set content = "<think>\\n" ~ message.reasoning_content ~ "\\n</think>\\n" ~ content %}
        {%- elif "<think>" not in content and "</think>" not in content %}
            {%- set content = "<think></think>" ~ content %}
        {%- endif %}
        {%- if truncate_history_thinking and loop.index0 < ns.last_user_idx and "</think>" in content %}
            {%- set content = "<think></think>" ~ content.split("</think>")[-1] %}
        {%- endif %}
        {{- "<|im_start|>assistant\\n" }}{% generation %}{{ content ~ "<|im_end|>" }}{% endgeneration %}{{ "\\n" }}
    {%- elif message.role == "user" %}
        {{- "<|im_start|>user\\n" ~ message.content }}
        {%- if loop.index0 == ns.last_user_idx and low_effort %}{{ "\\n\\n{reasoning effort: low}" }}{% endif %}
        {{- "<|im_end|>\\n" }}
    {%- else %}{{ raise_exception("unknown role " ~ message.role) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" ~ ("<think>\\n" if enable_thinking else "<think></think>") }}{% endif %}
"""


def make_folder(
    folder: Path,
    settings: Mapping[str, Any] | None = None,
    *,
    template: str | bytes | None = CHAT,
    config_json: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    begins: bool = False,
    files: Mapping[str, str] | None = None,
) -> Path:
    """A folder with the tokenizer's files. Keys of `settings` replace those of tokenizer_config.json; ... removes one.

    template: of chat_template.jinja, if there is such a file. begins: whether encoding adds a begin token.
    files: further ones, with their text.
    """
    folder.mkdir(parents=True)
    make_encoder(begins).save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>", "unk_token": "<unk>"}
    named |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 262144}
    write(folder, "tokenizer_config.json", _without({**named, **(settings or {})}))
    ids = {"model_type": "nemotron_h", "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    write(folder, "config.json", _without({**ids, **(config_json or {})}))
    ids = {"eos_token_id": [2, 11], "bos_token_id": 1, "pad_token_id": 0}
    write(folder, "generation_config.json", _without({**ids, **(generation or {})}))
    if template is not None:
        (folder / "chat_template.jinja").write_bytes(template.encode() if isinstance(template, str) else template)
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def make_encoder(begins: bool = False) -> tokenizers.Tokenizer:
    """A byte-level BPE of some hundred ids, with a few merges and the published special ids."""
    special = [SPECIAL.get(number, f"<SPECIAL_{number}>") for number in range(NUM_SPECIAL)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*special, *alphabet, *("".join(pair) for pair in MERGES)]
    encoder = tokenizers.Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, MERGES))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if begins:
        encoder.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return encoder


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def tiny_model() -> ModelConfig:
    return ModelConfig.from_dict(config("model", "tiny") | TINY | {"name": "form", "vocab_size": 64, "num_experts": 3})


def random_tensors(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Every tensor of the published checkpoint of such a model, by its published name."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in published_tensors(model).items()}


def save_shards(tensors: Mapping[str, torch.Tensor], folder: Path, number: int) -> None:
    """Writes the tensors as shards with an index, as published."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    files = [f"model-{shard + 1:05d}-of-{number:05d}.safetensors" for shard in range(number)]
    weight_map = {name: files[place * number // len(names)] for place, name in enumerate(names)}
    for file in files:
        held = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(held, folder / file, {"format": "pt"})
    write(folder, "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": weight_map})


def _without(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not ...}
