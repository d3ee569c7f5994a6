"""Test that templates render as transformers renders them: its additions to Jinja, and what published templates do with Jinja."""

import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from substrate.data.chat_template import ChatTemplate
from substrate.interface.errors import DataError
from tests.support.checkpoints import CHAT, NEWER

VARIABLES = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
USER = {"role": "user", "content": '  5 < 7 & "caf\u00e9" it\'s {{ here }} \n'}
CHATS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "<think>\nmuch\n</think>\nX"}, {"role": "user", "content": "And 6?"}],
    [USER, {"role": "assistant", "content": "X"}],
]
TEMPLATES = {
    "published form": CHAT,
    "newer form": NEWER,
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "generation with white space": "{%- for m in messages -%}\n  {%- generation -%}\n {{ m.content }}\n{%- endgeneration -%}\n{%- endfor -%}",
    "set inside generation": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "break": "{% for m in messages %}{{ m.role }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "strftime_now": "{{ strftime_now('%Y-%m-%d') }} {{ strftime_now(format='%d %B %Y, %A') }}",
    "tojson": "{{ messages | tojson }} {{ messages | tojson(ensure_ascii=False, indent=2) }} {{ messages | tojson(ensure_ascii=True) }}",
    "tojson sorted": "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=True) }}",
    "raise_exception not reached": "{% if messages | length > 9 %}{{ raise_exception('too long') }}{% endif %}fine",
    "trim blocks": "{% if true %}\n  a\n  {% if true %}\nb\n  {% endif %}\n{% endif %}\nc\n",
    "no trailing line break": "{{ messages[0].content }}\n",
    "namespace": "{% set ns = namespace(last=-1) %}{% for m in messages %}{% set ns.last = loop.index0 %}{% endfor %}{{ ns.last }}",
    "macro": "{% macro turn(m) %}<{{ m.role }}>{{ m.content | trim }}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "dict": "{{ dict(a=1, b='x') | tojson }}",
    "string methods": "{{ messages[-1].content.split('</think>')[-1].lstrip('\\n').strip() }}{{ 'a' ~ 1 }}{{ 'x'.startswith('x') }}",
    "loop variables": "{% for m in messages %}{{ loop.first }}{{ loop.last }}{{ loop.previtem.role if loop.previtem else '' }}{% endfor %}",
    "reversed and sliced": "{% for m in messages[::-1] %}{{ m['role'][:2] }}{{ m.get('name', '-') }}{% endfor %}",
    "undefined": "{{ tool_choice }}{{ messages[0].tool_calls is defined }}{{ tools is none }}{{ documents is none }}",
    "thinking": "{{ enable_thinking }}{{ enable_thinking is defined }}{{ add_generation_prompt }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}",
    "HTML stays": "{{ messages[0].content }}<b>&amp;</b>",
    "carriage returns": "a\r\n{{ messages[0].role }}\r\nb",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompts", [True, False])
def test_a_template_renders_as_transformers_renders_it(name, prompts):
    template = ChatTemplate(TEMPLATES[name], VARIABLES, datetime.date.today().isoformat())
    for chat in CHATS:
        (expected,), _ = render_jinja_template(
            [chat], chat_template=TEMPLATES[name], add_generation_prompt=prompts, enable_thinking=True, **VARIABLES
        )
        assert template.render(chat, prompts) == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Roles must\nalternate') }}", "cannot be rendered: Roles must alternate; take"),
        ("{{ messages[7].content }}", "cannot be rendered: .*; take"),
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "cannot be rendered: access to attribute '__class__' .* is unsafe",
        ),
        ("{{ messages.append(1) }}", "cannot be rendered: access to attribute 'append' .* is unsafe"),
        ("{% generation %}", "is not Jinja"),
        ("{% break %}", "is not Jinja"),
    ],
)
def test_what_transformers_refuses_is_refused(template, words):
    with pytest.raises(Exception, match="."):
        render_jinja_template([CHATS[0]], chat_template=template)
    with pytest.raises(DataError, match=words):
        ChatTemplate(template, VARIABLES).render(CHATS[0], True)


def test_a_date_is_that_of_the_image():
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, "2026-02-01").render(CHATS[0], True) == "01 Feb 2026"
