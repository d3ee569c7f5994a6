"""What `adapter_config.json` of PEFT says about the weights: each field is implemented, ignored with a reason, or refused.

    y = W x + scale B A x        scale = alpha / r, or alpha / sqrt(r) with use_rslora

`rank_pattern` and `alpha_pattern` give modules a rank and an alpha of their own. `target_modules`, `exclude_modules` and
`layers_to_transform` choose the modules. All of them mean here what they mean in PEFT (compared with peft 0.21.2). A
field of any other name passes while it is empty (null, false, 0, "", [], {}), because then it is switched off.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from substrate.interface.command_line import parse_object, read_small
from substrate.interface.errors import DataError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Every linear module of the model that may have an adapter, by the end of its published name, and its kind of layer.
TARGETS = {
    "q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "o_proj": "attention", "in_proj": "mamba",
    "out_proj": "mamba", "shared_experts.up_proj": "moe", "shared_experts.down_proj": "moe", "experts.up_proj": "moe",
    "experts.down_proj": "moe", "lm_head": "output",
}  # fmt: skip
EXPERT = re.compile(r"^experts\.[0-9]+\.")
MAX_CONFIG_BYTES = 4 * 2**20  # five times the names of all 6,000 modules of the published 30B
# The normal numbers of float32, in which scales are applied; smaller ones are zero on a GPU.
LEAST_SCALE, MOST_SCALE = 2.0**-126, (2 - 2.0**-23) * 2.0**127
# What PEFT puts around a key of rank_pattern or alpha_pattern, and around an entry of layers_pattern.
KEY, LAYER = r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
NEEDED = ("r", "lora_alpha", "target_modules")
IMPLEMENTED = {
    *NEEDED, "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform",
    "layers_pattern",
}  # fmt: skip
# These fields change no product, whatever their value is.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "unsloth_fixed",
}  # fmt: skip
# These fields have one value with which the arithmetic is LoRA's.
FIXED = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
# Ways to draw the first A and B that leave the base weights as they are. The others subtract B A from them.
PLAIN_STARTS = ("gaussian", "orthogonal", "eva", "mica")
WHY_REFUSED = {
    "alora_invocation_tokens": "it switches the adapter on in the middle of a text",
    "arrow_config": "it mixes several adapters", "corda_config": "it changes the base weights",
    "ensure_weight_tying": "it ties the adapter of one module to another's",
    "fan_in_fan_out": "it transposes the weights", "kasa_config": "it truncates the base weights",
    "layer_replication": "it repeats layers of the base", "loftq_config": "it quantizes the base weights",
    "lora_bias": "it adds a bias to B", "lora_ga_config": "it changes the base weights",
    "megatron_config": "it splits the weights among ranks", "modules_to_save": "it replaces whole modules of the base",
    "monteclora_config": "it draws the weights at random",
    "target_parameters": "it adapts parameters that are no linear module", "use_dora": "it rescales the adapted weights",
    "trainable_token_indices": "it replaces rows of the embedding", "use_bdlora": "it makes A or B block-diagonal",
    "use_qalora": "it pools the inputs of A", "velora_config": "it changes the gradient of A",
}  # fmt: skip
Number = TypeVar("Number", bound=int | float)
CURE = "merge such an adapter with peft (merge_and_unload), or train one without it"


@dataclass(frozen=True)
class PeftConfig:
    """The checked configuration of a LoRA adapter. Names of modules are those of its weights file."""

    path: Path
    rank: int
    alpha: int | float
    dropout: float
    targets: tuple[str, ...] | str  # names or their ends; or a pattern of whole names, or "all-linear"
    excluded: tuple[str, ...] | str
    uses_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, int | float]
    layers: tuple[int, ...] | None  # only modules of these layers; None: of all
    layers_pattern: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> "PeftConfig":
        """Reads `adapter_config.json` of a folder. Raises DataError that names the field that is wrong or not known."""
        path = folder / ADAPTER_CONFIG
        text = read_small(path, MAX_CONFIG_BYTES)
        if text.startswith("version https://git-lfs"):
            raise DataError(f"{path} is a pointer of Git LFS; run `git lfs pull` in its repository")
        try:
            values = parse_object(text)
        except ValueError as error:
            raise DataError(f"{path} is not the JSON of a LoRA adapter: {error}; save or download it again") from None
        for name in NEEDED:
            if values.get(name) is None:
                raise DataError(f"{path} lacks {name}; {', '.join(NEEDED[:-1])} and {NEEDED[-1]} are needed")
        try:
            _refuse_unknown(values)
            config = cls(
                path,
                _rank("r", values["r"]),
                _alpha("lora_alpha", values["lora_alpha"]),
                _dropout("lora_dropout", values.get("lora_dropout") or 0.0),
                _names("target_modules", values["target_modules"]),
                _names("exclude_modules", values.get("exclude_modules") or []),
                _flag("use_rslora", values.get("use_rslora") or False),
                _patterns("rank_pattern", values.get("rank_pattern") or {}, _rank),
                _patterns("alpha_pattern", values.get("alpha_pattern") or {}, _alpha),
                _layers(values.get("layers_to_transform")),
                _several("layers_pattern", values.get("layers_pattern") or [], LAYER),
            )
            _require(bool(config.targets), "target_modules", values["target_modules"], "at least one name")
            if config.layers is not None and isinstance(config.targets, str):
                _require(False, "target_modules", config.targets, "a list beside layers_to_transform")
            config._check_scales()
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
        return config

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module's pair."""
        return self.rank_pattern.get(_key_of(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str | None) -> float:
        """Returns the factor on a module's B A; for None, that of modules that no pattern names."""
        alpha, rank = self.alpha, self.rank
        if module is not None:
            alpha, rank = self.alpha_pattern.get(_key_of(self.alpha_pattern, module), alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.uses_rslora else alpha / rank

    def _check_scales(self) -> None:
        alphas = {f"alpha_pattern.{key}": each for key, each in self.alpha_pattern.items()} | {"lora_alpha": self.alpha}
        ranks = sorted({self.rank, *self.rank_pattern.values()})
        for name, alpha in alphas.items():
            for rank in (ranks[0], ranks[-1]):
                scale = alpha / (math.sqrt(rank) if self.uses_rslora else rank)
                valid = f"such that its scale with rank {rank} is a normal number of float32, {LEAST_SCALE:.2g} to {MOST_SCALE:.2g}"
                _require(LEAST_SCALE <= scale <= MOST_SCALE, name, alpha, valid)

    def takes(self, module: str) -> bool:
        """Whether the configuration gives this module an adapter."""
        if _matches(self.excluded, module):
            return False
        if self.targets == "all-linear":
            return module != "lm_head"  # PEFT leaves the output layer out
        if module in self.targets and isinstance(self.targets, tuple):
            return True  # a whole name is adapted in whatever layer it is
        return _matches(self.targets, module) and (self.layers is None or self._is_in_layers(module))

    def _is_in_layers(self, module: str) -> bool:
        patterns = [LAYER.replace("{}", each) for each in self.layers_pattern] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        found = next((match for each in patterns if (match := re.match(each, module))), None)
        layer = found.groupdict().get("idx") if found else None  # None too where `a|b` matches its first half
        return layer is not None and int(layer) in (self.layers or ())

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """Returns the entries of target_modules that match none of these modules, if it is a list."""
        parts = [module.split(".") for module in modules]
        ends = {".".join(each[start:]) for each in parts for start in range(len(each))}
        return [each for each in self.targets if each not in ends] if isinstance(self.targets, tuple) else []

    def modules_in(self, names: Iterable[str]) -> list[str]:
        """Returns the modules of a weights file, sorted, from the names of its tensors.

        Raises DataError for a tensor that is no factor of a pair, one without its partner, a number with signs that
        would name a layer twice (00), and a module that the configuration does not adapt, which PEFT would leave out.
        """
        factors: dict[str, set[str]] = {}
        for name in sorted(names):
            match = re.fullmatch(r"base_model\.model\.([!-~]+)\.lora_([AB])\.weight", name)
            if match is None:
                raise DataError(
                    f"{ADAPTER_WEIGHTS} holds {ascii(name)[1:-1][:200]}, which is no factor of a LoRA pair; names such as "
                    "base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight are read"
                )
            factors.setdefault(match[1], set()).add(match[2])
        if not factors:
            raise DataError(f"{ADAPTER_WEIGHTS} holds no tensor; save the adapter again")
        for module, found in factors.items():
            if any(re.fullmatch("0[0-9]+|[0-9]{7,}", part) for part in module.split(".")):
                raise DataError(
                    f"{ADAPTER_WEIGHTS} holds {module[:200]}; count layers and experts as 0, 1, 2, without leading zeros"
                )
            if lacking := {"A", "B"} - found:
                held, lacked = (f"base_model.model.{module}.lora_{each.pop()}.weight" for each in (found, lacking))
                raise DataError(f"{ADAPTER_WEIGHTS} holds {held} and lacks its partner {lacked}; save it again")
            if not self.takes(module):
                raise DataError(
                    f"{ADAPTER_WEIGHTS} holds {module}, which {self.path} does not name (target_modules, "
                    "exclude_modules, layers_to_transform): PEFT would leave it out; name it there"
                )
        return list(factors)


def target_of(module: str) -> str:
    """Returns a module's target: backbone.layers.3.mixer.experts.7.up_proj -> experts.up_proj."""
    return EXPERT.sub("experts.", module.partition(".mixer.")[2] or module)


def published_name(name: str) -> str:
    """Returns the published name of a module, weight or factor; transformers 5 says `model.` instead of `backbone.`."""
    return re.sub(r"^(base_model\.model\.)?model\.", r"\1backbone.", name)


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    """Raises ValueError for a field that changes the arithmetic and is not implemented, or that nobody here knows."""
    for name, value in values.items():
        if name in IMPLEMENTED or name in HARMLESS or not value:
            continue
        if name in FIXED:
            _require(value == FIXED[name], name, value, f"{FIXED[name]} alone")
        elif name == "init_lora_weights":
            valid = f"true, false or one of {', '.join(PLAIN_STARTS)}, which keep the base; {CURE}"
            _require(value is True or value in PLAIN_STARTS, name, value, valid)
        else:
            why = WHY_REFUSED.get(name, "nobody here knows that field: remove it if it says nothing about the weights")
            raise ValueError(f"{name} is {_shown(value)}, which is refused, because {why}; {CURE}")


def _require(holds: bool, name: str, value: object, valid: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {_shown(value)}; {name} must be {valid}")


def _shown(value: object) -> str:
    """A value as JSON spells it, cut to a line's length."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _rank(name: str, value: Any) -> int:
    _require(type(value) is int and 1 <= value < 2**31, name, value, "an integer of at least 1 and below 2**31")
    return int(value)


def _alpha(name: str, value: Any) -> int | float:
    # `type`, because a bool would pass for an int; the bound, because Python cannot divide a huge int by a float.
    sound = type(value) in (int, float) and 0 < value <= sys.float_info.max
    _require(sound, name, value, "a finite number above 0")
    return value


def _dropout(name: str, value: Any) -> float:
    _require(type(value) in (int, float) and 0 <= value < 1, name, value, "a number from 0 to below 1")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    _require(type(value) is bool, name, value, "true or false")
    return bool(value)


def _names(name: str, value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str) and value:
        _compile(name, value)
        return value
    return _several(name, value)


def _several(name: str, value: Any, around: str = "") -> tuple[str, ...]:
    """around: where each value is a part of a regular expression, the whole of it."""
    values = [value] if isinstance(value, str) else value
    sound = isinstance(values, list) and all(isinstance(each, str) and each and each.isprintable() for each in values)
    _require(sound, name, value, "a list of names")
    for each in values if around else ():
        _compile(name, each, around)
    return tuple(values)


def _patterns(name: str, value: Any, check: Callable[[str, Any], Number]) -> dict[str, Number]:
    _require(isinstance(value, dict), name, value, "a mapping from names of modules to numbers")
    for key in value:
        _compile(name, key, KEY)
    return {key: check(f"{name}.{key}", number) for key, number in value.items()}


def _layers(value: Any) -> tuple[int, ...] | None:
    numbers = [value] if type(value) is int else value or []
    sound = isinstance(numbers, list) and all(type(each) is int for each in numbers)
    _require(sound, "layers_to_transform", value, "the number of a layer, or a list of such numbers")
    return tuple(numbers) or None


def _compile(name: str, pattern: str, around: str = "{}") -> None:
    try:
        re.compile(around.replace("{}", pattern))
    except (re.error, RecursionError, OverflowError):
        inside = "" if around == "{}" else f" inside of {around}, where PEFT puts it"
        _require(False, name, pattern, f"a name, or a regular expression that Python can read{inside}")


def _matches(names: tuple[str, ...] | str, module: str) -> bool:
    """Whether a module's name is one of the names or ends with one; a single text is a pattern of the whole name."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _key_of(pattern: Mapping[str, Any], module: str) -> str:
    """Returns the first key of a pattern that matches the end of a module's name, else the name."""
    return next((key for key in pattern if re.match(KEY.replace("{}", key), module)), module)
