"""What the commands share: they declare themselves, find a campaign and its round, and print the command to type next."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError, NotFound
from pipeline.campaign.layout import ROUND, Campaign, Round

PEOPLE, JOBS = "what people type", "what jobs run"
Run = Callable[[argparse.Namespace], int | None]
"""The function of a command. It returns the exit code; None stands for 0."""


class Commands:
    """The commands of a parser, to which each module of this package adds its own.

    `groups` maps PEOPLE and JOBS to the parser of each command by its full name, such as "status" or "board push".
    """

    def __init__(
        self,
        top: argparse.ArgumentParser,
        first_word: str = "",
        groups: dict[str, dict[str, argparse.ArgumentParser]] | None = None,
    ) -> None:
        self.groups = {PEOPLE: {}, JOBS: {}} if groups is None else groups
        self._first_word = first_word
        # argparse would list all commands in one group, so `listing` shows them instead.
        hidden = None if first_word else argparse.SUPPRESS
        self._choices = top.add_subparsers(required=True, metavar="COMMAND", prog=top.prog, help=hidden)

    def add(
        self, name: str, run: Run, summary: str, *, group: str = PEOPLE, as_frozen: bool = False
    ) -> argparse.ArgumentParser:
        """Declare a command and return its parser. summary: a sentence. as_frozen: the campaign's frozen code runs the command."""
        return self._add(name, run, summary, group, as_frozen)

    def add_other(self, name: str, run: Run, summary: str, words: str) -> None:
        """Declare a command that another program carries out: it gets every word that follows, as `words`. words: their explanation."""
        # No word can begin with this character, so argparse takes none, not even --help, for an option of its own.
        sub = self._add(name, run, summary, PEOPLE, False, prefix_chars="\0", add_help=False)
        sub.set_defaults(name=name)
        sub.add_argument("words", nargs=argparse.REMAINDER, metavar="WORDS", help=words)

    def _add(
        self, name: str, run: Run, summary: str, group: str, as_frozen: bool, **options: Any
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = self._choices.add_parser(name, help=summary, description=summary, **options)
        sub.set_defaults(run=run, as_frozen=as_frozen)
        self.groups[group][self._first_word + name] = sub
        return sub

    def within(self, name: str, summary: str) -> Commands:
        """Declare the first word of commands that have two, such as `board push`. The second words are added to the result."""
        top = self._choices.add_parser(name, help=summary, description=summary)
        return Commands(top, f"{name} ", self.groups)

    @property
    def first_words(self) -> list[str]:
        return list(self._choices.choices)

    def listing(self) -> str:
        """The help text: every command with its sentence, in two groups."""
        lines = []
        for group, parsers in self.groups.items():
            lines += ["", f"{group}:"]
            for name, sub in parsers.items():
                lines += textwrap.wrap(
                    f"{name:<15} {sub.description}", 110, initial_indent="  ", subsequent_indent=" " * 18
                )
        return "\n".join(lines[1:])


def add_campaign(sub: argparse.ArgumentParser, text: str = "The folder of a campaign.") -> None:
    sub.add_argument("campaign", type=Path, metavar="DIR", help=text)


def add_round(
    sub: argparse.ArgumentParser, *, required: bool = False, default: str = "The default is the newest."
) -> None:
    text = "The name of a round, such as r0002." + ("" if required else f" {default}")
    sub.add_argument("--round", metavar="ROUND", required=required, help=text)


def add_overrides(sub: argparse.ArgumentParser, text: str) -> None:
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=text)


def add_dry_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--dry-run", action="store_true", help="Say what would be done, and do nothing.")


def add_json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="Print JSON for a program.")


