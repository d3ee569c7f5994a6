"""What the commands share: how one is declared, how a campaign and a round are found, and how a command says what to type next."""

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
"""What a command does. It returns the exit code; None is 0."""


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
        # argparse would list all commands in one heap: `listing` shows them instead.
        hidden = None if first_word else argparse.SUPPRESS
        self._choices = top.add_subparsers(required=True, metavar="COMMAND", prog=top.prog, help=hidden)

    def add(
        self, name: str, run: Run, summary: str, *, group: str = PEOPLE, as_frozen: bool = False
    ) -> argparse.ArgumentParser:
        """Declare a command. summary: a sentence. as_frozen: the code that the campaign was frozen with runs it."""
        sub: argparse.ArgumentParser = self._choices.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run, as_frozen=as_frozen)
        self.groups[group][self._first_word + name] = sub
        return sub

    def within(self, name: str, summary: str) -> Commands:
        """Declare a command of two words, of which `name` is the first; what is added to the result is the second."""
        top = self._choices.add_parser(name, help=summary, description=summary)
        return Commands(top, f"{name} ", self.groups)

    def listing(self) -> str:
        """Every command with its sentence, in two groups."""
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


def found(arguments: argparse.Namespace, name: str | None) -> tuple[Campaign, Round]:
    """The campaign and its round of that name, or the newest frozen one.

    Raises NotFound with what there is, ConfigError for a name that no round can have.
    """
    campaign = Campaign.at(arguments.campaign)
    if not campaign.frozen.exists():
        near = [
            path.parent for at in (campaign.folder, campaign.folder.parent) for path in sorted(at.glob("*/log.jsonl"))
        ]
        cure = f"There: {', '.join(map(str, near))}" if near else f"`{typed('round', shown(arguments))}` makes one"
        raise NotFound(f"{arguments.campaign} is not a campaign", cure)
    folder = round_of(campaign, name or newest_frozen(campaign))
    if not folder.plan.exists():
        raise NotFound(f"round {folder.name} is not frozen", f"Frozen: {names_of_frozen(campaign)}")
    return campaign, folder


def round_of(campaign: Campaign, name: str) -> Round:
    """The round of that name. Raises ConfigError, with what is valid and which there are, for a name that no round can have."""
    if not ROUND.fullmatch(name):
        raise ConfigError(
            f"--round {name} names no round",
            f"Valid: r and four digits, such as r0001; frozen are {names_of_frozen(campaign) or 'none'}",
        )
    return campaign.round(name)


def names_of_frozen(campaign: Campaign) -> str:
    return ", ".join(folder.name for folder in campaign.frozen_rounds())


def newest_frozen(campaign: Campaign) -> str:
    """Name of the newest round that has a plan. Raises NotFound before the first."""
    names = [folder.name for folder in campaign.frozen_rounds()]
    if not names or names == ["r0000"]:
        raise NotFound(
            f"{campaign.folder} has no frozen round yet", f"`{typed('round', str(campaign.folder))}` starts one"
        )
    return names[-1]


def shown(arguments: argparse.Namespace) -> str:
    """The campaign's folder as one types it in a shell."""
    return shlex.quote(str(arguments.campaign))


def typed(*words: str) -> str:
    """A command of ours as one types it. words: quoted where a shell needs that."""
    return " ".join(("python -m pipeline", *words))


def jobs_of(submitted: Mapping[str, Any]) -> str:
    """The jobs of a round that was given to Slurm, in words."""
    return f"arrays {', '.join(submitted['array_job_ids'])}; meta job {submitted['meta_job_id']}"


def following(*words: str) -> str:
    """What a command ends with: the command to type next."""
    return f"next: {typed(*words)}"
