"""The tokenizer of a published checkpoint, checked against the chat form that our entries write (`tokenizer.py`).

    python -m substrate.published_tokenizer FOLDER

Its ids 0, 1 and 2 pad, begin and end; each tag of the chat form is one id; and its chat template, where the folder has
one, renders a prompt with thinking on exactly as `Tokenizer.encode_prompt` does: a template that was changed upstream
would train one form and ask another.
"""

import json
import sys
from pathlib import Path

from substrate.data.tokenizer import ASSISTANT_TURN, BOS_ID, EOS_ID, PAD_ID, SUFFIX, USER_TURN, Tokenizer
from substrate.interface.command_line import Parser
from substrate.interface.errors import DataError, exit_code_of

TAGS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
PROBE = "In Alice's Wonderland, numbers are secretly converted."


def check(folder: Path) -> Tokenizer:
    """The tokenizer of a folder. Raises DataError saying what differs from what our prompts assume."""
    try:
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
    split = [tag for tag in TAGS if len(tokenizer.encode(tag)) != 1]
    if split:
        raise DataError(
            f"{folder}: {', '.join(split)} is more than one token; a published Nemotron 3 tokenizer is needed"
        )
    template = _template(folder)
    if template is not None:
        rendered, ours = _render(template), f"{USER_TURN}{PROBE}{SUFFIX}{ASSISTANT_TURN}"
        if rendered != ours:
            raise DataError(f"{folder}: its chat template writes {rendered!r}, our prompts are {ours!r}")
    found = _special(folder)
    for name, expected in (("pad", PAD_ID), ("bos", BOS_ID), ("eos", EOS_ID)):
        if name in found and tokenizer.encode(found[name]) != [expected]:
            raise DataError(
                f"{folder}: {name} is {found[name]!r}, ids {tokenizer.encode(found[name])}; [{expected}] is needed"
            )
    return tokenizer


def _settings(folder: Path) -> dict[str, object]:
    path = folder / "tokenizer_config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def _special(folder: Path) -> dict[str, str]:
    """{"bos": "<s>", ...}, as far as the folder says; a token may stand as text or as an object."""
    found = {}
    for name in ("pad", "bos", "eos"):
        value = _settings(folder).get(f"{name}_token")
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = _settings(folder).get("chat_template")
    return template if isinstance(template, str) else None


def _render(template: str) -> str:
    """A user's turn and the start of the answer, thinking on; a begin token in front is the encoder's business."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "user", "content": PROBE + SUFFIX}]
    try:
        text = environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, enable_thinking=True, bos_token="", eos_token="", tools=None
        )
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template cannot be rendered: {error}") from None
    return text.removeprefix("<s>")


def main() -> None:
    """Reads the command line; says what was found."""
    parser = Parser(
        prog="substrate.published_tokenizer", description="Check a published tokenizer against our chat form."
    )
    parser.add_argument("folder", type=Path)
    tokenizer = check(parser.parse_args().folder)
    print(f"{tokenizer.vocab_size} tokens; tags, special ids and chat template are those of our prompts")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
