"""Hostile proposals for the gate, each with the code of its refusal, and the campaign that they are made to."""

import json
from typing import Any

from pipeline.campaign import facts
from pipeline.campaign.records import Axis, Policy
from pipeline.decision import proposal_gate

RULES = facts.load_constitution()
OPEN = RULES.articles["2"]["keys"]
POLICY = Policy(
    standing=(("recipe.lora.rank", "16"),),
    axes=(
        Axis("learning_rate", "recipe.learning_rate", "log", "0.001", "0.016"),
        Axis("lora_rank", "recipe.lora.rank", "choice", choices=("8", "32")),
        Axis("clip_norm", "recipe.clip_norm", "log", "0.1", "4"),
    ),
    retired=("clip_norm",),
    dead_ends=(("recipe.learning_rate", "0.002"), ("recipe.trace_style", "short")),
)
REFERENCE = {
    **{key: rule["low"] if rule["type"] != "choice" else rule["choices"][0] for key, rule in OPEN.items()},
    "recipe.learning_rate": "4e-3",  # as Python writes some floats
}
ABSENT = "recipe.options.clip"
del REFERENCE[ABSENT]
AXIS_OF = {axis.key: axis.name for axis in POLICY.axes}


def proposal(**changes: Any) -> dict[str, Any]:
    legal = {
        "axis": "learning_rate",
        "key": "recipe.learning_rate",
        "value": "0.003",
        "hypothesis": "slower is steadier",
    }
    return {**legal, **changes}


def answer(*proposals: Any) -> bytes:
    return json.dumps({"proposals": list(proposals)}).encode()


