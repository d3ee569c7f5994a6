"""`python -m pipeline evidence`: measure how far verdicts can be believed, judge scores from anywhere, compute critical values.

Of all commands only these import numpy, and only when they run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError, PipelineError
from pipeline.campaign.facts import load_constitution
from pipeline.stats.design import Design

LEAST_TO_WRITE = 1000
"""Campaigns of each null that critical values take before `init` may freeze them: the smallest level is a quantile at .4 %."""


def main(argv: list[str] | None = None) -> int:
    """Parse and run a command. An expected error becomes one sentence and an exit code."""
    try:
        arguments = parser().parse_args(argv)
        arguments.run(arguments)
        return 0
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Declare the commands and their options."""
    top = argparse.ArgumentParser(
        prog="python -m pipeline evidence",
        description="Measure how good the decision is, or judge a table of scores from anywhere.",
    )
    acts = top.add_subparsers(required=True, metavar="ACT")

    def act(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = acts.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = act("simulate", simulate_verb, "Measure false alarms, false claims and power in simulated campaigns.")
    sub.add_argument(
        "--campaigns",
        type=int,
        default=4000,
        help="campaigns of each world in the design's table; half as many of others, 2.5 times as many for claims; default 4000, 45 minutes",
    )
    sub.add_argument(
        "--real",
        type=int,
        default=0,
        help="campaigns of each null world of claims to run by the real code; default 0, and 200 take an hour and a half",
    )
    sub.add_argument("--json", action="store_true", help="print JSON in place of a table")

    sub = act("e-values", e_values_verb, "Measure E of the board test, and its product over several campaigns.")
    sub.add_argument("--campaigns", type=int, default=20_000, help="campaigns to simulate of each world; default 20000")
    sub.add_argument("--json", action="store_true", help="print JSON in place of a table")
    sub.add_argument("--design", help="another design, as of `nulls`, such as rounds=8,families=3")
    sub.add_argument(
        "--write",
        action="store_true",
        help="simulate the nulls alone, and keep what `combine` divides E by; without --design, of every design that ships",
    )

    sub = act(
        "campaigns",
        campaigns_verb,
        "Run the real plan and decision in simulated campaigns, and measure gain and regret beside four simple policies.",
    )
    sub.add_argument(
        "--campaigns",
        type=int,
        default=100,
        help="campaigns to simulate of each world and policy; default 100, five minutes",
    )
    sub.add_argument("--json", action="store_true", help="print JSON in place of a table")

    sub = act(
        "replay",
        replay_verb,
        "Judge a CSV file of scores with the columns round,dev,board[,dev_rows,board_rows]. Its first line is the reference, such as "
        "0,.79,.80; each other line is a round, such as 1,.82,.82. Leave board empty in a round that was not scored.",
    )
    sub.add_argument("file", type=Path, help="the CSV file")
    sub.add_argument(
        "--dev-rows", type=int, help="number of items of the dev set, needed if the file has no column dev_rows"
    )
    sub.add_argument(
        "--board-rows",
        type=int,
        help="number of items of the board; if you do not know it, give the lowest likely number",
    )
    sub.add_argument("--json", action="store_true", help="print JSON in place of a table")

    sub = act("nulls", nulls_verb, "Compute and show the critical values of every design that ships, or of one design.")
    sub.add_argument("--campaigns", type=int, default=5000, help="campaigns to simulate of each null; default 5000")
    where = sub.add_mutually_exclusive_group()
    where.add_argument(
        "--write",
        action="store_true",
        help=f"keep them in constitution/nulls, where `init` looks, also in place of those that ship; takes {LEAST_TO_WRITE} campaigns or more",
    )
    where.add_argument("--out", type=Path, help="write the files into this folder, where nothing reads them")
    sub.add_argument(
        "--design",
        help="one design, such as rounds=4,arms=8,families=6,dev_items=300,fresh_items=300,board_rows=0,submissions=0",
    )
    return top


def progress() -> Callable[[str], None]:
    """A function that prints a line of progress with the seconds since now."""
    began = time.monotonic()
    return lambda line: print(f"{time.monotonic() - began:5.0f} s  {line}", file=sys.stderr, flush=True)


def simulate_verb(arguments: argparse.Namespace) -> None:
    """Print the alarms of each test and the claims in every simulated world. Raises ConfigError below 20 campaigns."""
    from pipeline.stats import critical_values
    from studies import alarm_table
    from studies.claims import claim_table

    if arguments.campaigns < 20:
        raise ConfigError(f"--campaigns {arguments.campaigns} says nothing", "Valid: 20 or more")
    design = Design()
    critical = critical_values.critical_values(design)
    tell = progress()
    found = alarm_table.measure(design, critical, arguments.campaigns, tell)
    claims = claim_table.measure(arguments.campaigns * 5 // 2, arguments.real, tell)
    as_json = {"alarms": {name: seen.as_json() for name, seen in found.items()}, "claims": claims}
    show(as_json, [*alarm_table.alarm_table(found)], arguments.json)
    if not arguments.json:
        print(
            "Rates are cumulative by round 2, 3, 4 if the arm ahead on dev wins each round; it and three D-optimal ones are submitted."
        )
        for rows, explained in claim_table.explained(claims):
            print()
            show(claims, rows, as_json=False)
            print(explained)
        print("next: python -m pipeline evidence campaigns --campaigns 100")


def e_values_verb(arguments: argparse.Namespace) -> None:
    """Print the mean of E and the rates of combinations in simulated worlds. Raises ConfigError below 20 campaigns or for a wrong design."""
    from pipeline.stats import critical_values
    from studies import alarm_table

    if arguments.campaigns < 20:
        raise ConfigError(f"--campaigns {arguments.campaigns} says nothing", "Valid: 20 or more")
    tell = progress()
    if arguments.write:
        shipped = [design for design in critical_values.GRID if design.board_rows]
        for design in [design_of(arguments.design)] if arguments.design else shipped:
            tell(critical_values.file_name(design))
            write_divisor(design, alarm_table.measure_nulls(design, arguments.campaigns, tell), arguments.campaigns)
        return
    design = design_of(arguments.design) if arguments.design else Design()
    by, found = alarm_table.measure_e_values(design, arguments.campaigns, tell)
    as_json = {"divisor": str(by), "worlds": alarm_table.e_values_as_json(found)}
    show(as_json, [*alarm_table.e_value_table(found)], arguments.json)
    if not arguments.json:
        print(
            f"E is divided by {by}. Rates: the share of combinations that were above {1 / alarm_table.ALPHA} after some round. "
            "Each campaign submits as in `simulate`."
        )
        print("next: python -m pipeline evidence combine BUNDLE BUNDLE")


def write_divisor(design: Design, nulls: Mapping[str, Any], num: int) -> None:
    """Keep a design's divisor in constitution/nulls, with the digest of the code that simulated it. nulls: world -> (C, R) E."""
    from pipeline.campaign.files import write_file
    from pipeline.stats import critical_values
    from studies import alarm_table, calibrate

    path = critical_values.HERE / critical_values.E_VALUES
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"schema": 1, "designs": {}}
    content["designs"][critical_values.file_name(design)] = {
        "divisor": str(alarm_table.divisor(nulls)),
        "largest_mean": {name: f"{alarm_table.largest_mean(values):.4f}" for name, values in nulls.items()},
        "campaigns_per_null": num,
        "code_digest": calibrate.code_digest(design),
    }
    write_file(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def campaigns_verb(arguments: argparse.Namespace) -> None:
    """Print gain and regret of every policy in simulated campaigns. Raises ConfigError below 2 campaigns."""
    from studies import closed_loop, worlds

    if arguments.campaigns < 2:
        raise ConfigError(f"--campaigns {arguments.campaigns} has no interval", "Valid: 2 or more")
    tell = progress()
    rows = list(closed_loop.measure({**worlds.NULLS, **worlds.DESIGNED}, Design(), arguments.campaigns, tell))
    show(rows, closed_loop.table(rows), arguments.json)
    if not arguments.json:
        print(
            "Points of the target: the true gain of the final adapter, and its regret to the best arm of the same path."
        )
        print(
            f"Brackets hold the 95 % interval of the mean over {arguments.campaigns} campaigns (Student's t); differences are paired by campaign."
        )
        print("next: python -m pipeline evidence simulate")


def replay_verb(arguments: argparse.Namespace) -> None:
    """Print the verdicts on a table of scores. Raises NotFound or ConfigError for a table that cannot be judged."""
    from studies import replay

    found = replay.judge_table(replay.read_table(arguments.file, arguments.dev_rows, arguments.board_rows))
    header = ["round", "E", "p", "verdict", "which family", "beats the round before", "z"]
    keys = ("round", "e_value", "p_value", "verdict", "family", "beats_the_round_before", "z")
    show(found, [header, *([str(line[key]) for key in keys] for line in found["rounds"])], arguments.json)
    if not arguments.json:
        critical = found["critical"]
        print(f"alarm from E {critical['alarm']}, suspicion from {critical['suspect']}:", end=" ")
        print(f"2.5 and 10 % of {found['nulls']} campaigns in which nothing is wrong ({critical['worst_null']})")
        print(
            f"assumed: {found['dev_rows']} dev and {found['board_rows']} board rows, two equal models differ on 12 % of them"
        )
        print(
            f"next, with another number of rows: python -m pipeline evidence replay {shlex.quote(str(arguments.file))} --board-rows N"
        )


def nulls_verb(arguments: argparse.Namespace) -> None:
    """Compute and show critical values, and write a file for each design where that is asked for.

    Raises ConfigError for a design out of range and for too few campaigns: a test's level is a quantile of them, the smallest at .4 %.
    """
    from pipeline.campaign.files import write_file
    from pipeline.stats import critical_values
    from studies.calibrate import calibrate

    least, why = (LEAST_TO_WRITE, "makes no critical values to freeze") if arguments.write else (20, "says nothing")
    if arguments.campaigns < least:
        raise ConfigError(f"--campaigns {arguments.campaigns} {why}", f"Valid: {least} or more")
    folder = critical_values.HERE if arguments.write else arguments.out
    for design in [design_of(arguments.design)] if arguments.design else critical_values.GRID:
        name, began = critical_values.file_name(design), time.monotonic()
        print(name, flush=True)
        result = calibrate(design, arguments.campaigns, lambda line: print(f"  {line}", file=sys.stderr, flush=True))
        print(f"  {time.monotonic() - began:.0f} s, {arguments.campaigns} campaigns of each null", flush=True)
        for label, value in result["critical"].items():
            error = result["monte_carlo_95"].get(label)
            print(f"  {label:<18} {value:<10}" + (f" (95 %: {error})" if error else " (no board: a bound)"), flush=True)
        if folder:
            write_file(folder / name, json.dumps(result, indent=1) + "\n")
            print(f"  written to {folder / name}", flush=True)
    if arguments.write:
        print("campaigns that are frozen from now on take these values; an audit by a checkout with others names them")
    elif not folder:
        print("nothing was written; --write keeps them where `init` looks, --out FOLDER elsewhere")
    print("next: python -m pipeline evidence simulate")


def design_of(text: str) -> Design:
    """Read a design from text such as rounds=8,arms=8; what is not named has its default. Raises ConfigError for anything else."""
    valid = ",".join(f"{name}={value}" for name, value in Design().to_json().items())
    try:
        given = {name.strip(): int(value) for name, value in (part.split("=") for part in text.split(","))}
        design = Design(**{**Design().to_json(), **given})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--design {text!r} is no design ({error})", f"Valid: {valid}") from error
    smallest, most_rounds = Design(1, 3, 1, 2, 2, 0, 0).to_json(), load_constitution().num_rounds
    low = [name for name, value in design.to_json().items() if value < smallest[name]]
    if low or design.submissions > design.arms or 0 < design.board_rows < design.families:
        raise ConfigError(f"--design {text!r} is out of range", f"At least {smallest}; no more submissions than arms")
    if design.rounds > most_rounds:
        raise ConfigError(f"--design {text!r} is out of range", f"At most {most_rounds} rounds (article 4)")
    return design


def show(data: Any, rows: list[list[str]], as_json: bool) -> None:
    """Print JSON, or a plain table whose first row is its header."""
    if as_json:
        print(json.dumps(data, indent=1))
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
