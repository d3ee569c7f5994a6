"""An API key in memory, read for each call from the variable or file that the configuration names."""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.model_calls.failures import EndpointFailed


@dataclass(frozen=True)
class Secret:
    """An API key; its repr does not show it."""

    text: str = field(repr=False)

    def stands_in(self, answer: bytes) -> bool:
        """Whether an answer contains the key: plain, with JSON's escapes, or in base 64."""
        unescaped = re.sub(rb"\\u00([0-7][0-9a-fA-F])", lambda code: bytes([int(code[1], 16)]), answer).replace(
            b"\\", b""
        )
        coded = base64.b64encode(self.text.encode()).rstrip(b"=")[:-1]
        return any(key in text for key in (self.text.encode(), coded) for text in (answer, unescaped))


def read_secret(variable: str, file: str, at: str) -> Secret | None:
    """Read the key from an environment variable or a file, or return None where both are "".

    at: the group of settings that names them. Raises EndpointFailed (endpoint_key) where the place holds no key.
    """
    if variable:
        place, text = f"the variable {variable}", os.environ.get(variable, "")
    elif file:
        place = f"the file that {at}.api_key_file names"
        try:
            text = Path(file).read_text("ascii")
        except (OSError, UnicodeDecodeError):
            text = ""
    else:
        return None
    text = text.strip()
    if not (text and text.isascii() and text.isprintable()):
        raise EndpointFailed("endpoint_key", f"{place} holds no API key", at)
    return Secret(text)
