"""Derives `base/tokens.json` from the files of a published checkpoint, and checks that we can train and judge in its chat form.

    python -m substrate.formats.published_tokenizer FOLDER [--out BASE] [--model FILE]

It renders the checkpoint's chat template with thinking on and looks at what it wrote: the prompt must stand in it whole
and the assistant's thinking must be open at its end. What follows an assistant's text, up to the first special token,
ends a trained answer. A completion ends at that token and at each end id that one of the files names. With `--out` it
writes tokenizer.json, chat_template.jinja and tokens.json, the three files from which `data/tokenizer.py` works.
"""

import datetime
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from substrate.data.chat_template import RENDERER, ChatTemplate, fallback
from substrate.data.special_tokens import SpecialTokens, TemplateFacts, digest
from substrate.data.tokenizer import SUFFIX, Tokenizer, num_ids, read_encoder
from substrate.formats.published_files import Named, check_model, ids_of, named_tokens, read_model, templates_of
from substrate.interface.command_line import Parser, write_text
from substrate.interface.errors import DataError, exit_code_of

TAGS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
OPEN = "<think>\n"
PROBE = "In Alice's Wonderland, numbers are secretly converted."
REPLY = "XXXVIII"
OTHER_DATE = "1987-06-05"  # differs from every later date in year, month, day and weekday
PUBLISHED = "a published Nemotron 3 tokenizer is needed"
BOTH = "take both files of one checkpoint"


class Published(NamedTuple):
    """The tokenizer of a checkpoint as the image holds it."""

    encoder: tokenizers.Tokenizer
    special: SpecialTokens
    template: str
    has_added: bool  # whether the settings name tokens that tokenizer.json lacks, so that the image's differs from it


def read(folder: Path, model: Mapping[str, Any] | None = None) -> Published:
    """Derives the facts of a folder. model: the values of hydra_conf/model, which its files must not contradict.

    Raises DataError, one sentence with the cure, for files that contradict one another or that we cannot work with.
    """
    encoder = read_encoder(folder / "tokenizer.json")
    before = len(encoder.get_added_tokens_decoder())
    named = named_tokens(folder)
    _add_declared(folder, encoder, named)
    if model is not None:
        from substrate.model import ModelConfig

        config = ModelConfig.from_dict(model)
        check_model(folder, config.to_transformers())
        if num_ids(encoder) > config.vocab_size:
            raise DataError(f"{folder} has {num_ids(encoder)} token ids, the model {config.vocab_size} rows; {BOTH}")
    ends, pad, begin = _ids(folder, encoder, named)
    found = templates_of(folder)
    text = found.text if found.text is not None else _default_form(encoder, begin)
    date = _date_in(text, named)
    template = ChatTemplate(text, named.tokens, date)
    prompt = _prompt(folder, encoder, template)
    turn_end = _turn_end(folder, encoder, template, ends)
    facts = TemplateFacts(
        found.text is not None,
        found.text is not None,
        found.source,
        digest(text),
        RENDERER if found.text is not None else None,
        found.others,
        dict(named.tokens),
        date,
    )
    special = SpecialTokens(
        begin,
        pad,
        tuple(sorted(ends | {turn_end[-1]})),
        tuple(turn_end),
        begin is not None and encoder.encode(prompt, add_special_tokens=False).ids[0] == begin,
        facts,
    )
    return Published(encoder, special, text, len(encoder.get_added_tokens_decoder()) > before)


def check(folder: Path) -> Tokenizer:
    """Returns the tokenizer of a folder. Raises as `read`."""
    found = read(folder)
    return Tokenizer(found.encoder, found.special, found.template)


def write(found: Published, folder: Path, out: Path) -> None:
    """Writes the three files into `out`; tokenizer.json byte for byte, unless the settings added tokens."""
    if found.has_added:
        write_text(out / "tokenizer.json", found.encoder.to_str(pretty=True))
    else:
        shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
    found.special.write(out, found.template)


def as_text(found: Published) -> str:
    """Returns what was found in one line."""
    special, facts = found.special, found.special.template
    begins = "begins" if special.prompt_has_begin else "does not begin"
    parts = [
        f"{num_ids(found.encoder)} token ids",
        f"a completion ends at {', '.join(map(str, special.end_ids))}",
        f"an answer ends with {', '.join(map(str, special.turn_end_ids))}",
        f"a prompt {begins} with {special.begin_id}" if special.begin_id is not None else "no begin token",
        f"{facts.source} was rendered and compared" if facts.compared else "no chat template, so nothing was compared",
    ]
    parts += [f"written with the date {facts.date}"] if facts.date else []
    parts += [f"not compared: {', '.join(facts.not_compared)}"] if facts.not_compared else []
    return "; ".join(parts)


