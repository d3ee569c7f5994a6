"""What the small files beside published weights say about special tokens and chat templates, in all forms that they have.

    tokenizer_config.json, special_tokens_map.json      names of special tokens and, in older folders, the chat template
    config.json, generation_config.json                 ids that begin, end and pad
    chat_template.jinja, additional_chat_templates/     the template, and further ones by name

Where two files disagree, that one counts which transformers 5 reads. What this module cannot read is refused in one
sentence that names the file and the cure.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from substrate.interface.command_line import open_plain, parse_object, read_small
from substrate.interface.errors import DataError, UsageError

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
MAX_BYTES = 16 * 2**20  # added tokens of a large vocabulary take some megabytes
MAX_MODEL_BYTES = 2**20  # of the file behind --model, which has some kilobytes
# Of these keys of config.json the campaign decides, or they change no weight and no logit.
OWN = {"architectures", "chunk_size", "dtype", "max_position_embeddings", "tie_word_embeddings", "time_step_min"}
AGAIN = "take the published file again"


@dataclass(frozen=True)
class Named:
    """What the settings of a tokenizer name."""

    tokens: Mapping[str, str]  # such as {"bos_token": "<s>"}; a token that is null or missing has no entry
    declared: Mapping[int, AddedToken]  # added tokens and their ids, which tokenizer.json should have too
    extra: tuple[str, ...]  # further special tokens


@dataclass(frozen=True)
class Templates:
    """The chat templates of a folder."""

    text: str | None  # that which chats use; None if there is none at all
    source: str | None
    others: tuple[str, ...]  # where further ones are, which chats do not use


def settings_of(folder: Path, name: str) -> dict[str, Any]:
    """Returns the object of a JSON file; an empty one if the file is absent. Raises DataError for other content."""
    path = folder / name
    if not os.path.lexists(path):
        return {}
    try:
        return parse_object(text_of(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; {AGAIN}") from None


def read_model(path: Path) -> dict[str, Any]:
    """Returns a model's values from a file of hydra_conf/model, a campaign's config.yaml, or JSON. Raises DataError, UsageError."""
    import yaml

    text = read_small(path, MAX_MODEL_BYTES)
    try:
        try:
            model = json.loads(text)  # YAML 1.1 takes JSON's 1e-05 for a word
        except ValueError:
            model = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}; a file of hydra_conf/model is needed"
        ) from None
    model = model.get("model", model) if isinstance(model, dict) else model  # config.yaml has the key `model`
    if not isinstance(model, dict) or not all(isinstance(key, str) for key in model):
        raise UsageError(f"{path} is not a mapping of names; a file of hydra_conf/model is needed")
    return model


def text_of(path: Path) -> str:
    """Returns the text of a small file. Raises DataError if it is a pointer, is not UTF-8, or begins with a mark."""
    with open_plain(path) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DataError(f"{path} has more than {MAX_BYTES} bytes, which no such file needs; {AGAIN}")
    if content.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a pointer of Git LFS; run `git lfs pull` in its repository")
    if content.startswith(b"\xef\xbb\xbf"):
        raise DataError(f"{path} begins with a byte order mark, which would go into the text; save it as UTF-8 without")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {content[error.start]:#04x} at {error.start}); convert it, if it is Latin-1 with "
            f"`iconv -f LATIN1 -t UTF-8`"
        ) from None


def named_tokens(folder: Path) -> Named:
    """Reads the names of special tokens. Raises DataError for a form that no published folder has."""
    path = folder / "tokenizer_config.json"
    values = settings_of(folder, path.name)
    if values.get("split_special_tokens"):
        raise DataError(f"{path} sets split_special_tokens, so that no tag would be one token; set it to false")
    declared = {}
    if "added_tokens_decoder" in values:
        entries = _mapping(path, "added_tokens_decoder", values["added_tokens_decoder"])
        for number, each in entries.items():
            if not number.isdecimal() or not isinstance(each, dict):
                raise DataError(
                    f"{path}: added_tokens_decoder holds {number!r}; ids with their tokens are needed; {AGAIN}"
                )
            declared[int(number)] = _added(path, f"added_tokens_decoder.{number}", each)
    else:  # transformers reads these older files only then, and then they count
        values |= settings_of(folder, "special_tokens_map.json")
        for content, number in settings_of(folder, "added_tokens.json").items():
            if type(number) is not int:
                raise DataError(f"{folder / 'added_tokens.json'}: {content!r} has the id {number!r}; {AGAIN}")
            declared[number] = AddedToken(content, special=content.startswith("<"), normalized=False)
    tokens = {name: _content(path, name, values[name]) for name in NAMES if values.get(name) is not None}
    name = "extra_special_tokens" if values.get("extra_special_tokens") else "additional_special_tokens"
    extra = values.get(name) or []
    if not isinstance(extra, list | dict):
        raise DataError(f"{path}: {name} is {extra!r}; a list or a map of tokens is needed; {AGAIN}")
    each_of = extra.values() if isinstance(extra, dict) else extra
    return Named(tokens, declared, tuple(_content(path, name, each) for each in each_of))


def check_model(folder: Path, expected: Mapping[str, Any]) -> None:
    """Raises DataError if config.json contradicts the model's configuration, given as the same file would have it."""
    values = settings_of(folder, "config.json")
    for key in sorted(set(values) & set(expected) - OWN):
        if values[key] != expected[key]:
            raise DataError(
                f"{folder / 'config.json'}: {key} is {values[key]!r}, but {expected[key]!r} in the model's configuration; choose "
                "the configuration of this checkpoint (hydra_conf/model)"
            )


