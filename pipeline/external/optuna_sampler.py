"""Optuna as a proposer: suggest settings from the fresh lifts of earlier arms. Only this module imports optuna.

It reads the same request as a language model (briefing.py) and answers in the same form. What a sampler draws depends on its version
and seed. No decision rests on that: an audit replays the stored bytes of the answer, and the gate judges them.
"""

from __future__ import annotations

from typing import Any

from pipeline.campaign import canonical, strict_json
from pipeline.campaign.errors import ConfigError
from pipeline.decision.proposal_gate import plain_number

ADDRESS = "Optuna TPE"


def suggest(request: bytes, seed: int) -> bytes:
    """Answer a request, the canonical JSON of `briefing.request_of`, with one proposal per axis at most.

    Raises ConfigError where optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            f"policy=optuna needs optuna, which this Python does not have ({error})",
            "Run `.venv/bin/python -m pip install optuna`, or use policy=default",
        ) from error
    facts = strict_json.read(request)
    axes = {axis["key"]: axis for axis in facts["axes"] if axis["key"] in facts["open_keys"]}
    standing = {setting["key"]: setting["value"] for setting in facts["standing"]}
    spaces = {key: _space(optuna, facts["open_keys"][key]["type"], axis) for key, axis in sorted(axes.items())}
    optuna.logging.disable_default_handler()
    proposals = []
    for key, space in spaces.items():
        sampler = optuna.samplers.TPESampler(seed=seed + len(facts["rounds"]), n_startup_trials=2)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for text, lift in _history(facts, key):
            value = text if "choices" in axes[key] else type(space.low)(text)
            if value in space.choices if "choices" in axes[key] else space.low <= value <= space.high:
                trial = optuna.trial.create_trial(params={key: value}, distributions={key: space}, value=lift)
                study.add_trial(trial)
        value = study.ask({key: space}).params[key]
        text = value if isinstance(value, str) else plain_text(value)
        if text != standing.get(key):
            why = f"{ADDRESS} of {len(study.trials) - 1} earlier lifts on this axis"
            proposals.append({"axis": axes[key]["name"], "key": key, "value": text, "hypothesis": why})
    return canonical.encoded({"proposals": proposals[: facts["num_slots"]]})


def plain_text(value: float | int) -> str:
    """Format a value with three significant digits, like the values of axis arms."""
    return str(value) if isinstance(value, int) else plain_number(f"{float(f'{value:.3g}'):.12f}")


def _space(optuna: Any, kind: str, axis: dict[str, Any]) -> Any:
    """Return an axis's range as a distribution, logarithmic where high is at least ten times low."""
    if "choices" in axis:
        return optuna.distributions.CategoricalDistribution(axis["choices"])
    low, high = float(axis["low"]), float(axis["high"])
    if kind == "integer":
        return optuna.distributions.IntDistribution(int(low), int(high))
    return optuna.distributions.FloatDistribution(low, high, log=low > 0 and high / low >= 10)


def _history(facts: dict[str, Any], key: str) -> list[tuple[str, float]]:
    """List (value, fresh lift over the reference) of every arm that moved this key."""
    return [
        (moved["value"], float(lift["lift"]))
        for past_round in facts["rounds"]
        for arm in past_round["arms"]
        for moved in arm["moved"]
        for lift in arm["lifts"]
        if moved["key"] == key and (lift["baseline"], lift["set"]) == ("reference", "fresh")
    ]
