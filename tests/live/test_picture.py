"""Test the picture of a running round: its command runs, it needs no network, and its texts are those of the screen and can be read."""

import re
import xml.etree.ElementTree as ElementTree

from tests.support import example_status
from tests.support.paths import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> str:
    root = ElementTree.fromstring(svg)
    return " ".join("".join(each.itertext()).replace("\xa0", " ") for each in root.iter(f"{SVG}text"))


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_command_of_the_readme_s_picture_draws_a_running_round():
    made = example_status.picture()
    said = texts(made)
    words = (
        "is open",
        "training",
        "decoding",
        "requeued",
        "goes on from step",
        "Priority",
        "it should start at",
        "210/600",
        "left: ~",
        "vs ref",
    )
    for part in words:
        assert part in said, part
    assert "http" not in made.replace("http://www.w3.org/2000/svg", "").replace("https://www.textualize.io", "")
    kept = texts((ROOT / "docs" / "status.svg").read_text())
    renew = "python -m tests.support.example_status docs/status.svg"
    assert set(re.findall(r"[a-z]{4,}", kept)) == set(re.findall(r"[a-z]{4,}", said)), renew


def test_every_text_of_the_picture_stands_out():
    kept = (ROOT / "docs" / "status.svg").read_text()
    ground = re.search(r'<rect fill="(#[0-9a-f]{6})"', kept)
    assert ground
    for colour in set(re.findall(r"-r\d+ \{ fill: (#[0-9a-f]{6})", kept)):
        light, dark = sorted((luminance(colour), luminance(ground[1])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5 - 1e-9, colour
