"""Put a page together: of a round, of a campaign, or of the sections of a text page alone.

The order is that of a reader who was not there: the story, what was measured, how it was decided, what it cost, and everything else that the
text page says. No sentence of the text page is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.campaign.errors import NotFound, PipelineError
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Campaign, Round
from pipeline.pages import arms, glossary, hours, html, numbers, overview, story
from pipeline.pages.numbers import Records, RoundNumbers
from pipeline.pages.parts import Part, Rows, of_section, with_anchors
from pipeline.reporting import page as text_page
from pipeline.reporting.document import Section

CHANGED = "What would have changed the decision"
REFUSED = "Refusals and arms without a score"
HOW = {
    "Decision": ("These lines sum the decision up; claims are explained under [[claimed improvement]].",),
    "Plan of the round": ("This is what the round before decided for this one.",),
    "Reasons by article": (
        "These sentences are sealed with the decision. Each begins with the article that it follows from.",
    ),
    "Policy of the next round": (
        "This is what passes on to the next round: settings alone, never weights (article 8).",
    ),
    CHANGED: (
        "These lines show how near each verdict was to another one. A decision that half a point would have turned deserves less "
        "trust.",
    ),
    REFUSED: (
        "This lists what the rules refused, with the article and a code, and the arms that ended without a score.",
    ),
    "Results of the tests": (
        "`gap` is in [[points]]; `at most` is its upper bound with 95 % confidence; `detectable` is the gap that would have been "
        "found with 80 % probability; [[canary|canaries]] are cheap signs.",
    ),
    "Scores of the external target": ("A submission without a score shows why.",),
    "Forecast and actual": ("The forecast was frozen with the round, before its first arm began.",),
}
"""How to read a section of the text page, by its title."""
CAPTIONS = {
    "Results of the tests": "Families", "Scores of the external target": "Submissions", "Plan of the round": "LoRA targets",
    "Forecast and actual": "Times",
}  # fmt: skip
"""The names of their tables."""


@dataclass(frozen=True)
class Source:
    """Where a page's content comes from: the log's records, and of the campaign's files what is there."""

    records: Records
    campaign: str
    model: str
    folder: Campaign | None = None

    def round(self, name: str) -> Round | None:
        return self.folder.round(name) if self.folder else None

    def sections(self, name: str) -> dict[str, Section]:
        """The text page of a round by title. What its folder adds is left out, and said so, where its files cannot be read."""
        folder = self.round(name)
        try:
            if folder is None:
                raise NotFound("only the log was read, and not the campaign's folder")
            found = text_page.of_round(self.records, folder)
        except Exception as error:  # a file of another form, too, must not cost the page
            found = text_page.of_log(self.records, name, self.model)
            why = error.what if isinstance(error, PipelineError) else type(error).__name__
            found[0].lines.append(f"LoRA targets and the forecast are not shown: {why}.")
        return {section.title: section for section in found}


def of_round(source: Source, name: str) -> str:
    """The page of a round, as HTML. Raises NotFound where no meta stage has gathered it, and IntegrityError as `derive.derive` does."""
    rounds = numbers.rounds_of(source.records, name)
    if not rounds or rounds[-1].name != name:
        raise NotFound(f"no meta stage has gathered {name}", "`python -m pipeline status DIR` says what its arms do")
    at, sections = rounds[-1], source.sections(name)
    parts = _shared(source, rounds, sections, [_arms(source, at, sections)])
    parts += [_told(sections.pop(REFUSED)), *map(_told, sections.values())]
    return _page(source, at, f"Round {name} of {source.campaign}", parts)


def of_campaign(source: Source) -> str:
    """The page of a campaign, as HTML: of its newest gathered round, with the arms and decisions of all rounds. Raises as `of_round`."""
    rounds = numbers.rounds_of(source.records)
    if not rounds:
        raise NotFound(
            "no meta stage has gathered a round yet", "`python -m pipeline status DIR` says what the arms do"
        )
    at = rounds[-1]
    told = {each.name: source.sections(each.name) for each in rounds}
    of_arms = [_arms(source, each, told[each.name]) for each in reversed(rounds)]
    for part in of_arms[1:]:
        part.is_folded = True
    parts = [story.by_round(rounds), *_shared(source, rounds, told[at.name], of_arms)]
    parts.append(
        Part(
            "Refusals and arms without a score, by round",
            HOW[REFUSED],
            lines=[f"{name}: {line}" for name, sections in told.items() for line in sections.pop(REFUSED).lines],
        )  # fmt: skip
    )
    for name in reversed(told):
        part = Part(f"All that was told of {name}", is_folded=name != at.name)
        part.parts = [_told(section) for section in told[name].values()]
        parts.append(part)
    ended = any(record["event"] == "end" for record in source.records)
    return _page(source, at, f"Campaign {source.campaign}", parts, has_ended=ended)


