"""The request with which a language model is asked for proposals. The call itself is in model_calls/endpoint.py.

What an answer with status 200 may lack is told in decision/proposals.py.
"""

from __future__ import annotations

from typing import Any

from pipeline.model_calls.endpoint import Endpoint, Use, encoded, without
from pipeline.model_calls.failures import cures

USE = Use("policy.proposals", ("temperature", "seed", "response_format", "strict", "maxItems", "additionalProperties"))
"""The settings that name the endpoint; leave_out may name parameters of the request, and keywords of the JSON schema in it."""
CURES = cures(USE.at)


def body(endpoint: Endpoint, system: str, user: str, schema_name: str, schema: Any, seed: int = 0) -> bytes:
    """Return the exact bytes of the request. schema: JSON schema of the answer."""
    request: dict[str, Any] = {
        "model": endpoint.model,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "temperature": 0,
        "seed": seed,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": schema_name, "strict": True, "schema": schema},
        },
    }
    request["response_format"] = without(request["response_format"], endpoint.leave_out)
    return encoded(
        {name: value for name, value in request.items() if name not in endpoint.leave_out} | dict(endpoint.add)
    )
