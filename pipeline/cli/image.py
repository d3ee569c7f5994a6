"""`image build|verify|show`: the substrate image by hand. Its facts are JSON on stdout; what to type next goes to stderr."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

Verb = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]


def add(verb: Verb) -> None:
    """Declare the command. verb: makes a sub-parser from name, function and text."""
    sub = verb("image", image_verb, "Build, verify or show the substrate image.")
    sub.add_argument("act", choices=("build", "verify", "show"))
    sub.add_argument("path", type=Path, nargs="?", default=Path("build/image/substrate.sqsh"))
    sub.add_argument("overrides", nargs="*", help="build: Hydra overrides that choose the training puzzles (tasks=...)")


def image_verb(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from pipeline.config import settings
    from pipeline.rounds.init import build_image
    from pipeline.sandbox import image

    if arguments.act == "build":
        info = build_image(settings.compose(arguments.overrides), arguments.path)
    elif arguments.act == "verify":
        info = image.verify(arguments.path, image.show(arguments.path).tree_digest)
    else:
        info = image.show(arguments.path)
    print(json.dumps({"path": str(arguments.path), **asdict(info)}, indent=1))
    said = {"build": "built", "verify": "verified: its bytes and its content are what the manifest says"}
    if arguments.act in said:
        print(f"{arguments.path} is {said[arguments.act]}", file=sys.stderr)
    verified = arguments.act == "verify"
    following = "round runs/NAME --dry-run" if verified else f"image verify {shlex.quote(str(arguments.path))}"
    print(f"next: python -m pipeline {following}", file=sys.stderr)
