"""`base/tokens.json`: which ids begin, end and pad a sequence of this checkpoint, and how its chat template was found.

    {"schema": 1, "begin_id": 1, "pad_id": 0, "end_ids": [2, 11], "turn_end_ids": [11], "prompt_has_begin": false,
     "template": {"exists": true, "compared": true, "source": "chat_template.jinja", "sha256": "5f2c...",
                  "renderer": "jinja2 3.1.6", "not_compared": [], "variables": {"bos_token": "<s>"}, "date": null}}

`formats/published_tokenizer.py` derives these facts where an image of a published checkpoint is built, and
`base/make_tokenizer.py` those of the tiny one. They lie beside `tokenizer.json`, in the image: a fork that edits its
copy changes its own training, and nothing of what the pristine image judges. docs/contract.md explains every key.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from substrate.interface.command_line import parse_object, read_small, write_text
from substrate.interface.errors import DataError

FILE, TEMPLATE_FILE = "tokens.json", "chat_template.jinja"
MAX_BYTES = 2**24  # of either file; published templates have some tens of kilobytes
AGAIN = "build the image again"


@dataclass(frozen=True)
class TemplateFacts:
    """Where the chat template came from, and what was done with it."""

    exists: bool  # whether the checkpoint has one; if not, prompts have Nemotron 3's form
    compared: bool  # whether it was rendered, and what it wrote compared with what training and judging need
    source: str | None  # file of the checkpoint that holds it, with its name if there are several
    sha256: str  # of base/chat_template.jinja, from which prompts are rendered
    renderer: str | None  # library and version that rendered it for the comparison
    not_compared: tuple[str, ...] = ()  # further templates of the checkpoint, which nobody rendered
    variables: Mapping[str, str] = field(default_factory=dict)  # texts that it is told, such as bos_token
    date: str | None = None  # YYYY-MM-DD, the date of the image, if the template writes the date into its prompts


@dataclass(frozen=True)
class SpecialTokens:
    """The facts of one checkpoint. Ids are those of its tokenizer.json."""

    begin_id: int | None  # None: it has no such token
    pad_id: int
    end_ids: tuple[int, ...]  # ascending; each of them ends a completion, in every engine
    turn_end_ids: tuple[int, ...]  # what the template writes after an assistant's text, to the first end id
    prompt_has_begin: bool  # whether the template begins a prompt with begin_id
    template: TemplateFacts

    def __post_init__(self) -> None:
        """Raises ValueError for facts that contradict one another."""
        if not self.end_ids or not self.turn_end_ids or self.turn_end_ids[-1] not in self.end_ids:
            raise ValueError(f"turn_end_ids {self.turn_end_ids} must end with one of end_ids {self.end_ids}")
        if self.prompt_has_begin and self.begin_id is None:
            raise ValueError("prompt_has_begin is true, and begin_id is null")
        if self.template.compared and not (self.template.exists and self.template.renderer):
            raise ValueError("a template was compared that does not exist, or that nothing rendered")

    @classmethod
    def read(cls, folder: Path) -> tuple["SpecialTokens", str]:
        """Returns the facts in a folder, and the text of the template beside them.

        Raises DataError for a file that is missing or not of this form, and for another template than the facts name.
        """
        path = folder / FILE
        try:
            values = parse_object(read_small(path, MAX_BYTES))
            if values.pop("schema", None) != 1:
                raise ValueError("schema must be 1")
            facts = cls(
                **_typed(cls, values | {"template": TemplateFacts(**_typed(TemplateFacts, values["template"]))})
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} does not hold the facts of a tokenizer: {error}; {AGAIN}") from None
        text = read_small(folder / TEMPLATE_FILE, MAX_BYTES)
        if digest(text) != facts.template.sha256:
            raise DataError(f"{folder / TEMPLATE_FILE} is not the template that {FILE} names; {AGAIN}")
        return facts, text

    def write(self, folder: Path, template: str) -> None:
        """Writes the facts and the template into a folder."""
        write_text(folder / FILE, json.dumps({"schema": 1} | dataclasses.asdict(self), indent=1) + "\n")
        write_text(folder / TEMPLATE_FILE, template)


def digest(template: str) -> str:
    """Returns the sha256 of a template's text in UTF-8, as hex."""
    return hashlib.sha256(template.encode()).hexdigest()


def _typed(kind: Any, values: Any) -> dict[str, Any]:
    """Returns values by the fields of a dataclass. Raises ValueError for a missing, surplus or mistyped one."""
    names = [each.name for each in dataclasses.fields(kind)]
    if not isinstance(values, dict) or set(values) != set(names):
        raise ValueError(f"the keys {', '.join(names)} are needed")
    for name, value in values.items():
        if not _VALID.get(name, lambda v: v is None or isinstance(v, str))(value):
            raise ValueError(f"{name} is {value!r}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0  # `type is`, because a bool would pass for an int


_VALID: Mapping[str, Callable[[Any], bool]] = {  # of all other fields: a text or null
    "template": lambda v: isinstance(v, TemplateFacts),
    "begin_id": lambda v: v is None or _is_id(v),
    "pad_id": _is_id,
    "end_ids": lambda v: isinstance(v, list) and all(map(_is_id, v)),
    "turn_end_ids": lambda v: isinstance(v, list) and all(map(_is_id, v)),
    "not_compared": lambda v: isinstance(v, list) and all(isinstance(each, str) for each in v),
    "variables": lambda v: isinstance(v, dict) and all(isinstance(each, str) for each in v.values()),
    "sha256": lambda v: isinstance(v, str),
    **dict.fromkeys(("prompt_has_begin", "exists", "compared"), lambda v: type(v) is bool),
}
