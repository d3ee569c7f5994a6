"""Check a published checkpoint's tokenizer against the chat form that our prompts have (`data/tokenizer.py`).

    python -m substrate.formats.published_tokenizer FOLDER

Ids 0, 1 and 2 must pad, begin and end, and each tag of the chat form must be one id. If the folder has a chat template,
it must render a prompt with thinking on exactly as `Tokenizer.encode_prompt` does: otherwise a model would be trained in
one form and asked in another.
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
    """Returns the tokenizer of a folder. Raises DataError that says how it differs from what our prompts assume."""
    try:
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"{folder / 'tokenizer.json'} cannot be read: {error}; a file of the tokenizers library is needed"
        ) from None
    split = [tag for tag in TAGS if len(tokenizer.encode(tag)) != 1]
    if split:
        raise DataError(
            f"{folder}: {', '.join(split)} is more than one token; a published Nemotron 3 tokenizer is needed"
        )
    template = _template(folder)
    if template is not None:
        rendered, ours = _render(template), f"{USER_TURN}{PROBE}{SUFFIX}{ASSISTANT_TURN}"
        if rendered != ours:
            raise DataError(
                f"{folder}: its chat template writes {rendered!r}; it must write {ours!r}, as our prompts are"
            )
    found = _special(folder)
    for name, expected in (("pad", PAD_ID), ("bos", BOS_ID), ("eos", EOS_ID)):
        if (
            name in found
            and tokenizer.encode(found[name]) != [expected]
            and (name, found[name]) != ("eos", "<|im_end|>")
        ):
            raise DataError(
                f"{folder}: {name} is {found[name]!r}, ids {tokenizer.encode(found[name])}; [{expected}] is needed"
            )
    return tokenizer


def _settings(folder: Path) -> dict[str, object]:
    path = folder / "tokenizer_config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; take the published file again") from None


def _special(folder: Path) -> dict[str, str]:
    """Returns the special tokens that the folder names, such as {"bos": "<s>"}."""
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
    """Renders a user's turn and the start of the answer, thinking on, without the begin token, which the encoder adds."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "user", "content": PROBE + SUFFIX}]
    try:
        text = environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, enable_thinking=True, bos_token="", eos_token="", tools=None
        )
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template cannot be rendered: {error}; take the published one again") from None
    return text.removeprefix("<s>")


def main() -> None:
    """Reads the command line and prints what was found."""
    parser = Parser(
        prog="substrate.formats.published_tokenizer", description="Check a published tokenizer against our chat form."
    )
    parser.add_argument("folder", type=Path, help="folder of the published checkpoint, with tokenizer.json")
    tokenizer = check(parser.parse_args().folder)
    print(f"{tokenizer.vocab_size} tokens; tags, special ids and chat template match our prompts")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