def of_sections(sections: Sequence[Section]) -> str:
    """A page of sections alone, such as a comparison's: the first one's lines are its story."""
    first, *others = sections
    parts = [of_section(section) for section in others]
    if first.table:
        parts.insert(0, Part("Overview", rows=[Rows(first.title, first.table)]))
    return _render(
        first.title,
        "postrain",
        first.lines,
        parts,
        {},
        {},
        "This page follows from the files that the sealed logs name.",
    )


def _shared(
    source: Source, rounds: Sequence[RoundNumbers], sections: dict[str, Section], of_arms: Sequence[Part]
) -> list[Part]:
    """What the pages of round and campaign share. It takes the sections that it shows out of `sections`."""
    at = rounds[-1]
    evidence, board = overview.evidence(rounds), overview.board(at)
    evidence.parts.append(_told(sections.pop("Results of the tests")))
    board.parts.append(_told(sections.pop("Scores of the external target")))
    bases = [each for each in source.records if (each["event"], each.get("round")) == ("basis", at.name)]
    slices = bases[-1]["tasks"]["dev_slices"] if bases else {}
    return [
        overview.scores(rounds), overview.families(at, slices), overview.states(rounds), evidence, board, *of_arms, overview.lineage(rounds),
        hours.part(source.folder, [each.name for each in rounds]), overview.power(at), _told(sections.pop(CHANGED)), _audit(source, at),
    ]  # fmt: skip


def _arms(source: Source, at: RoundNumbers, sections: dict[str, Section]) -> Part:
    scores, agents = sections.pop("Scores of the arms"), sections.pop("Agents", None)
    return arms.part(at, scores, agents, source.round(at.name), source.records)


def _told(section: Section) -> Part:
    """A section of the text page as a part of this one."""
    how = HOW.get(section.title, HOW.get(section.title.split(" of ")[0], ()))
    return of_section(section, how, CAPTIONS.get(section.title, ""))


def _audit(source: Source, at: RoundNumbers) -> Part:
    """What a reader has to do to check the campaign: no page can say that an audit passed, because an audit runs
    after it and elsewhere."""
    name = source.folder.folder if source.folder else None
    lines = [
        "No audit is part of this page, and it claims none. Whoever has the campaign's folder runs one there: python -m pipeline "
        "audit DIR (DIR is the folder)."
    ]
    closed = source.folder.round(at.name).closed if name and source.folder else None
    try:
        if closed is not None and closed.exists():
            lines.append(
                f"When {at.name} was closed, the log's newest line was {read_json(closed)['anchor']}. A copy of "
                "this line that is kept where the campaign's owner cannot reach it shows whether the log was written anew since."
            )
    except Exception as error:
        lines.append(
            f"The log's anchor is not shown, because {at.name}'s closed.json cannot be read ({type(error).__name__})."
        )
    how = (
        "An [[audit]] derives every decision again from the [[sealed log]] and compares every file with it. That an adapter was "
        "trained as recorded, no audit can show.",
    )
    return Part("Audit", how, lines=lines)


def _page(source: Source, at: RoundNumbers, title: str, parts: list[Part], *, has_ended: bool = False) -> str:
    state = at.derived.decision.state
    about = f"postrain, autonomous post-training. {at.name} is {state}."
    foot = "This page follows from the campaign's sealed log and the files beside it. It needs no network and can be sent as it is."
    told = story.of_round(at, source.campaign, source.model, has_ended=has_ended)
    return _render(title, about, told, parts, at.history.rules.articles, glossary.TERMS, foot)


def _render(
    title: str, about: str, told: Sequence[str], parts: Sequence[Part], articles: Mapping[str, Any], terms: Mapping[str, str], foot: str
) -> str:  # fmt: skip
    with_anchors(parts, {"story", "articles", "glossary"})
    ordered = dict(sorted(articles.items(), key=lambda item: int(item[0])))
    return html.render(
        "page.html", title=title, about=about, story=told, parts=parts, articles=ordered, terms=terms, foot=foot
    )
