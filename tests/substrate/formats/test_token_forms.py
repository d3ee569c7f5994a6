"""Test the forms of tokenizer files that published folders have: each gives the ids that transformers gives, or a refusal with its cure."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from substrate.answers import extract, is_correct
from substrate.data.special_tokens import SpecialTokens
from substrate.data.tokenizer import SUFFIX, Tokenizer
from substrate.formats import published_tokenizer
from substrate.interface.errors import DataError
from substrate.model import ModelConfig
from tests.support.checkpoints import CHAT, NEWER, make_folder, tiny_model, write
from tests.support.paths import GOLDEN

PROMPTS = [
    "In Alice's Wonderland, numbers are secretly converted.\n\n8 -> VIII\nthe",
    "  blanks around it \n\n",
    "<think>\nthe tags</think> <|im_end|>\n <s>",
    "signs < > & \" ' {{ braces }} {% raw %} \u00e9 \u4e2d \U0001f600 \u2028",
    "",
]
MAP = {"default": CHAT, "tool_use": "{{ tools }}"}
LIST = [{"name": name, "template": text} for name, text in MAP.items()]
ADDED = {
    str(number): {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    for number, content in ((0, "<unk>"), (1, "<s>"), (2, "</s>"), (10, "<|im_start|>"), (11, "<|im_end|>"))
}  # fmt: skip


def theirs(folder: Path, prompt: str) -> list[int]:
    """The ids of the independent reference."""
    chat = [{"role": "user", "content": prompt + SUFFIX}]
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, enable_thinking=True, return_dict=False
    )


def facts_of(folder: Path) -> SpecialTokens:
    """What the image of a folder holds, after its prompts were compared with those of transformers."""
    out = folder.parent / "image"
    out.mkdir()
    published_tokenizer.write(published_tokenizer.read(folder), folder, out)
    made = Tokenizer.from_file(out / "tokenizer.json")
    for prompt in PROMPTS:
        assert made.encode_prompt(prompt) == theirs(folder, prompt)
    return made.special


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as published": ({}, {}),
    "generation_config with one end": ({"generation": {"eos_token_id": 2}}, {}),
    "generation_config without ids": ({"generation": {"eos_token_id": ..., "bos_token_id": ..., "pad_token_id": ...}}, {}),
    "config with a list of ends": ({"config_json": {"eos_token_id": [2, 11]}, "generation": {"eos_token_id": ...}}, {}),
    "config with null": ({"config_json": {"eos_token_id": None}}, {}),
    "lists everywhere": ({"generation": {"bos_token_id": [1], "pad_token_id": [0]}}, {}),
    "eos </s>": ({"settings": {"eos_token": "</s>"}, "generation": {"eos_token_id": 2}}, {}),
    "token as an object": ({"settings": {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}}}, {}),
    "pad -1": ({"settings": {"pad_token": ...}, "config_json": {"pad_token_id": -1}}, {}),
    "extra_special_tokens that are new": ({"settings": {"extra_special_tokens": ["the the", "<image>"]}}, {}),
    "additional_special_tokens as objects": ({"settings": {"additional_special_tokens": [{"content": "<SPECIAL_15>", "__type": "AddedToken"}]}}, {}),
    "the default among further templates": (
        {"template": None, "files": {"additional_chat_templates/default.jinja": CHAT, "additional_chat_templates/rag.jinja": "{{ 1 }}"}},
        {"source": "additional_chat_templates/default.jinja", "not_compared": ("additional_chat_templates/rag.jinja",)},
    ),
    "bos null": ({"settings": {"bos_token": None}}, {}),
    "bos null and no id of it": (
        {"settings": {"bos_token": None}, "config_json": {"bos_token_id": None}, "generation": {"bos_token_id": None}},
        {"begin_id": None},
    ),
    "pad missing": ({"settings": {"pad_token": ...}}, {}),
    "pad missing everywhere": (
        {"settings": {"pad_token": ...}, "config_json": {"pad_token_id": ...}, "generation": {"pad_token_id": ...}},
        {"pad_id": 2},
    ),
    "pad equal to eos": ({"settings": {"pad_token": "<|im_end|>"}}, {"pad_id": 11}),
    "extra_special_tokens as a map": ({"settings": {"extra_special_tokens": {"image_token": "<SPECIAL_14>"}}}, {}),
    "extra_special_tokens as a list": ({"settings": {"extra_special_tokens": ["<SPECIAL_14>", "<think>"]}}, {}),
    "additional_special_tokens": ({"settings": {"additional_special_tokens": ["<SPECIAL_14>"]}}, {}),
    "added_tokens_decoder": ({"settings": {"added_tokens_decoder": ADDED}}, {}),
    "begin token by the post-processor": ({"begins": True}, {}),
    "template in tokenizer_config": ({"settings": {"chat_template": CHAT}, "template": None}, {"source": "tokenizer_config.json"}),
    "template as a list": (
        {"settings": {"chat_template": LIST}, "template": None},
        {"source": "tokenizer_config.json: default", "not_compared": ("tokenizer_config.json: tool_use",)},
    ),
    "template as an object": (
        {"settings": {"chat_template": MAP}, "template": None},
        {"source": "tokenizer_config.json: default", "not_compared": ("tokenizer_config.json: tool_use",)},
    ),
    "template in both places": ({"settings": {"chat_template": CHAT}}, {}),
    "another template in tokenizer_config": (
        {"settings": {"chat_template": "{{ 1 }}"}}, {"not_compared": ("tokenizer_config.json",)}
    ),
    "newer template": ({"template": NEWER}, {}),
    "template with a begin token": ({"template": "{{ bos_token }}" + CHAT}, {"prompt_has_begin": True}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_gives_the_ids_of_transformers(tmp_path, form):
    how, differs = FORMS[form]
    found = facts_of(make_folder(tmp_path / "folder", **how))
    expected = {"begin_id": 1, "pad_id": 0, "end_ids": (2, 11), "turn_end_ids": (11,), "prompt_has_begin": False}
    expected |= {"exists": True, "compared": True, "source": "chat_template.jinja", "not_compared": ()} | differs
    for name, value in expected.items():
        assert getattr(found, name, None) == value or getattr(found.template, name, None) == value, name


def test_older_files_name_tokens_where_added_tokens_decoder_is_absent(tmp_path):
    folder = make_folder(tmp_path / "folder", {"eos_token": ...}, generation={"eos_token_id": 2})
    write(folder, "special_tokens_map.json", {"eos_token": {"content": "<SPECIAL_14>"}, "bos_token": "<s>"})
    write(folder, "added_tokens.json", {"<think>": 12})
    assert facts_of(folder).end_ids == (2, 11, 14)


def test_further_templates_in_a_folder_are_named_and_not_called_compared(tmp_path):
    folder = make_folder(tmp_path / "folder")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{% this is no template %}")
    (folder / "old.jinja").write_text("{{ 1 }}")
    found = facts_of(folder).template
    assert (found.source, found.compared) == ("chat_template.jinja", True)
    assert found.not_compared == ("additional_chat_templates/tool_use.jinja", "old.jinja")
    said = published_tokenizer.as_text(published_tokenizer.read(folder))
    assert said.endswith("not compared: additional_chat_templates/tool_use.jinja, old.jinja")


@pytest.mark.parametrize("begins", [False, True])
def test_without_a_template_prompts_have_the_known_form_and_nothing_is_called_compared(tmp_path, begins):
    """The form is that of the published template; the beginning is the business of the tokenizer's post-processor."""
    bare = make_folder(tmp_path / "bare", template=None, begins=begins)
    made, reference = published_tokenizer.check(bare), published_tokenizer.check(make_folder(tmp_path / "folder"))
    assert (made.special.template.exists, made.special.template.compared, made.special.template.source) == (
        False,
        False,
        None,
    )
    assert (made.special.end_ids, made.special.turn_end_ids) == ((2, 11), (11,))
    assert made.special.prompt_has_begin == begins
    for prompt in PROMPTS:
        assert made.encode_prompt(prompt) == [1] * begins + reference.encode_prompt(prompt)
    assert "nothing was compared" in published_tokenizer.as_text(published_tokenizer.read(bare))


