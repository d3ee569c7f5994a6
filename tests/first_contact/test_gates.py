"""Test the walk through the gates: order, stops, what is kept, and that each gate can fail and then names its cure."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.campaign.errors import ConfigError, PipelineError
from pipeline.campaign.facts import load_constitution
from pipeline.campaign.layout import Campaign
from pipeline.cluster import doctor, site_check
from pipeline.config import settings
from pipeline.first_contact import checkpoint_gates, forward_pass, gates
from pipeline.first_contact.visit import PROBE_ITEMS, Visit, paths_of
from pipeline.rounds import arms, init
from tests.support.published import published_folder

TOKENS = [1, 300, 301, 302]
SMOKE = ["experiment=smoke", "parallelism.tp=1", "parallelism.judge_tp=1"]


def a_visit(tmp_path: Path, *overrides: str, **given: Path) -> Visit:
    return Visit(Campaign.at(tmp_path / "mine"), [*SMOKE, *overrides], say=lambda line: None, **given)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Gates that answer at once: gate -> verdict, good where nothing is said. `asked` holds the gates that looked, in order."""
    said: dict[str, str] = {"asked": ""}

    def gate_of(real: gates.Gate) -> gates.Gate:
        def look(visit: Visit) -> site_check.Check:
            said["asked"] += f"{real.name} "
            return site_check.Check(real.name, said.get(real.name, "good"), "found", "cure")

        return gates.Gate(real.name, real.question, lambda visit: "nothing", look)

    monkeypatch.setattr(gates, "GATES", tuple(map(gate_of, gates.GATES)))
    return said


def test_gates_are_passed_in_order_up_to_the_one_that_is_asked_for(tmp_path: Path, answers: dict[str, str]) -> None:
    assert [each.gate for each in gates.walk(a_visit(tmp_path), "image")] == [
        "site",
        "checkpoint",
        "tokenizer",
        "image",
    ]
    assert answers["asked"] == "site checkpoint tokenizer image "


def test_a_bad_gate_stops_the_walk_and_the_next_walk_goes_on_there(tmp_path: Path, answers: dict[str, str]) -> None:
    answers["tokenizer"] = "bad"
    assert [each.verdict for each in gates.walk(a_visit(tmp_path), "items")] == ["good", "good", "bad"]
    answers["asked"], answers["tokenizer"] = "", "good"
    passed = list(gates.walk(a_visit(tmp_path), "image"))
    assert answers["asked"] == "tokenizer image "
    assert [each.is_new for each in passed] == [False, False, True, True]


def test_an_unknown_gate_does_not_stop(tmp_path: Path, answers: dict[str, str]) -> None:
    answers["checkpoint"] = "unknown"
    assert [each.verdict for each in gates.walk(a_visit(tmp_path), "tokenizer")] == ["good", "unknown", "good"]


