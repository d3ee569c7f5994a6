"""Say in our words what Hydra and OmegaConf refuse: which key, what came, what is valid, and the nearest name.

Their own sentences name Python classes (`AnyNode is not a ListConfig`), and advise what would not help here. This module gets their errors
and imports neither library. What is valid follows from the types in schema.py.

The files of `hydra_conf/cluster/` are checked before Hydra reads them: people write these by hand, and YAML takes some values for others.
`account: 0123` is the number 83 to YAML, `qos: on` is true, and `time_limit_minutes: 4:00:00` is 14400. sbatch would be given these.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pipeline.campaign.errors import ConfigError
from pipeline.campaign.facts import parse_yaml
from pipeline.config import credentials
from pipeline.config.schema import Settings

NOT_TOP = (
    "arm",
    "reasons",
    "round",
    "sampling",
)  # set by the pipeline, by a multirun, and by experiment and recipe together
HIDDEN = "policy.proposals."  # a value there may be a credential in the wrong place
NOT_SHOWN = "..."
SCALARS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "one text",
}
SITE_WORDS = (
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
SITE_ROLES = ("worker", "reference", "judge", "agent", "meta")
UNQUOTED_TIME = re.compile(r"\b([\w-]+): +([1-9]\d*(?::[0-5]?\d)+) *(?:[,}#]|$)", re.MULTILINE)


def of_omegaconf(error: Exception, values: Any, source: Path) -> ConfigError:
    """The error of a configuration with an unknown key, or a value of another type. values: the configuration, or the part with the key."""
    key = re.sub(r"\[\d+\]", "", str(getattr(error, "full_key", None) or ""))
    name = type(error).__name__
    if name in ("ConfigKeyError", "ConfigAttributeError") and key:
        return unknown(key, source)
    if name == "MissingMandatoryValue" or not key:
        missing = re.search(r"missing mandatory value: ([\w.]+)", str(error))
        if missing:
            named = key or missing[1]
            return ConfigError(f"{named} has no value", f"Valid: {form_of(named) or 'a value'}")
        return ConfigError(one_line(error), "The files in hydra_conf/ explain every key and its values")
    if name.startswith("Interpolation"):
        said = one_line(error).partition(" full_key")[0]
        return ConfigError(f"{key}: {said}", "Valid: ${GROUP.KEY} of a setting that there is, or a value")
    came = NOT_SHOWN if key.startswith(HIDDEN) else credentials.printable(credentials.masked(str(_value(values, key))))
    return ConfigError(
        f"{key} = {came or 'nothing'}", f"Valid: {form_of(key) or 'what the files in hydra_conf/ say of it'}"
    )


def of_hydra(error: Exception, overrides: Iterable[str], source: Path, known: Iterable[str]) -> ConfigError:
    """The error of overrides that Hydra refuses. known: every key that the configuration without them has."""
    text = one_line(error)
    if missing := re.match(r"Could not override '([^']+)'", text):
        if ".sbatch." in missing[1]:
            return ConfigError(
                f"{missing[1]} is not set yet",
                f"Write +{missing[1]}=..., because sbatch's flags have no keys beforehand",
            )
        return unknown(missing[1], source, known)
    if missing := re.search(r"Could not find '([\w-]+)/([^']+)'", text):
        group, option = missing.groups()
        while (
            "/" in option and (source / group / option).parent.is_dir()
        ):  # a group inside of a group, such as policy/axes
            inner, option = option.split("/", 1)
            group = f"{group}/{inner}"
        if group == "round":
            return ConfigError(f"there is no round {option}", "A round is known once the one before it is decided")
        if not (source / group).is_dir():
            return unknown(group, source)
        options = sorted(path.stem for path in (source / group).glob("*.yaml"))
        near = difflib.get_close_matches(option, options, n=1, cutoff=0.5)
        meant = f"Did you mean {group}={near[0]}? " if near else ""
        return ConfigError(
            f"there is no file hydra_conf/{group}/{option}.yaml for {group}={option}",
            f"{meant}Valid: {', '.join(options)}",
        )
    if unresolved := re.search(r"Error resolving interpolation '(.+?)', possible interpolation keys: (.*)", text):
        present = re.findall(r"[\w/]+", unresolved[2])
        absent = [name for name in re.findall(r"\$\{(\w+)\}", unresolved[1]) if name not in present]
        return ConfigError(f"{', '.join(absent)} has no value", f"Valid: {form_of(absent[0]) or 'the name of a file'}")
    if merging := re.match(r"Error merging override \+*([\w.]+)=", text):
        came = (
            f"{merging[1]}={NOT_SHOWN}"
            if merging[1].startswith(HIDDEN)
            else text.removeprefix("Error merging override ")
        )
        return ConfigError(came, f"Valid: {form_of(merging[1]) or 'another type'}")
    if "Ambiguous value" in text or "group override must be" in text:
        for item in overrides:
            key, _, value = item.lstrip("+").partition("=")
            if "Ambiguous value" in text and f"'{item}'" in str(error):
                whole = f"{key}='{value}'"
                quoted = shlex.quote(whole) if re.search(r"[\"$`\\]", value) else f'"{whole}"'
                quoted = f'"{key}={NOT_SHOWN}"' if key.startswith(HIDDEN) else quoted
                return ConfigError(f"{shown(item)}: a comma separates values of a sweep", f"As one text: {quoted}")
            if "group override" in text and (source / key).is_dir() and re.fullmatch(r"[\d.]+", value):
                return ConfigError(
                    f"{item}: a group takes the name of a file", f"Valid: a file of hydra_conf/{key}/ without .yaml"
                )
    if "override_grammar" in text:
        read = re.search(r"Error parsing override '(.*?)'", text)
        item = shown(read[1]) if read else " ".join(map(shown, overrides))
        return ConfigError(
            f"{item} cannot be read as KEY=VALUE",
            "Put a value with blanks, commas, equal signs or brackets into quotes: \"KEY='VALUE'\"",
        )
    sentence = text.partition("Config search path:")[0].rstrip()
    return ConfigError(
        sentence, "hydra_conf/ has every group and option; `python -m pipeline round --help` explains overrides"
    )


def shown(override: str) -> str:
    """An override as it may be printed: without a value that could be a credential in the wrong place."""
    key, sign, _ = override.partition("=")
    return f"{key}{sign}{NOT_SHOWN}" if key.lstrip("+~").startswith(HIDDEN) else credentials.masked(override)


def unknown(key: str, source: Path, known: Iterable[str] = ()) -> ConfigError:
    """The error of a key that there is not. Near keys are named, and of a misspelled group or part all that are valid."""
    first, _, rest = key.partition(".")
    if form_of(key):
        group = key.rpartition(".")[0]
        others = [each for each in known if each.startswith(f"{group}.") and each != key]
        if near := difflib.get_close_matches(
            key, others, n=3, cutoff=0.9
        ):  # names that the schema leaves free, such as those of recipe.mix
            return ConfigError(f"there is no setting {key}", f"Similar settings: {', '.join(near)}")
        return ConfigError(
            f"{key} is a setting, but the chosen files do not set it",
            f"Choose a file of hydra_conf/{first}/ that has it, or write +{key}=...",
        )
    groups = [path.name for path in source.iterdir() if path.is_dir()]
    top = sorted({*(each.name for each in fields(Settings)), *groups} - set(NOT_TOP))
    near = difflib.get_close_matches(key, known or keys_of(Settings), n=3, cutoff=0.5) if rest else []
    if first not in top:
        named = difflib.get_close_matches(first, top, n=1, cutoff=0.5)
        corrected = [f"{named[0]}.{rest}"] if named and rest and form_of(f"{named[0]}.{rest}") else named
        near = list(dict.fromkeys([*corrected, *near]))
    similar = f"Similar settings: {', '.join(near)}. " if near else ""
    valid = (
        top
        if first not in top
        else sorted(key_of.split(".")[1] for key_of in keys_of(Settings) if key_of.startswith(f"{first}."))
    )
    if first not in top:
        return ConfigError(f"there is no setting {key}", f"{similar}Valid at the top: {', '.join(valid)}")
    return ConfigError(
        f"there is no setting {key}", similar.rstrip(". ") or f"Valid in {first}: {', '.join(dict.fromkeys(valid))}"
    )


def form_of(key: str) -> str | None:
    """What a value of a dotted key looks like, by its type; None for a key that the schema does not have."""
    kind: Any = Settings
    for name in key.split("."):
        if is_dataclass(kind):
            kind = get_type_hints(kind).get(name)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return None
    if key.rpartition(".")[2] == "time_limit_minutes":
        return 'whole minutes, or a time in quotes as sbatch reads it, such as 240, "4:00:00" or "1-12:00:00"'
    if get_origin(kind) is list:
        example = shlex.quote(f'{key}=["..."]')
        return f"a list in brackets, also of one entry: {example}"
    if get_origin(kind) is dict:
        return "names and values, such as {name: value}"
    if is_dataclass(kind):
        return f"keys and values, of {', '.join(each.name for each in fields(kind))}"
    return None if kind is None else SCALARS.get(kind, "a value")


def keys_of(kind: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass."""
    keys: list[str] = []
    for name, inner in get_type_hints(kind).items():
        keys += keys_of(inner, f"{prefix}{name}.") if is_dataclass(inner) else [prefix + name]
    return keys


def one_line(error: Exception) -> str:
    """The text of an error in one line, without what looks like a credential."""
    return credentials.masked(" ".join(str(error).split()))


def _value(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name, "null") if isinstance(values, Mapping) else values
    return "null" if values is None else values


def check_site_files(source: Path) -> None:
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
        if key in SITE_WORDS and value is not None and not isinstance(value, str):
            yield str(key), value
        elif key in SITE_ROLES:
            yield from _words(value)