def test_a_date_in_the_prompt_is_that_of_the_image(tmp_path):
    """A template that shows no date gives equal images on all days."""
    shown = CHAT.replace(
        "system\\n", "system\\n{{ strftime_now('%A, %d %B %Y') }}".replace("{{ ", "' + ").replace(" }}", " + '")
    )
    unseen = CHAT + "{% if tools %}{{ strftime_now('%Y') }}{% endif %}"
    dated = facts_of(make_folder(tmp_path / "folder", template=shown)).template
    assert dated.date == datetime.date.today().isoformat()
    assert published_tokenizer.read(make_folder(tmp_path / "unseen", template=unseen)).special.template.date is None


def test_tokens_that_only_the_settings_declare_come_into_the_image(tmp_path):
    """With the next free id, as transformers adds them; with any other, two checkpoints are mixed."""
    folder = make_folder(tmp_path / "folder")
    free = published_tokenizer.read(folder).encoder.get_vocab_size()
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "added_tokens_decoder": ADDED | {str(free): {**ADDED["0"], "content": "the t"}}
    }
    path.write_text(json.dumps(settings))
    facts_of(folder)
    assert Tokenizer.from_file(tmp_path / "image" / "tokenizer.json").encode("the the the") == [
        free,
        *theirs_of(folder, "he the"),
    ]
    settings["added_tokens_decoder"][str(free + 7)] = settings["added_tokens_decoder"].pop(str(free))
    path.write_text(json.dumps(settings))
    with pytest.raises(
        DataError, match=f"gives 'the t' the id {free + 7}, tokenizer.json {free}; take both files of one"
    ):
        published_tokenizer.read(folder)