@pytest.mark.parametrize("change", ["overrides", "site", "code", "file", "again", "damaged"])
def test_what_was_passed_holds_only_for_the_same_configuration_code_and_files(
    tmp_path: Path, answers: dict[str, str], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """site: the person edits the site's file as a cure says, and types the same words again."""
    stored = tmp_path / "stored.jsonl"
    stored.write_text("x")
    first = a_visit(tmp_path, log_probs=stored)
    assert len(list(gates.walk(first, "image"))) == 4
    second = a_visit(tmp_path, *(["seed=7"] if change == "overrides" else []), log_probs=stored)
    if change == "site":
        cluster = replace(second.chosen.cluster, scratch_dir="/large")
        vars(second)["chosen"] = replace(second.chosen, cluster=cluster)
    if change == "code":
        monkeypatch.setattr(gates, "_code", lambda: [stored])
    if change == "file":
        stored.write_text("other")
    if change == "damaged":
        (first.folder / "gates.json").write_text('{"key": "')
    answers["asked"] = ""
    assert all(each.is_new for each in gates.walk(second, "image", again=change == "again"))
    assert answers["asked"] == "site checkpoint tokenizer image "


def test_two_first_contacts_do_not_work_in_one_folder(tmp_path: Path, answers: dict[str, str]) -> None:
    walk = gates.walk(a_visit(tmp_path), "image")
    next(walk)
    with pytest.raises(ConfigError, match="first-contact"):
        next(gates.walk(a_visit(tmp_path), "image"))


def test_the_probe_is_small_and_else_what_the_person_configured(tmp_path: Path) -> None:
    visit = a_visit(tmp_path, "recipe.num_steps=600", "recipe.warmup_steps=50", "tasks.num_train_per_family=4000", "recipe=grpo",
                    "recipe.batch_size=64", "recipe.options.sft_steps=80")  # fmt: skip
    small = Visit(visit.probe, visit.probe_overrides).chosen
    assert (small.recipe.num_steps, small.recipe.warmup_steps, small.recipe.options["sft_steps"]) == (10, 1, 5)
    assert small.tasks.num_train_per_family <= 10 * small.recipe.batch_size
    assert len(small.tasks.families) * small.tasks.num_dev_per_family >= PROBE_ITEMS
    same = ("model", "parallelism", "cluster")
    assert all(getattr(small, name) == getattr(visit.chosen, name) for name in same)
    assert small.recipe.learning_rate == visit.chosen.recipe.learning_rate


WARMUP = "{name: warmup, key: recipe.warmup_steps, kind: int, low: '10', high: '90'}"


def test_axes_are_checked_for_the_recipe_as_it_is_and_the_probe_has_none(tmp_path: Path) -> None:
    """A range of whole steps does not contain the probe's one step of warm-up, and need not."""
    chosen = settings.compose(SMOKE)
    others = [
        f"{{name: {axis.name}, key: {axis.key}, kind: {axis.kind}, low: '{axis.low}', high: '{axis.high}', "
        f"choices: [{','.join(axis.choices)}]}}"
        for axis in chosen.policy.axes
    ]
    axes = f"policy.axes=[{','.join([*others, WARMUP])}]"
    visit = a_visit(tmp_path, "recipe.num_steps=200", "recipe.warmup_steps=30", axes)
    rules = load_constitution()
    arms.check_axes(visit.chosen, rules)
    small = settings.compose(visit.probe_overrides)
    assert (small.recipe.warmup_steps, small.policy.axes) == (1, [])
    init.check_can_be_planned(small, rules, is_draft=False, is_probe=True)
    with pytest.raises(ConfigError, match="policy.axes has 0 axes"):
        init.check_can_be_planned(small, rules, is_draft=False)
    wrong = a_visit(tmp_path, axes, "recipe.warmup_steps=5")
    (found,) = [each for each in gates.walk(wrong, "image") if each.verdict == "bad"]
    assert found.gate == "image" and "the reference has recipe.warmup_steps = 5" in found.found


def test_site_is_bad_with_the_cure_of_the_first_bad_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [site_check.Check("disk", "good", "x"), site_check.Check("fuse", "bad", "closed", "chmod it"),
              site_check.Check("locks", "bad", "none", "move")]  # fmt: skip
    monkeypatch.setattr(doctor, "examine", lambda chosen, **_: checks)
    found = checkpoint_gates.site(a_visit(tmp_path))
    assert (found.verdict, found.cure) == ("bad", "chmod it")
    assert "fuse: closed" in found.found and "1 more" in found.found


def test_image_is_bad_with_the_sentence_of_what_is_refused(tmp_path: Path) -> None:
    (found,) = [each for each in gates.walk(a_visit(tmp_path, "policy.rounds=99"), "image") if each.verdict == "bad"]
    assert found.gate == "image"
    assert "policy.rounds = 99" in found.found and found.cure


@pytest.mark.slow
def test_checkpoint_and_tokenizer_are_bad_with_the_file_and_the_cure(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    published = a_visit(tmp_path, "model.weights=base/weights.json", f"cluster.weights_dir={folder}")

    def said(gate: Callable[[Visit], site_check.Check]) -> str:
        with pytest.raises(PipelineError) as refused:
            gate(published)
        assert refused.value.cure
        return str(refused.value)

    assert "is not a folder" in said(checkpoint_gates.checkpoint)
    published_folder(folder)
    assert "tensors" in checkpoint_gates.checkpoint(published).found
    assert "token ids" in checkpoint_gates.tokenizer(published).found
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|nothing|>"}')
    assert "<|nothing|>" in said(checkpoint_gates.tokenizer)
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])  # a copy that was cut short
    assert weights.name in said(checkpoint_gates.checkpoint)


