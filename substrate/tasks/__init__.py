"""The puzzle families, by the name that item ids, configurations and the mix of a recipe use.

A new family is one module with the names of `protocol.Family` and one line here:

    FAMILIES["roman"].generate(random.Random(7), "small")
    Puzzle(examples=((21, 'XXI'), (10, 'X')), query=26)

Sources: the rows of the NVIDIA Nemotron Model Reasoning Challenge, whose generators the modules rebuild.
"""

from substrate.tasks import roman, text_cipher, unit_conversion
from substrate.tasks.protocol import STYLES, Family, Solution

FAMILIES: dict[str, Family] = {
    "roman": roman,
    "unit_conversion": unit_conversion,
    "text_cipher": text_cipher,
}

LEVELS = ("small", "full")

__all__ = ["FAMILIES", "LEVELS", "STYLES", "Family", "Solution"]