def _add_declared(folder: Path, encoder: tokenizers.Tokenizer, named: Named) -> None:
    """Adds the tokens that transformers would add. Raises DataError for one whose id is not the declared one."""
    path = folder / "tokenizer_config.json"
    for number in sorted(named.declared):
        encoder.add_tokens([named.declared[number]])
        content = named.declared[number].content
        if encoder.token_to_id(content) != number:
            raise DataError(
                f"{path} gives {content!r} the id {number}, tokenizer.json {encoder.token_to_id(content)}; take both files "
                "of one checkpoint"
            )
    for name, content in named.tokens.items():
        if encoder.token_to_id(content) is None:
            raise DataError(
                f"{path}: {name} is {content!r}, which tokenizer.json lacks; take both files of one checkpoint"
            )
    # From here on no text splits them. Named ones keep their ids; further ones that are new get the next, as in transformers.
    encoder.add_special_tokens([*named.tokens.values(), *named.extra])


def _ids(folder: Path, encoder: tokenizers.Tokenizer, named: Named) -> tuple[set[int], int, int | None]:
    """Returns the end ids that the files name, the pad id, and the begin id or None."""
    files = ("generation_config.json", "config.json")

    def all_of(name: str) -> list[int]:
        own = encoder.token_to_id(named.tokens.get(f"{name}_token", ""))
        of_files = [(file, each) for file in files for each in ids_of(folder, file, f"{name}_token_id")]
        for file, each in of_files:
            if encoder.id_to_token(each) is None:
                raise DataError(f"{folder / file}: {name}_token_id {each} is no token of tokenizer.json; {BOTH}")
        return [each for each in (own, *(each for _, each in of_files)) if each is not None]

    ends = set(all_of("eos"))
    if not ends:
        raise DataError(
            f"{folder}: no file names a token that ends a text; give tokenizer_config.json an eos_token, or "
            "generation_config.json an eos_token_id"
        )
    begin = all_of("bos")
    return ends, [*all_of("pad"), min(ends)][0], begin[0] if begin else None


def _default_form(encoder: tokenizers.Tokenizer, begin: int | None) -> str:
    """Returns Nemotron 3's form for a checkpoint without a template; it begins as the tokenizer's own encoding does."""
    first = encoder.encode("x", add_special_tokens=True).ids[0]
    return fallback(encoder.id_to_token(first) or "" if first == begin else "", "<|im_end|>\n")


def _date_in(text: str, named: Named) -> str | None:
    """Returns today if the template's prompts show the date, else None, so that images of two days are equal."""
    today = datetime.date.today().isoformat()
    chat = [{"role": "user", "content": PROBE}]
    shown = {ChatTemplate(text, named.tokens, each).render(chat, True) for each in (OTHER_DATE, today)}
    return today if len(shown) > 1 else None


def _prompt(folder: Path, encoder: tokenizers.Tokenizer, template: ChatTemplate) -> str:
    """Returns a rendered prompt. Raises DataError if it cannot be the beginning of a trained answer."""
    rendered = template.render([{"role": "user", "content": PROBE + SUFFIX}], True)
    if rendered.count(PROBE + SUFFIX) != 1:
        raise DataError(
            f"{folder}: its chat template writes {rendered!r}, which does not hold the prompt once; {PUBLISHED}"
        )
    tags = [tag for tag in TAGS if tag in rendered or tag == "</think>"]
    if split := [tag for tag in tags if len(encoder.encode(tag, add_special_tokens=False).ids) != 1]:
        raise DataError(f"{folder}: {', '.join(split)} is more than one token; {PUBLISHED}")
    if not rendered.endswith(OPEN):
        raise DataError(
            f"{folder}: its chat template ends a prompt with {rendered.rpartition(SUFFIX)[2]!r}; it must open the "
            f"assistant's thinking with {OPEN!r} at its end: use a checkpoint whose template does"
        )
    return rendered


def _turn_end(folder: Path, encoder: tokenizers.Tokenizer, template: ChatTemplate, ends: set[int]) -> list[int]:
    """Returns the ids after an assistant's text up to the first special token. Raises DataError if there is none."""
    chat = [{"role": "user", "content": PROBE + SUFFIX}, {"role": "assistant", "content": REPLY}]
    rendered = template.render(chat, False)
    _, reply, tail = rendered.rpartition(REPLY)
    ids = encoder.encode(tail, add_special_tokens=False).ids
    added = encoder.get_added_tokens_decoder()
    last = next((place for place, token in enumerate(ids) if token in ends or token in added), None)
    if not reply or last is None:
        raise DataError(
            f"{folder}: its chat template ends an assistant's turn with {tail!r}, in which no special token is; {PUBLISHED}"
        )
    return list(ids[: last + 1])


def main() -> None:
    """Reads the command line, writes the files if a folder for them is named, and prints what was found."""
    parser = Parser(
        prog="substrate.formats.published_tokenizer", description="Find the special tokens of a published checkpoint."
    )
    parser.add_argument("folder", type=Path, help="folder of the published checkpoint, with tokenizer.json")
    parser.add_argument("--out", type=Path, help="folder that gets tokenizer.json, chat_template.jinja and tokens.json")
    parser.add_argument("--model", type=Path, help="JSON file with the values of hydra_conf/model, to compare with")
    arguments = parser.parse_args()
    found = read(arguments.folder, read_model(arguments.model) if arguments.model else None)
    if arguments.out is not None:
        write(found, arguments.folder, arguments.out)
    print(as_text(found))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
