"""`audit`: check a campaign or a bundle as an outsider, and export a bundle. The exit code is 0 if nothing is wrong, else 4."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.audit.findings import Report
from pipeline.campaign.errors import ConfigError, IntegrityError
from pipeline.campaign.heads import Anchor, anchors_in
from pipeline.campaign.layout import CODE_ROOT
from pipeline.cli.arguments import Commands, next_command


def add(commands: Commands) -> None:
    """Declare the command."""
    sub = commands.add("audit", audit_verb, "Check a campaign, or a bundle of it, from its files alone (docs/seal.md).")
    sub.add_argument(
        "path", type=Path, metavar="DIR|BUNDLE", help="The folder of a campaign, or a bundle that --export wrote."
    )
    sub.add_argument(
        "--json", action="store_true", help="Print {ok, verified, not_verifiable, findings} for a program."
    )
    add_anchor(sub)
    sub.add_argument(
        "--rescore",
        action="store_true",
        help="Make the items and score the completions again, by the image's own code.",
    )
    sub.add_argument("--reinfer", type=int, default=0, metavar="N", help="Decode N random items a family again.")
    sub.add_argument("--export", type=Path, metavar="FILE", help="Write a bundle (.zip) for somebody else to audit.")
    sub.add_argument(
        "--include",
        nargs="*",
        default=[],
        choices=("adapters", "image", "hdf5"),
        help="Put these into the bundle, too.",
    )


def add_anchor(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--anchor", action="append", default=[], metavar="TEXT|FILE",
        help="Check that a log still has an anchor that you kept (of several campaigns, the log that it names): its text (postrain-log/...), "
        "or a file that holds anchors. "
        "The option may be repeated.",
    )  # fmt: skip


def audit_verb(arguments: argparse.Namespace) -> int:
    from pipeline.audit import bundle, examine

    if arguments.include and not arguments.export:
        raise ConfigError(
            "--include has no effect without --export", "Valid: --export FILE.zip --include adapters image"
        )
    if arguments.reinfer < 0:
        raise ConfigError(f"--reinfer {arguments.reinfer} is negative", "Valid: a number of items a family, such as 20")
    if arguments.reinfer:
        from pipeline.sandbox import namespace

        os.environ["PYTHONPATH"] = str(CODE_ROOT)
        namespace.enter_private_namespace([sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]])
    with bundle.opened(arguments.path) as folder:
        report = examine.examine(folder, anchors_of(arguments.anchor), given=arguments.path)
        if arguments.rescore:
            from pipeline.audit import rescore

            run_image_check(report, "items and scores", lambda: rescore.rescore(folder, report))
        else:
            report.unknown("items and scores were not made again; --rescore does so, and runs the image's code")
        if arguments.reinfer:
            from pipeline.rounds import reinfer

            run_image_check(report, "completions", lambda: reinfer.reinfer(folder, arguments.reinfer, report))
        else:
            report.unknown("nobody checked that these adapters gave these completions; --reinfer N decodes some again")
        if arguments.export and report.ok:
            bundle.export(folder, arguments.export, arguments.include)
    quoted = shlex.quote(str(arguments.path))
    if arguments.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print_report(report, quoted, arguments)
    return 0 if report.ok else IntegrityError.exit_code


def run_image_check(report: Report, what: str, check: Callable[[], None]) -> None:
    """Run a check that uses the image's code. If the log had findings before, the check may fail on its records, which is reported."""
    try:
        check()
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        if report.ok:
            raise
        report.unknown(f"{what} were not checked to the end because of the findings ({error!r})")


def printable(text: str) -> str:
    """Escape whatever could move a terminal's cursor and so hide a finding: file names and words of the log are not trusted."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )


def anchors_of(given: list[str]) -> list[Anchor]:
    """The anchors of the command line. given: texts or paths of files. Raises ConfigError for one that holds no anchor."""
    every = []
    for text in given:
        path = Path(text)
        anchors = anchors_in(text) or (anchors_in(path.read_text(errors="replace")) if os.path.isfile(path) else [])
        if not anchors:
            raise ConfigError(
                f"{text!r} holds no anchor",
                "Valid: postrain-log/CAMPAIGN/RECORD/SHA256, or a file that holds such lines",
            )
        every += anchors
    return every


def print_report(report: Report, quoted: str, arguments: argparse.Namespace) -> None:
    """Print the report for people, and what to type next. quoted: the audited path, quoted for a shell."""
    for what in report.verified:
        print(f"verified        {printable(what)}")
    for what in report.not_verifiable:
        print(f"not verifiable  {printable(what)}")
    for finding in report.findings:
        print(f"FOUND           {printable(str(finding))}")
    print(
        f"{'ok' if report.ok else f'{len(report.findings)} findings'}; docs/seal.md says what this proves and what it does not"
    )
    if not report.ok:
        print(next_command("audit", quoted, "--json"))
    elif arguments.export:
        print(next_command("audit", shlex.quote(str(arguments.export))))
    elif not arguments.rescore:
        print(next_command("audit", quoted, "--rescore"))
    elif os.path.isfile(arguments.path):
        print(f"{next_command('evidence', 'combine', quoted, 'OTHER.zip')}    (with the bundles of other people)")
    else:
        print(next_command("audit", quoted, "--export", f"{quoted}.zip"))
