"""Print the table of `make attacks`: each test marked `attack`, how it ended, and where it ran.

    @pytest.mark.attack("remount the image")    the name; the arena records what refused the attack

If no refusal shows how the attack ended (a process is gone, a claim is not believed), the mark's second argument says what the test asserts.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest


def announce(item: pytest.Item) -> None:
    """Give the item's reports its attack's name, whatever becomes of it."""
    marker = item.get_closest_marker("attack")
    if marker:
        item.user_properties.append(("attack", marker.args[0]))


def watch(item: pytest.Item) -> Iterator[None]:
    """Around a test's call: note what refused it and on which backend."""
    marker, arena = item.get_closest_marker("attack"), getattr(item, "funcargs", {}).get("arena")
    if marker is None or arena is None:
        yield
        return
    arena.refusals.clear()
    yield
    said = list(marker.args[1:]) + sorted(arena.refusals)
    item.user_properties += [("ended", ", ".join(said)), ("backend", arena.backend)]


def rows(reports: Iterable[Any]) -> list[str]:
    """A line for each attack, with the ends of all its tests; one that failed or did not run says so."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for report in reports:
        told = dict(getattr(report, "user_properties", ()))
        if "attack" not in told or (report.when != "call" and report.passed):
            continue
        row = found.setdefault(told["attack"], {"ended": {}, "backend": {}})
        if report.passed:
            row["ended"] |= dict.fromkeys(filter(None, told.get("ended", "").split(", ")))
            row["backend"][told.get("backend", "")] = None
        else:
            row["ended"]["SUCCEEDED, or its test failed" if report.failed else "not run everywhere"] = None
    lines = [f"| {name} | {', '.join(row['ended'])} | {'; '.join(row['backend'])} |" for name, row in found.items()]
    return ["| attack | ended by | on |", "|---|---|---|", *lines] if lines else []
