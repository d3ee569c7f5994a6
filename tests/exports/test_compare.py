"""Test `compare`: each number is that of its campaign, what cannot be compared is said, and nothing is claimed or written."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.campaign.files import read_json_lines
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.decision import history
from pipeline.exports import compare, compare_page
from pipeline.reporting import document
from tests.support import told
from tests.support.campaigns import tree
from tests.support.decided import BEGAN, attempt, decided_campaign, start, steps, with_open_round
from tests.support.sealed import played, rechained


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two campaigns of the 30B with a board, the second with two rounds fewer, and a small one without a board and with an open round."""
    place = tmp_path_factory.mktemp("compare")
    sealed = [played(4).write(place / "first"), played(2, campaign="sealed-0002").write(place / "second")]
    return [*sealed, with_open_round(decided_campaign(place)).folder]


def compared(folders: list[Path]) -> compare.Comparison:
    return compare.compare([Campaign.at(folder) for folder in folders])


def test_each_side_has_what_its_campaign_decided(folders):
    found = compared(folders)
    for side, campaign in zip(found.sides, (played(4), played(2, campaign="sealed-0002")), strict=False):
        decisions = [each.decision for each in campaign.derived.values()]
        assert [each["kept"] for each in side["rounds"]] == [decision.kept for decision in decisions]
        assert side["standing"] == dict(decisions[-1].policy.standing)
        assert side["claims"]["claimed_in"] == [each.round for each in decisions if each.claimed]
        winner, label = decisions[-1].winner
        arm = next(each for each in plan_of(campaign, winner) if each.name == label)
        out, outcome = side["goes_out"], campaign.outcome(winner, arm, campaign.world(winner, arm))
        assert (out["round"], out["arm"]) == (winner, label)
        for item_set in ("dev", "fresh"):
            marks = "".join(outcome.outcomes[item_set].values())
            score = out["scores"][item_set]
            assert (score["accuracy"], score["items"]) == (marks.count("1") / len(marks), len(marks))
            assert score["low"] < score["accuracy"] < score["high"]
        reference = history.read_history(campaign.records).reference_score
        assert out["reference_scores"]["board"]["accuracy"] == pytest.approx(float(reference))
        attempts = [record for record in campaign.records if record["event"] == "attempt"]
        assert sum(side["gpu_hours"].values()) == pytest.approx(sum(each["gpu_seconds"] for each in attempts) / 3600)
        assert side["gpu_hours"]["failed: diverged"] == pytest.approx(100 / 3600)
    assert [each["state"] for each in found.sides[2]["rounds"]] == ["decided", "open"]


def test_families_have_their_states_with_the_rounds_in_which_they_began(tmp_path):
    folders = [told.reversal(tmp_path / "long", rounds=3, num_items=100), played(2).write(tmp_path / "short")]
    found = compared(folders)
    section = next(each for each in compare_page.sections(found) if each.title.startswith("Families"))
    decided = history.read_history(Log(Campaign.at(folders[0]).log).records()).decisions
    for family, told_of, _ in section.table[1:]:
        states = ["UNPROVEN", *(decided[name]["families"][family]["name"] for name in sorted(decided))]
        changes = [
            f"{now} from r{number:04d}"
            for number, (was, now) in enumerate(zip(states, states[1:], strict=False), start=1)
            if was != now
        ]
        assert told_of == (", ".join(changes) or "UNPROVEN"), family
    assert any(" from r0002" in row[1] for row in section.table[1:])


def plan_of(campaign, name):
    return history.read_history(campaign.records).plans[name].arms


def test_the_time_of_an_attempt_that_was_cut_short_is_a_cause_of_its_own(folders, tmp_path):
    folder = Campaign.at(played(2, campaign="sealed-0002").write(tmp_path / "second"))
    # It trained for ten steps of two seconds, 20 seconds after its claim, and its last mark came after 100 seconds.
    attempt(folder.round("r0001"), "a1", 1, BEGAN, [start(), *steps(1, 10)])
    hours = compare.compare([Campaign.at(folders[0]), folder]).sides[1]["gpu_hours"]
    assert hours.pop("cut short") == pytest.approx(2 * 100 / 3600)  # an arm has two GPUs
    assert hours == compared(folders).sides[1]["gpu_hours"]


def test_a_site_without_gpus_has_hours_of_arms_by_the_clocks_of_their_workers(folders, tmp_path):
    marked = Campaign.at(told.reversal(tmp_path / "marked", rounds=2, num_items=20))
    side = compared([folders[0], marked.folder]).sides[1]
    seconds = 0.0
    for path in marked.folder.glob("rounds/*/a*/attempt_*/phases.jsonl"):
        marks = read_json_lines(path)
        seconds += marks[-1]["at"] - marks[0]["at"]
    assert seconds and sum(side["clock_hours"].values()) == pytest.approx(seconds / 3600)
    assert side["clock_hours"].keys() >= {"anchor", "axis", "failed: diverged"}
    shown = compare_page._hours(side | {"gpu_hours": {"axis": 0.0}})
    assert shown["all"] == f"{seconds / 3600:.3f} h of arms, no GPU"
    assert compare_page._hours(side)["all"] == f"{sum(side['gpu_hours'].values()):.2f}"
    assert compare_page._hours({"gpu_hours": {"axis": 0.0}, "clock_hours": {}}) == {"all": "0.00 (no GPU was used)"}