WHOLE = {
    "too_large": [b"x" * (proposal_gate.MAX_BYTES + 1), answer(proposal(value="1" * 10_000_000))],
    "not_utf8": [b"\xff", b'{"proposals": []}'.decode().encode("utf-16"), b"\xed\xa0\x80"],
    "too_deep": [b"[" * 9, b"[" * 60_000, b'{"a":' * 9 + b"1" + b"}" * 9],
    "not_json": [
        b"no",
        b"{",
        b'{"proposals": []} {}',
        b"\xef\xbb\xbf{}",
        b"{'proposals': []}",
        b'{"proposals": [,]}',
        b"```json\n{}\n```",
        b'{"proposals": []} // so',
        b'"' + b'\\"' * 30_000,
    ],
    "duplicate_key": [
        b'{"proposals": [], "proposals": []}',
        b'{"proposals": [{"key": "a", "key": "b"}]}',
        b'{"a": 1, "\\u0061": 2}',
    ],
    "not_finite": [b'{"proposals": NaN}', b"[Infinity]", b"-Infinity"],
    "no_content": [b"", b" \n\t"],
    "wrong_shape": [
        b"{}",
        b"[]",
        b"null",
        b'"proposals"',
        b'{"proposals": {}}',
        b'{"proposals": [], "z": "0"}',
        b'{"Proposals": []}',
        b"1e999999999",
    ],
    "too_many": [answer(*[proposal()] * 8), answer(*range(9000))],
}
NUMBERS = (
    "1e-3",
    "+0.1",
    "0.1 ",
    " 0.1",
    "0x10",
    "007",
    "00.1",
    "NaN",
    "nan",
    "Infinity",
    "-inf",
    "1_000",
    ".5",
    "5.",
    "1,5",
    "--1",
    "1/2",
    "",
    "0b1",
    "1e0",
    "1E-3",
    "true",
    "null",
    "0.1;rm -rf /",
    "$(id)",
    "`id`",
    "0.0000000000001",
    "1" * 13,
    "-",
    "0.-1",
)
FULL_WIDTH = "".join(chr(ord(letter) + 0xFEE0) for letter in "0.003")
HOSTILE: dict[str, list[Any]] = {
    "wrong_shape": [None, 1, "learning_rate", [], [proposal()]],
    "missing_field": [
        {},
        {"axis": "a"},
        {name: "x" for name in ("axis", "key", "value")},
        {"Value": "1", **{n: "x" for n in ("axis", "key")}},
    ],
    "unknown_field": [proposal(_target_="os.system"), proposal(seed="1"), proposal(z="0"), proposal(**{"ⅴalue": "1"})],
    "wrong_type": [
        proposal(value=each) for each in (8, 0.003, True, None, ["0.003"], {"_target_": "os.system"}, 10**400)
    ]
    + [proposal(key=["recipe.learning_rate"]), proposal(axis=1), proposal(hypothesis=None)],
    "not_plain": [
        proposal(value=FULL_WIDTH),
        proposal(value="٠.٠٠٣"),
        proposal(value="0.003\n"),
        proposal(value="0\u200b.003"),
        proposal(value="0.003\u202e"),
        proposal(value="−0.1"),
        proposal(value="0" * 97),
        proposal(value="\ud800"),
        proposal(value="9" * 60_000),
        proposal(key="recipe.lеarning_rate"),
        proposal(key="recipe․learning_rate"),
        proposal(key="recipe.learning_rate\u0000"),
        proposal(key="recipe.learning_rate "),
        proposal(key=""),
        proposal(key="../../etc/passwd"),
        proposal(key="recipe[learning_rate]"),
        proposal(key="a" * 81),
        proposal(axis="lеarning_rate"),
        proposal(axis="ﬁt"),
        proposal(axis="a\u0301"),
        proposal(axis=""),
    ],
    "bad_text": [
        proposal(hypothesis=text)
        for text in (
            "x" * 401,
            "a\nb",
            "\x1b[2J",
            "a\u202eb",
            "a\u200bb",
            "\ud83d",
            "a\u2028b",
            "\U000e0041",
            "\ufeff",
            "\x7f",
        )
    ],
    "instantiation": [
        proposal(key=key)
        for key in (
            "_target_",
            "recipe._target_",
            "recipe.lora._args_.x",
            "hydra.run.dir",
            "defaults",
            "recipe._partial_",
        )
    ],
    "resolver": [
        proposal(value=value) for value in ("${oc.env:HOME}", "${seed}", "0.1${x}", "{{x}}", "${hydra:runtime.cwd}")
    ],
    "budget": [
        proposal(key=key)
        for key in (
            "recipe.num_steps",
            "recipe.batch_size",
            "recipe.micro_batch_tokens",
            "recipe.sequence_length",
            "tasks.num_dev_per_family",
            "tasks.max_new_tokens",
            "campaign.rounds",
            "cluster.time_limit_minutes",
            "parallelism.dp",
            "budget_gpu_hours",
            "submissions",
        )
    ],
    "threshold": [
        proposal(key=key)
        for key in (
            "z",
            "articles.7.z",
            "quorum",
            "scored_arms",
            "critical.gap_level",
            "gap_level",
            "constitution.digest",
            "threshold",
            "nulls.x",
            "arm_level",
            "replicates_in_first_round",
        )
    ],
    "closed_key": [
        proposal(key=key)
        for key in (
            "recipe",
            "recipe.lora",
            "recipe.method",
            "tasks.level",
            "seed",
            "policy.standing",
            "recipe.Learning_rate",
            "RECIPE.learning_rate",
            "recipe.learning_rate.x",
            "recipe.mix",
            "recipe..learning_rate",
            "model.weights",
            "recipe.lora.dropout",
            "__class__",
        )
    ],
    "absent_key": [proposal(axis="clip", key=ABSENT, value="0.2")],
    "wrong_axis": [
        proposal(axis="lora_rank"),
        proposal(axis="rate"),
        proposal(axis="Learning_rate"),
        proposal(axis="learning_rate", key="recipe.lora.alpha", value="8"),
        proposal(axis="9", key="recipe.lora.alpha", value="8"),
        proposal(axis="a.b", key="recipe.lora.alpha", value="8"),
    ],
    "not_a_choice": [
        proposal(axis="style", key="recipe.trace_style", value=value)
        for value in ("Short", "short ", "", "none", "stepwise,short", "0")
    ],
    "not_a_number": [proposal(value=value) for value in NUMBERS]
    + [proposal(axis="lora_rank", key="recipe.lora.rank", value=value) for value in ("8.5", *NUMBERS)],
    "out_of_range": [proposal(value=value) for value in ("0", "-0", "-0.003", "0.051", "0.00000999", "1000000")]
    + [proposal(axis="lora_rank", key="recipe.lora.rank", value=value) for value in ("0", "33", "-8", "99999")],
    "unchanged": [
        proposal(value="0.004"),
        proposal(value="0.00400"),
        proposal(axis="lora_rank", key="recipe.lora.rank", value="16"),
    ],
    "retired": [proposal(axis="clip_norm", key="recipe.clip_norm", value="0.5")],
    "dead_end": [proposal(value="0.002"), proposal(value="0.0020000")],
}