def ids_of(folder: Path, name: str, key: str) -> list[int]:
    """Returns the ids of a key such as `eos_token_id`: a number, a list, or none (null, -1, missing). Raises DataError."""
    value = settings_of(folder, name).get(key)
    ids = value if isinstance(value, list) else [] if value in (None, -1) else [value]
    if not all(type(each) is int and each >= 0 for each in ids):
        raise DataError(f"{folder / name}: {key} is {value!r}; an id or a list of ids is needed; {AGAIN}")
    return list(ids)


def templates_of(folder: Path) -> Templates:
    """Finds the chat template: files come before entries of the settings. Raises DataError if none is the default."""
    inside = _inside(
        folder / "tokenizer_config.json", settings_of(folder, "tokenizer_config.json").get("chat_template")
    )
    more = folder / MORE_TEMPLATES
    if os.path.lexists(more) and not more.is_dir():
        raise DataError(f"{more} is no folder, so that its templates cannot be read; {AGAIN}")
    beside = {TEMPLATE: folder / TEMPLATE} if os.path.lexists(folder / TEMPLATE) else {}
    beside |= {f"{MORE_TEMPLATES}/{each.name}": each for each in sorted(more.glob("*.jinja"))}
    unread = {
        each.relative_to(folder).as_posix() for pattern in ("*.jinja", "*/*.jinja") for each in folder.glob(pattern)
    }
    unread |= {each for each in ("chat_template.json",) if os.path.lexists(folder / each)}
    found = {name: text_of(path) for name, path in beside.items()} or inside
    if not found and unread:
        raise DataError(
            f"{folder} has {', '.join(sorted(unread))}, which nobody reads as a chat template; save the one that chats use as {TEMPLATE}"
        )
    if not found:
        return Templates(None, None, ())
    defaults = (f"{MORE_TEMPLATES}/default.jinja", TEMPLATE, _named("default"), _named(None))
    default = next((name for name in defaults if name in found), None)
    if default is None:
        raise DataError(
            f"{folder} has the chat templates {', '.join(found)} and none that is the default; save the one that chats "
            f"use as {TEMPLATE}"
        )
    others = {name for name, text in {**inside, **found}.items() if name != default and text != found[default]}
    return Templates(found[default], default, tuple(sorted((others | unread) - {default})))


def _inside(path: Path, value: Any) -> dict[str, str]:
    """Returns the templates of tokenizer_config.json by where they stand; its default has the plain name."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {_named(None): value}
    if isinstance(value, list) and all(isinstance(each, dict) and {"name", "template"} <= set(each) for each in value):
        value = {each["name"]: each["template"] for each in value}
    if not isinstance(value, dict) or not all(isinstance(each, str) for pair in value.items() for each in pair):
        raise DataError(f"{path}: chat_template is no text, no list of name and template, and no map; {AGAIN}")
    return {_named(name): text for name, text in value.items()}


def _named(name: str | None) -> str:
    return "tokenizer_config.json" if name is None else f"tokenizer_config.json: {name}"


def _content(path: Path, name: str, value: Any) -> str:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise DataError(f"{path}: {name} is {value!r}; a text, an object with `content` or null is needed; {AGAIN}")
    return content


def _added(path: Path, name: str, value: dict[str, Any]) -> AddedToken:
    content = _content(path, name, value)
    flags = {
        key: bool(value[key]) for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in value
    }
    return AddedToken(content, **flags)


def _mapping(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path}: {name} is {value!r}; a map of ids to tokens is needed; {AGAIN}")
    return value