def test_a_wrong_gate_is_refused_with_the_valid_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["first-contact", str(tmp_path / "mine"), *SMOKE, "--until", "moon"]) == 2
    assert ", ".join(gates.NAMES) in capsys.readouterr().err


def test_a_dry_run_says_what_each_gate_takes_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["first-contact", str(tmp_path / "mine"), *SMOKE, "--until", "arm", "--dry-run", "--json"]) == 0
    assert [row["gate"] for row in json.loads(capsys.readouterr().out)] == list(gates.NAMES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "said"), [
    (["mine", "policy.rounds=99"], "policy.rounds = 99"),
    (["mine", "experiment=nano_mini"], "cluster.weights_dir is empty"),
    (["experiment=nano_mini", "seed=1"], "the folder of the campaign comes first"),
])  # fmt: skip
def test_a_dry_run_refuses_what_the_gates_would_refuse_later(
    tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["first-contact", *words, "--dry-run"]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_names_the_command_that_it_stands_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "mine")
    assert main(["first-contact", folder, *SMOKE, "--until", "steps", "--dry-run"]) == 0
    assert capsys.readouterr().err.endswith(f"pipeline first-contact {folder} {' '.join(SMOKE)} --until steps\n")


def test_a_dry_run_says_that_the_checkpoint_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=nano_mini", "cluster.weights_dir=/no/such"]
    assert main(["first-contact", str(tmp_path / "mine"), *words, "--dry-run"]) == 0
    *_, told, following = capsys.readouterr().err.splitlines()
    assert "here the gates would stop: cluster.weights_dir = /no/such is not a folder" in told
    assert following.startswith("next: ") and following.endswith("(once that is mended)")


def test_digests_are_compared_with_a_list(tmp_path: Path) -> None:
    given, digests = tmp_path / "list", {"a": "0" * 64, "b": "1" * 64}
    given.write_text(f"{'0' * 64}  a\n{'1' * 64} *./b\n{'2' * 64}  other\n")
    assert checkpoint_gates.compare_digests(given, digests) == 2
    for text, said in (
        (f"{'3' * 64}  b\n", "b has sha256"),
        ("nonsense\n", "has the line"),
        (f"{'2' * 64}  other\n", "names none of"),
    ):
        given.write_text(text)
        with pytest.raises(Exception, match=said):
            checkpoint_gates.compare_digests(given, digests)
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint_gates.compare_digests(tmp_path / "absent", digests)


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"tokens": [1, 2]}', '{"tokens": [1, 2], "log_probs": [0.5]}', '{"tokens": [1, 2], "log_probs": []}',
             '{"tokens": [1, 2.5], "log_probs": [-1]}', '{"tokens": 3, "log_probs": 4}']
)  # fmt: skip
def test_stored_rows_that_are_none_are_refused_by_their_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "stored"
    path.write_text('{"tokens": [1, 2], "log_probs": [-0.5]}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        forward_pass.read_stored(path)


def answer_of(tmp_path: Path, rows: list[list[float]], nats: float = 2.0) -> Path:
    folder = tmp_path / "answer"
    folder.mkdir(exist_ok=True)
    (folder / "log_probs.jsonl").write_text("".join(json.dumps({"log_probs": row}) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"tokens": 3, "nats_per_token": nats, "guessing": 11.78}))
    return folder