def theirs_of(folder: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)


def test_a_tokenizer_that_cuts_or_pads_does_neither_to_a_prompt(tmp_path):
    folder = make_folder(tmp_path / "folder")
    values = json.loads((folder / "tokenizer.json").read_text())
    values["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"
    }  # fmt: skip
    write(folder, "tokenizer.json", values)
    facts_of(folder)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no end is named": (
        {"settings": {"eos_token": None}, "config_json": {"eos_token_id": ...}, "generation": {"eos_token_id": None}},
        "no file names a token that ends a text; give tokenizer_config.json an eos_token",
    ),
    "an end id beyond the tokenizer": ({"generation": {"eos_token_id": [2, 999]}}, "eos_token_id 999 is no token of .*; take both"),
    "an end id that is a text": ({"generation": {"eos_token_id": "2"}}, "eos_token_id is '2'; an id or a list of ids is needed"),
    "an end id that is true": ({"config_json": {"eos_token_id": True}}, "eos_token_id is True; an id or a list of ids"),
    "a token of another tokenizer": ({"settings": {"eos_token": "<|eot|>"}}, r"eos_token is '<\|eot\|>', which tokenizer.json lacks; take"),
    "a token that is a number": ({"settings": {"bos_token": 1}}, "bos_token is 1; a text, an object with `content` or null is needed"),
    "extra tokens as a text": ({"settings": {"extra_special_tokens": "<s>"}}, "a list or a map of tokens is needed"),
    "added_tokens_decoder as a list": ({"settings": {"added_tokens_decoder": []}}, "a map of ids to tokens is needed"),
    "an added token without content": ({"settings": {"added_tokens_decoder": {"1": {}}}}, "added_tokens_decoder.1 is {}; a text"),
    "split special tokens": ({"settings": {"split_special_tokens": True}}, "sets split_special_tokens.*; set it to false"),
    "Latin-1": ({"template": (CHAT + "{# \u00e9 #}").encode("latin-1")}, r"is not UTF-8 \(byte 0xe9 at \d+\); convert it.*iconv -f LATIN1"),
    "a byte order mark": ({"template": b"\xef\xbb\xbf" + CHAT.encode()}, "begins with a byte order mark.*; save it as UTF-8 without"),
    "a pointer": ({"template": "version https://git-lfs.github.com/spec/v1\n"}, "is a pointer of Git LFS; run `git lfs pull`"),
    "no default": (
        {"template": None, "settings": {"chat_template": {"tool_use": CHAT, "rag": CHAT}}},
        "has the chat templates .*rag and none that is the default; save the one that chats use as chat_template.jinja",
    ),
    "only a template of a processor": ({"template": None, "files": {"chat_template.json": "{}"}}, "has chat_template.json, which nobody reads"),
    "only a template in another file": (
        {"template": None, "files": {"templates/chat.jinja": CHAT}}, "has templates/chat.jinja, which nobody reads .*; save the one"
    ),
    "a template that is a number": ({"template": None, "settings": {"chat_template": 1}}, "chat_template is no text, no list"),
    "a list without names": ({"template": None, "settings": {"chat_template": [CHAT]}}, "chat_template is no text, no list"),
    "no Jinja": ({"template": "{% for %}"}, "the chat template is not Jinja: .*; take the published one again"),
    "an exception": ({"template": "{{ raise_exception('only tools') }}"}, "cannot be rendered: only tools; take the published one"),
    "an error inside": ({"template": "{{ 1 / 0 }}"}, "cannot be rendered: division by zero; take the published one again"),
    "no prompt in it": ({"template": "hello"}, "writes 'hello', which does not hold the prompt once; a published"),
    "an empty template": ({"template": ""}, "writes '', which does not hold the prompt once"),
    "no thinking": ({"template": CHAT.replace("<think>\\n", "")}, "ends a prompt with .*; it must open the assistant's thinking"),
    "another tag": ({"template": CHAT.replace("<think>", "<thinking>")}, "ends a prompt with .*<thinking>.*use a checkpoint whose"),
    "a turn without end": (
        {"template": CHAT.replace("message.content + '<|im_end|>\\n'", "message.content")},
        "ends an assistant's turn with '', in which no special token is",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_a_form_is_refused_with_its_cure(tmp_path, form):
    how, words = REFUSED[form]
    with pytest.raises(DataError, match=words) as refused:
        published_tokenizer.read(make_folder(tmp_path / "folder", **how))
    assert "\n" not in str(refused.value) and ";" in str(refused.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "", '{"a": 1, "a": 2}'])
