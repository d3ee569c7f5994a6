"""Check the files of `hydra_conf/cluster/` before Hydra reads them: people write these by hand, and YAML takes some values for others.

`account: 0123` is the number 83 to YAML, `qos: on` is true, and `time_limit_minutes: 4:00:00` is 14400. sbatch would be given these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.facts import parse_yaml

WORDS = (
    "account",
    "constraint",
    "gpu_type",
    "gres",
    "partition",
    "qos",
    "reservation",
    "mem",
    "mem_per_cpu",
    "mem_per_gpu",
)
ROLES = ("worker", "reference", "judge", "agent", "meta")
UNQUOTED_TIME = re.compile(r"\b([\w-]+): +([1-9]\d*(?::[0-5]?\d)+) *(?:[,}#]|$)", re.MULTILINE)


def check(source: Path) -> None:
    """Raise ConfigError for a file of a site that is no UTF-8 or no YAML, or in which YAML reads a word or a time as a number.

    source: the folder of the configuration.
    """
    for path in sorted((source / "cluster").glob("*.yaml")):
        try:
            text = path.read_text(encoding="utf-8")
            content = parse_yaml(text)
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start})", "Save it as UTF-8"
            ) from error
        except Exception as error:
            if not type(error).__module__.startswith("yaml"):
                raise
            sentence = " ".join(str(error).split())
            raise ConfigError(
                f"{path} is not YAML: {sentence}", "Mend the line that it names; quote a value with [ { : or #"
            ) from error
        if found := UNQUOTED_TIME.search(text):
            raise ConfigError(
                f"{path} has {found[1]}: {found[2]}, which YAML reads as a number to the base of 60",
                f'Put the time into quotes: "{found[2]}"',
            )
        for key, value in _words(content):
            raise ConfigError(
                f"{path} has {key}, which YAML reads as {value!r} and not as a word",
                f'Put its value into quotes: {key}: "..."',
            )


def _words(content: Any) -> Iterator[tuple[str, Any]]:
    """The keys that name something, with values that are no text."""
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        if key in WORDS and value is not None and not isinstance(value, str):
            yield str(key), value
        elif key in ROLES:
            yield from _words(value)