def test_only_settings_that_differ_are_shown(folders):
    same = compared(folders[:2])
    assert same.differing == {}
    other = compared(folders[1:])
    assert other.differing["policy.proposals.kind"] == ("optuna", "none")
    assert other.differing["model.hidden_size"] == ("2688", "96")
    assert not any(len(set(values)) == 1 for values in other.differing.values())
    assert not any(key.startswith(("policy.standing", "policy.tried", "round")) for key in other.differing)
    page = document.as_text(compare_page.sections(same))
    assert "The policies are the same." in page and "All other settings are the same." in page


def test_it_says_what_cannot_be_compared_and_that_no_difference_is_a_claim(folders):
    lines = compared(folders).cannot
    for about in (
        "The models differ (",
        "The families differ (",
        "Each campaign has items of its own",
        "The external targets differ (",
        "The images differ (",
    ):
        assert any(line.startswith(about) for line in lines), about
    assert not any(
        line.startswith(("The models", "The families", "The external", "The images"))
        for line in compared(folders[:2]).cannot
    )
    head = compare_page.sections(compared(folders))[0].lines
    assert any("is no claim of the constitution. Article 7" in line for line in head)


def test_the_command_prints_json_and_a_page_and_changes_no_campaign(folders, tmp_path, capsys):
    before = [tree(folder) for folder in folders]
    words = ["compare", *map(str, folders)]
    assert main([*words, "--html", str(tmp_path / "page.html"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [side["campaign"] for side in found["campaigns"]][:2] == ["sealed-0001", "sealed-0002"]
    html = (tmp_path / "page.html").read_text()
    for side in found["campaigns"]:
        assert f'<th scope="col">{side["campaign"]}</th>' in html
    assert main(words) == 0
    assert capsys.readouterr().out.endswith(f"next: python -m pipeline report {folders[0]}\n")
    assert [tree(folder) for folder in folders] == before


def test_a_campaign_of_another_version_is_named_and_the_others_are_compared(folders, tmp_path):
    other = played(1, campaign="sealed-0003").write(tmp_path / "other")
    records = [json.loads(line) for line in (other / "log.jsonl").read_text().splitlines()]
    for record in records:
        if record["event"] == "plan":
            record["plan"]["schema"] = 2
    (other / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in rechained(records)))
    found = compared([*folders[:2], other])
    assert len(found.sides) == 2
    ((folder, why),) = found.unread
    assert folder == str(other) and "schema is 2" in why
    assert any(f"{other} was left out" in line for line in compare_page.sections(found)[0].lines)


@pytest.mark.parametrize(
    ("which", "code", "says"),
    [([0], 2, "two campaigns or more"), ([0, 0], 2, "is named twice"), ([0, 9], 2, "is not a campaign")],
)
def test_what_is_no_comparison_is_refused(folders, tmp_path, capsys, which, code, says):
    given = [folders[n] if n < 3 else tmp_path for n in which]
    assert main(["compare", *map(str, given)]) == code
    assert says in capsys.readouterr().err


def test_a_page_is_never_written_into_a_campaign(folders, capsys):
    assert main(["compare", str(folders[0]), str(folders[1]), "--html", str(folders[0] / "page.html")]) == 2
    assert "is inside the campaign" in capsys.readouterr().err and not (folders[0] / "page.html").exists()


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    [(8, 10, "0.4902", "0.9433"), (0, 20, "0.0000", "0.1611"), (150, 300, "0.4438", "0.5562")],
)
def test_intervals_are_wilsons(right, number, low, high):
    """The values are those of scipy's `proportion_ci(method="wilson")`, to four digits."""
    found = compare.share(right, number)
    assert abs(Decimal(low) - Decimal(found["low"])) < Decimal("0.0001")
    assert abs(Decimal(high) - Decimal(found["high"])) < Decimal("0.0001")


def test_a_campaign_whose_tests_close_no_value_does_not_say_that_none_was_found(folders):
    greedy, other = (dict(side) for side in compared(folders).sides[:2])
    greedy["choice"] = "max_dev"
    told = compare_page._claims(greedy)
    assert told["shown to be worse"] == told["set aside after one run"] == "closes no value (policy.choice=max_dev)"
    assert "closes" not in str(compare_page._claims(other)) and other["choice"] == "value"
