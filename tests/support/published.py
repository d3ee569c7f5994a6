"""Make a folder like a site's published checkpoint: the tiny base in its published form, with the tags of its chat."""

import json
import shutil
from pathlib import Path

import tokenizers

from tests.support.paths import ROOT

BASE = ROOT / "substrate" / "base"
TAGS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}{{ '<|im_start|>system\\n<|im_end|>\\n' }}{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n<think>' + ('\\n' if enable_thinking else '</think>') }}
{%- endif -%}
"""


def published_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copyfile(BASE / "model.safetensors", folder / "model.safetensors")
    encoder = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json"))
    encoder.add_special_tokens(TAGS)
    encoder.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
