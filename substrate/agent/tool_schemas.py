"""The eight tools: what the model is told of each, as JSON schemas, and the check of a call's arguments against the same schema.

`finish` takes the manifest, the agent's typed report. The check is here so that a wrong call costs no exchange with the worker, which
checks again, because it does not trust the loop.
"""

from typing import Any

TEXT, WHOLE, EITHER_WAY = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}


def _record(**properties: Any) -> dict[str, Any]:
    """Returns the schema of an object with exactly these properties; those with a default may be left out."""
    required = [name for name, schema in properties.items() if "default" not in schema]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _text(most: int, description: str = "") -> dict[str, Any]:
    return TEXT | {"maxLength": most} | ({"description": description} if description else {})


def _one_of(*values: str) -> dict[str, Any]:
    return TEXT | {"enum": list(values)}


def _list(most: int, items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "maxItems": most, "items": items}


PATH = TEXT | {"minLength": 1, "description": "below the fork's root, such as substrate/recipes/rft.py"}
FOLDER = PATH | {"description": "a folder below the fork's root, such as substrate/recipes; . is the root"}


def _manifest(axis: str | None) -> dict[str, Any]:
    """Returns the schema of the manifest of an arm with this axis."""
    return _record(
        hypothesis=_text(600, "what you expected to help, and why"),
        axis={"type": "string" if axis else "null", "enum": [axis], "description": "the arm's axis"},
        change=_one_of("none", "data", "loss", "schedule", "mixture", "selection", "optimizer", "other"),
        summary=_text(1200, "what your edits do"),
        tried=_list(20, _record(what=_text(200), outcome=_one_of("better", "worse", "same", "broken", "unclear"))),
        failed=_list(
            20,
            _record(what=_text(200), kind=_one_of("edit", "smoke", "training", "budget", "tool"), repaired=EITHER_WAY),
        ),
        expected_effect=_one_of("large_gain", "small_gain", "none", "loss", "unknown"),
        checkpoint=_record(choice=_one_of("last", "best", "average"), why=_text(300)),
        equivalent_settings=_list(5, {"type": "array", "minItems": 2, "maxItems": 2, "items": TEXT})
        | {"description": "[key, value] of settings that would do the same without your edit; [] if none would"},
    )


def schemas(axis: str | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns each tool's description and the schema of its arguments, by name."""
    return {
        "list": ("List the entries of a folder of the fork: kind, size in bytes, name.", _record(path=FOLDER)),
        "read": (
            "Read lines of a text file of the fork.",
            _record(
                path=PATH,
                first_line=WHOLE | {"minimum": 1, "default": 1},
                num_lines=WHOLE | {"minimum": 1, "maximum": 10_000, "default": 200},
            ),
        ),
        "search": (
            "Search the files below a folder of the fork for a regular expression of Python; at most 200 hits.",
            _record(pattern=_text(500), path=FOLDER | {"default": "."}),
        ),
        "write": ("Write a whole file, which must be on an open path.", _record(path=PATH, content=TEXT)),
        "patch": (
            "Replace `old`, which must occur exactly once in the file, by `new`. The file must be on an open path.",
            _record(path=PATH, old=TEXT | {"minLength": 1}, new=TEXT),
        ),
        "run": (
            "Run a command by /bin/sh in the trial's sandbox, at the fork's root. Its /out is thrown away. It uses up seconds of runs.",
            _record(command=TEXT | {"minLength": 1}, seconds=WHOLE | {"minimum": 1, "maximum": 86_400, "default": 60}),
        ),
        "train": (
            "Train with the arm's recipe by the fork's code. A number of steps makes a smoke run, which is thrown away. "
            "null makes the full run, whose adapter counts; once it has completed it cannot be repeated.",
            _record(num_steps={"type": ["integer", "null"], "minimum": 1}, why=_text(600)),
        ),
        "finish": (
            "Hand in your report and end the session. Call it once the full run has completed.",
            _manifest(axis),
        ),
    }


def tools(axis: str | None) -> list[dict[str, Any]]:
    """Returns the `tools` of a request of the chat interface."""
    return [
        {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}
        for name, (description, schema) in schemas(axis).items()
    ]


def fault_of(name: str, arguments: dict[str, Any], axis: str | None) -> tuple[str, str] | None:
    """Returns the code and sentence of what is wrong with a call, None if nothing is."""
    known = schemas(axis)
    if name not in known:
        return "unknown_tool", f"there is no tool {name}; the tools are {', '.join(known)}"
    fault = _fault(arguments, known[name][1], "")
    return ("bad_arguments", f"{name} was not carried out: {fault}") if fault else None


_TYPES: dict[str, type] = {
    "object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None),
}  # fmt: skip


def _fault(value: Any, schema: dict[str, Any], where: str) -> str:
    """Returns what is wrong with a value under a schema of this module, "" if nothing is. where: the value's place, "" for all of it."""
    place, kinds = where or "the arguments", schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if type(value) not in [_TYPES[kind] for kind in kinds]:  # `type`, because a bool would pass for an int
        return f"{place} must be of type {' or '.join(kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{place} must be one of {', '.join(map(str, schema['enum']))}"
    if isinstance(value, str):
        return _fault_of_text(value, schema, place)
    if isinstance(value, int) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        most = f" and at most {schema['maximum']}" if "maximum" in schema else ""
        return f"{place} must be at least {schema['minimum']}{most}"
    if isinstance(value, list):
        return _fault_of_list(value, schema, place)
    return _fault_of_object(value, schema, where, place) if isinstance(value, dict) else ""


def _fault_of_text(value: str, schema: dict[str, Any], place: str) -> str:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        most = f" to {schema['maxLength']}" if "maxLength" in schema else " or more"
        return f"{place} has {len(value)} characters; valid are {schema.get('minLength', 0)}{most}"
    # Half of a surrogate pair is JSON, but no text that a file or a log could hold.
    return f"{place} has a character that is not Unicode" if not _is_unicode(value) else ""


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _fault_of_list(value: list[Any], schema: dict[str, Any], place: str) -> str:
    if not schema.get("minItems", 0) <= len(value) <= schema["maxItems"]:
        return f"{place} has {len(value)} entries; valid are {schema.get('minItems', 0)} to {schema['maxItems']}"
    faults = (_fault(item, schema["items"], f"{place}[{index}]") for index, item in enumerate(value))
    return next(filter(None, faults), "")


def _fault_of_object(value: dict[str, Any], schema: dict[str, Any], where: str, place: str) -> str:
    properties = schema["properties"]
    if set(value) - set(properties) or set(schema["required"]) - set(value):
        came = ", ".join(sorted(ascii(name)[1:-1][:40] for name in value)[:20]) or "none"
        needed = ", ".join(schema["required"])
        left_out = ", ".join(name for name in properties if name not in schema["required"])
        return f"{place} must have {needed}" + (f", and may have {left_out}" if left_out else "") + f"; came: {came}"
    faults = (_fault(item, properties[name], f"{where}.{name}" if where else name) for name, item in value.items())
    return next(filter(None, faults), "")
