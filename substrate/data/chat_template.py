"""Renders a checkpoint's chat template as transformers' `apply_chat_template` does (compared with transformers 5.23).

    template.render([{"role": "user", "content": "..."}], add_generation_prompt=True)
    "<|im_start|>system\\n<|im_end|>\\n<|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n<think>\\n"

Beside Jinja a template has what transformers adds to it: `{% generation %}`, `{% break %}` and `{% continue %}`,
`raise_exception`, `strftime_now`, and a `tojson` that escapes neither HTML nor letters. Thinking is always on. A
template is a stranger's program: it runs in Jinja's sandbox, in a process that has nothing to lose.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from substrate.interface.errors import DataError

USER_TURN = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n"
ASSISTANT_TURN = "<|im_end|>\n<|im_start|>assistant\n<think>\n"
NO_DATE = "2025-12-15"  # the date that a template is told whose prompts do not show it
RENDERER = f"jinja2 {jinja2.__version__}"

Messages = Sequence[Mapping[str, str]]


def fallback(begin: str, turn_end: str) -> str:
    """Returns the template of a checkpoint that has none: Nemotron 3's form, for one user's turn and its answer.

    begin: text at the beginning of a sequence, such as "{{ bos_token }}"; turn_end: text after an answer.
    """
    user = f"{json.dumps(USER_TURN)} ~ messages[0].content ~ {json.dumps(ASSISTANT_TURN)}"
    return (
        f"{begin}{{{{ {user} }}}}{{% for message in messages[1:] %}}{{{{ message.content }}}}{turn_end}{{% endfor %}}\n"
    )


class ChatTemplate:
    """A compiled template with what it is told beside the messages.

    variables: texts by name, such as {"bos_token": "<s>"}. date: of `strftime_now`, YYYY-MM-DD. Raises DataError for a
    template that is not Jinja.
    """

    def __init__(self, text: str, variables: Mapping[str, str], date: str | None = None) -> None:
        moment = datetime.datetime.fromisoformat(date or NO_DATE)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": moment.strftime}
        self._variables = dict(variables)
        try:
            self._template = environment.from_string(text)
        except Exception as error:  # not of Jinja alone: `break` outside of a loop is Python's SyntaxError
            raise DataError(f"the chat template is not Jinja: {_line(error)}; take the published one again") from None

    def render(self, messages: Messages, add_generation_prompt: bool) -> str:
        """Returns the text of a chat. Raises DataError with what the template says against it."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages], tools=None, documents=None,
                add_generation_prompt=add_generation_prompt, enable_thinking=True, **self._variables,
            )  # fmt: skip
        except Exception as error:  # a template may raise what any program may
            raise DataError(
                f"the chat template cannot be rendered: {_line(error)}; take the published one again"
            ) from None


class _Generation(jinja2.ext.Extension):
    """The tag around an assistant's own text, by which transformers masks; the text itself passes."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own form

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_pass"), [], [], body).set_lineno(line)

    def _pass(self, caller: Any) -> str:
        return str(caller())


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _line(error: BaseException) -> str:
    return " ".join(f"{error}".split())[:200] or type(error).__name__