def test_a_damaged_file_is_named(tmp_path, name, content):
    folder = make_folder(tmp_path / "folder")
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name} (is not JSON: .*; take the published file again|cannot be read: .*)"):
        published_tokenizer.read(folder)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    ],
)
def test_a_link_to_nothing_is_no_absent_file(tmp_path, name):
    """A snapshot that was copied without what its links lead to would lose a template, or an end id, in silence."""
    folder = make_folder(tmp_path / "folder")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/ab12")
    with pytest.raises(DataError, match=rf"{name}: it is a link to nothing; copy the folder with `cp -rL`"):
        published_tokenizer.read(folder)


def test_a_folder_of_templates_that_is_none_is_refused(tmp_path):
    folder = make_folder(tmp_path / "folder")
    (folder / "additional_chat_templates").symlink_to("../../nowhere")
    with pytest.raises(DataError, match="additional_chat_templates is no folder"):
        published_tokenizer.read(folder)


def test_both_templates_give_the_same_prompts_and_answers(tmp_path):
    plain = published_tokenizer.check(make_folder(tmp_path / "plain"))
    newer = published_tokenizer.check(make_folder(tmp_path / "newer", template=NEWER))
    for prompt in PROMPTS:
        assert plain.encode_prompt(prompt) == newer.encode_prompt(prompt)
    assert plain.encode_answer("the", "X") == newer.encode_answer("the", "X")


def test_an_answer_may_be_cut_before_any_end_of_thinking(tmp_path):
    """The whole text is then what the scorer reads, as the competition's does."""
    made = published_tokenizer.check(make_folder(tmp_path / "folder"))
    whole = made.encode_answer("the ten is X", "XII")
    assert whole[-1] == 11
    cut = made.encode("the first guess is \\boxed{XI}, but")
    assert "</think>" not in made.decode(cut)
    assert extract(made.decode(cut)) == "XI" and extract(made.decode(whole)) == "XII"
    assert is_correct(
        "XII", extract(made.decode([*whole, 10, *cut]))
    )  # what follows the end of the turn does not count
    assert is_correct("XII", extract(made.decode([*whole[:-1], 2, *cut])))  # nor what follows the other end


def test_the_entry_writes_the_files_and_says_what_it_found(tmp_path, capsys, monkeypatch):
    folder = make_folder(tmp_path / "folder")
    arguments = ["published_tokenizer", str(folder), "--out", str(tmp_path), "--model", str(tmp_path / "model.json")]
    monkeypatch.setattr("sys.argv", arguments)
    write(tmp_path, "model.json", vars(tiny_model()) | {"vocab_size": 284})
    published_tokenizer.main()
    assert capsys.readouterr().out == (
        "284 token ids; a completion ends at 2, 11; an answer ends with 11; a prompt does not begin with 1; "
        "chat_template.jinja was rendered and compared\n"
    )
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    write(tmp_path, "model.json", vars(tiny_model()) | {"vocab_size": 283})
    with pytest.raises(DataError, match="has 284 token ids, the model 283 rows; take both files of one checkpoint"):
        published_tokenizer.main()


def test_the_model_is_the_one_that_config_json_describes(tmp_path):
    """Sizes that are not seen in the shape of a tensor, such as the experts of a token, would change every logit in silence."""
    model = tiny_model()
    values = vars(model) | {"vocab_size": 284}
    described = ModelConfig.from_dict(values).to_transformers() | {
        "max_position_embeddings": 262144,
        "time_step_min": 0.001,
    }
    folder = make_folder(tmp_path / "folder", config_json=described)
    published_tokenizer.read(folder, values)
    for key in ("num_experts_per_tok", "routed_scaling_factor", "layer_norm_epsilon", "hidden_size"):
        write(folder, "config.json", described | {key: 7, "eos_token_id": 2})
        with pytest.raises(
            DataError, match=rf"config.json: {key} is 7, but .*; choose the configuration of this checkpoint"
        ):
            published_tokenizer.read(folder, values)


def test_the_golden_file_is_what_the_published_form_gives(tmp_path):
    """docs/contract.md explains its keys."""
    folder = make_folder(tmp_path / "folder")
    published_tokenizer.write(published_tokenizer.read(folder), folder, tmp_path)
    assert json.loads((tmp_path / "tokens.json").read_text()) == json.loads((GOLDEN / "tokens.json").read_text())