@pytest.mark.parametrize(("moved", "dtype", "verdict"), [
    (0.0005, "float32", "good"), (0.002, "float32", "bad"), (0.09, "bfloat16", "good"), (0.11, "bfloat16", "bad"), (4.0, "bfloat16", "bad"),
])  # fmt: skip
def test_the_mean_difference_decides(tmp_path: Path, moved: float, dtype: str, verdict: str) -> None:
    stored = [{"tokens": [1, 2, 3], "log_probs": [-1.0, -2.0]}, {"tokens": [4, 5], "log_probs": [-3.0]}]
    answer = answer_of(tmp_path, [[-1.0 - moved, -2.0 + moved], [-3.0 - moved]])
    found = forward_pass.compare(answer, stored, dtype)
    assert found.verdict == verdict and bool(found.cure) == (verdict == "bad")


def test_one_wrong_token_is_named(tmp_path: Path) -> None:
    stored = [{"tokens": [1, 2, 3], "log_probs": [-1.0, -2.0]}]
    assert "line 1, token 2" in forward_pass.compare(answer_of(tmp_path, [[-1.0, -9.0]]), stored, "bfloat16").found


def test_without_stored_rows_a_guessing_model_is_unknown(tmp_path: Path) -> None:
    assert forward_pass.compare(answer_of(tmp_path, [[-1.0]], nats=2.5), None, "bfloat16").verdict == "good"
    found = forward_pass.compare(answer_of(tmp_path, [[-1.0]], nats=11.7), None, "bfloat16")
    assert found.verdict == "unknown" and "--log-probs" in found.cure


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_site_passes_all_gates_and_each_gate_on_the_node_can_fail(tmp_path: Path) -> None:
    """The tiny model on this machine, whole. Before each node's gate something is broken, and mended when the gate has named it."""
    stored = tmp_path / "stored.jsonl"
    stored.write_text(json.dumps({"tokens": TOKENS, "log_probs": [-0.1, -0.1, -0.1]}) + "\n")
    visit = a_visit(tmp_path, log_probs=stored)
    *good, last = gates.walk(visit, "arm")
    assert [each.verdict for each in good] == ["good"] * 4
    assert (last.gate, last.verdict) == ("forward", "bad") and "checkpoint" in last.cure

    theirs = json.loads((paths_of(visit.probe)[1] / "log_probs.jsonl").read_text())["log_probs"]
    stored.write_text(json.dumps({"tokens": TOKENS, "log_probs": theirs}) + "\n")
    assert [each.verdict for each in gates.walk(visit, "forward")] == ["good"] * 5

    visit.say = killing("r0000/a0: train_start")
    *_, last = gates.walk(visit, "steps")
    assert (last.gate, last.verdict) == ("steps", "bad") and "0 of 10 steps" in last.found and "Read " in last.cure

    visit.say = killing("r0000/a0: generate_start")
    *_, steps, last = gates.walk(visit, "items")
    assert (steps.gate, steps.verdict) == ("steps", "good") and "10 steps" in steps.found
    assert "; kernels on CPU: scan torch" in steps.found
    assert (last.gate, last.verdict) == ("items", "bad") and "judge.log" in last.cure

    visit.say = killing("r0000/a0: check")
    *_, items, last = gates.walk(visit, "arm")
    assert items.gate == "items" and items.verdict in ("good", "unknown")
    assert (last.gate, last.verdict) == ("arm", "bad") and "no score" in last.found

    visit.say = lambda line: None
    *_, last = gates.walk(visit, "arm")
    assert (last.gate, last.verdict) == ("arm", "good")
    assert visit.campaign.round("r0000").published("a0").exists()


def killing(word: str) -> Callable[[str], None]:
    """A `say` that kills the worker as soon as it is told that a phase began."""

    def say(line: str) -> None:
        if line.strip() == word:
            subprocess.run(["pkill", "-KILL", "-P", str(os.getpid()), "-f", "pipeline worker"], check=True)

    return say
