"""`image build|verify|show`: work with the substrate image by hand. Facts go to stdout as JSON, the next command to stderr."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from pipeline.campaign.errors import ConfigError
from pipeline.cli.arguments import Commands, add_overrides, next_command

DEFAULT = Path("build/image/substrate.sqsh")


def add(commands: Commands) -> None:
    """Declare the command."""
    sub = commands.add("image", image_verb, "Build, verify or show the image that every trial forks.")
    sub.add_argument("act", choices=("build", "verify", "show"), help="What to do.")
    sub.add_argument(
        "path", type=Path, nargs="?", default=DEFAULT, metavar="FILE",
        help="The image. The default is build/image/substrate.sqsh.",
    )  # fmt: skip
    add_overrides(sub, "Hydra overrides that choose the training puzzles, such as tasks=full; for `build` alone.")


def image_verb(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from pipeline.config import settings
    from pipeline.rounds.init import build_image
    from pipeline.sandbox import image

    if "=" in arguments.path.name:  # the first word may be an override, because FILE has a default
        arguments.overrides.insert(0, str(arguments.path))
        arguments.path = DEFAULT
    if arguments.overrides and arguments.act != "build":
        raise ConfigError(
            f"`image {arguments.act}` takes no overrides, now came {' '.join(arguments.overrides)}",
            "Valid: a FILE alone",
        )
    if arguments.act == "build":
        info = build_image(settings.compose(arguments.overrides), arguments.path)
    elif arguments.act == "verify":
        info = image.verify(arguments.path, image.show(arguments.path).tree_digest)
    else:
        info = image.show(arguments.path)
    print(json.dumps({"path": str(arguments.path), **asdict(info)}, indent=1))
    done = {"build": "built", "verify": "verified: its bytes and its content are what the manifest says"}
    if arguments.act in done:
        print(f"{arguments.path} is {done[arguments.act]}", file=sys.stderr)
    verify = ("image", "verify", shlex.quote(str(arguments.path)))
    words = ("round", "runs/NAME", "--dry-run") if arguments.act == "verify" else verify
    print(next_command(*words), file=sys.stderr)