def campaign_and_round(arguments: argparse.Namespace, name: str | None) -> tuple[Campaign, Round]:
    """The campaign of the arguments, and its round of that name or by default the newest frozen one.

    Raises NotFound if there is no such campaign or round, and names those that exist; ConfigError for a name that no round can have.
    """
    campaign = Campaign.at(arguments.campaign)
    if not campaign.frozen.exists():
        near = [
            path.parent for at in (campaign.folder, campaign.folder.parent) for path in sorted(at.glob("*/log.jsonl"))
        ]
        cure = (
            f"Name one of the campaigns near it: {', '.join(map(str, near))}"
            if near
            else f"`{typed('round', quoted_campaign(arguments))}` makes one there: the demo here, unless you add experiment=... cluster=..."
        )
        raise NotFound(f"{arguments.campaign} is not a campaign", cure)
    folder = round_of(campaign, name or newest_frozen(campaign))
    if not folder.plan.exists():
        raise NotFound(f"round {folder.name} is not frozen", f"Frozen: {names_of_frozen(campaign)}")
    return campaign, folder


def deciding_round(arguments: argparse.Namespace) -> tuple[Campaign, Round]:
    """As `campaign_and_round`, for commands that decide. Raises ConfigError for r0000, which has no decision."""
    campaign, folder = campaign_and_round(arguments, arguments.round)
    if folder.number == 0:
        raise ConfigError(
            "r0000 has no fresh items and is never decided: it holds the reference and the base",
            f"Valid: {', '.join(each.name for each in campaign.frozen_rounds() if each.number) or 'no round is frozen yet'}",
        )
    return campaign, folder


def round_of(campaign: Campaign, name: str) -> Round:
    """The round of that name, frozen or not. Raises ConfigError for a name that no round can have."""
    if not ROUND.fullmatch(name):
        raise ConfigError(
            f"--round {name} names no round",
            f"Valid: r and four digits, such as r0001; frozen are {names_of_frozen(campaign) or 'none'}",
        )
    return campaign.round(name)


def names_of_frozen(campaign: Campaign) -> str:
    return ", ".join(folder.name for folder in campaign.frozen_rounds())


def newest_frozen(campaign: Campaign) -> str:
    """Name of the newest frozen round, r0000 apart. Raises NotFound if there is none."""
    names = [folder.name for folder in campaign.frozen_rounds()]
    if not names or names == ["r0000"]:
        raise NotFound(
            f"{campaign.folder} has no frozen round yet", f"`{typed('round', str(campaign.folder))}` starts the first"
        )
    return names[-1]


def quoted_campaign(arguments: argparse.Namespace) -> str:
    """The campaign's folder, quoted for a shell."""
    return shlex.quote(str(arguments.campaign))


def typed(*words: str) -> str:
    """A command line of this program. words: quoted already where a shell needs that."""
    return " ".join(("python -m pipeline", *words))


def jobs_of(submitted: Mapping[str, Any]) -> str:
    """The job ids of a submitted round, in words. submitted: the content of its `submitted.json`."""
    return f"arrays {', '.join(submitted['array_job_ids'])}; meta job {submitted['meta_job_id']}"


def next_command(*words: str) -> str:
    """The last line that a command prints: which command to type next."""
    return f"next: {typed(*words)}"


def told_next(refusal: str, following: str, found: str = "") -> None:
    """Print the end of a check: what `round` refuses, if it does, and the next command. found: what the check itself found."""
    refused = f"`round` refuses it on this machine: {refusal}" if refusal else ""
    if told := ", but ".join(filter(None, (found, refused))):
        print(told)
    print(f"{following}    (once that is mended)" if refusal else following)


def next_round_command(arguments: argparse.Namespace) -> str:
    """The last line of a command about a closed round: the next round, or the audit where the campaign has ended.

    Where the newest round was begun and is open, as an undecided one is, it is `status`, which says what that round needs: `round` refuses it.
    """
    name, campaign = quoted_campaign(arguments), Campaign.at(arguments.campaign)
    if campaign.has_ended:
        return f"the campaign has ended, so no round follows; {next_command('audit', name, '--rescore')}"
    newest = max(campaign.frozen_rounds(), key=lambda folder: folder.number, default=None)
    if newest and not newest.closed.exists() and (newest.submitted.exists() or newest.evidence.exists()):
        return f"{newest.name} is open; {next_command('status', name)}    (what it needs, and the command that goes on)"
    return next_command("round", name)
