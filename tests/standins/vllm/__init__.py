"""A stand-in for vLLM with the call signatures of its public source: what the entry uses of it, and refusals as vLLM's own.

Read in vllm-project/vllm: entrypoints/llm.py (LLM takes the model and then names alone, the others are fields of EngineArgs),
sampling_params.py (a msgspec.Struct, which refuses unknown names; stop texts need detokenize), v1/engine/llm_engine.py (add_request, add_lora,
abort_request, step with cumulative outputs), lora/request.py and lora/utils.py. Versions differ in the order of LoRARequest's fields, so this
one takes names alone. Every call is a line of JSON on stderr, so that a test sees what vLLM would have got.

STANDIN_FAULT=drop, abort or twice makes it lose the first request, break it off, or report its end twice.

Every other prompt, by the number of its tokens, is answered with 50, 51 and one of END_IDS; the others run to their limit.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.lora.request import LoRARequest

__version__ = "0.12.0"
END_IDS = (2, 2, 11, 11)
ENGINE_ARGS = {
    "dtype", "enable_lora", "enforce_eager", "gpu_memory_utilization", "max_lora_rank", "max_loras", "max_model_len", "max_num_batched_tokens",
    "max_num_seqs", "seed", "skip_tokenizer_init", "tensor_parallel_size", "tokenizer", "tokenizer_mode", "trust_remote_code",
}  # fmt: skip
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
SAMPLING = {
    "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
    "min_p": 0.0, "seed": None, "stop": None, "stop_token_ids": None, "ignore_eos": False, "max_tokens": 16, "min_tokens": 0, "logprobs": None,
    "prompt_logprobs": None, "detokenize": True, "skip_special_tokens": True, "include_stop_str_in_output": False,
}  # fmt: skip


def tell(call: str, **values: Any) -> None:
    print(json.dumps({"call": call, **values}), file=sys.stderr, flush=True)


class SamplingParams:
    """Fields and defaults of vLLM's."""

    def __init__(self, **given: Any) -> None:
        if unknown := sorted(set(given) - set(SAMPLING)):
            raise TypeError(f"Unexpected keyword argument '{unknown[0]}'")
        self.__dict__.update(SAMPLING | given)
        if self.stop and not self.detokenize:
            raise ValueError(
                "stop strings are only supported when detokenize is True. Set detokenize=True to use stop."
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise ValueError(f"temperature {self.temperature}, top_p {self.top_p}, max_tokens {self.max_tokens}")
        self.stop_token_ids = list(self.stop_token_ids or ())


class LLM:
    """The front of the engine."""

    def __init__(self, model: str, **how: Any) -> None:
        if unknown := sorted(set(how) - ENGINE_ARGS):
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument '{unknown[0]}'")
        if how.get("max_lora_rank", 16) not in MAX_LORA_RANKS:
            raise ValueError(f"max_lora_rank ({how['max_lora_rank']}) must be one of {MAX_LORA_RANKS}.")
        tell("LLM", model=model, gpus=os.environ.get("CUDA_VISIBLE_DEVICES"), **how)
        self.llm_engine = LLMEngine(how)


class LLMEngine:
    """Continuous batching over `max_num_seqs` slots, one token a step."""

    def __init__(self, how: dict[str, Any]) -> None:
        self.how, self.slots = how, how.get("max_num_seqs", 256)
        self.waiting: list[list[Any]] = []
        self.running: list[list[Any]] = []
        self.aborted: list[str] = []

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Read an adapter as vLLM's PEFTHelper and LoRAModel.from_local_checkpoint do."""
        assert self.how.get("enable_lora"), "LoRA is not enabled"
        folder = Path(lora_request.lora_path)
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["r"] > self.how.get("max_lora_rank", 16):
            raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {self.how['max_lora_rank']}.")
        modules = modules_of(folder / "adapter_model.safetensors")
        targets = set(config["target_modules"])
        if wrong := [name for name in modules if not any(name.endswith(f".{target}") for target in targets)]:
            raise ValueError(
                f"While loading {folder}, expected target modules in {sorted(targets)} but received {wrong}."
            )
        tell("add_lora", name=lora_request.lora_name, number=lora_request.lora_int_id, modules=len(modules))
        return True

    def add_request(
        self, request_id: str, prompt: dict[str, Any], params: SamplingParams, arrival_time: float | None = None,
        lora_request: LoRARequest | None = None, tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: dict[str, str] | None = None, priority: int = 0,
    ) -> str:  # fmt: skip
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {type(request_id)}")
        if lora_request is not None and not self.how.get("enable_lora"):
            raise ValueError(f"Got lora_request {lora_request} but LoRA is not enabled!")
        ids = prompt["prompt_token_ids"]
        if not ids or len(ids) > self.how["max_model_len"]:
            raise ValueError(
                f"The decoder prompt (length {len(ids)}) is empty or longer than {self.how['max_model_len']}."
            )
        tell("add_request", ids=list(ids), lora=lora_request and lora_request.lora_name, **vars(params))
        end = [50, 51, END_IDS[len(ids) % 4]] if len(ids) % 2 else [40]
        self.waiting.append([request_id, iter(end + [60] * params.max_tokens), params, []])
        return request_id

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        assert not isinstance(request_ids, str), "vLLM takes a list"
        tell("abort_request", ids=list(request_ids))
        self.aborted += [each[0] for each in self.running if each[0] in request_ids]
        self.running = [each for each in self.running if each[0] not in request_ids]

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running or self.aborted)

    def step(self) -> list[SimpleNamespace]:
        outputs = [
            output(name, [], "abort") for name in self.aborted
        ]  # older versions report an aborted request once more
        self.aborted = []
        while self.waiting and len(self.running) < self.slots:
            self.running.append(self.waiting.pop(0))
        tell("step", running=len(self.running))
        for each in list(self.running):
            name, ids, params, written = each
            written.append(next(ids))
            is_end = written[-1] in params.stop_token_ids
            reason = "stop" if is_end else "length" if len(written) == params.max_tokens else None
            if reason:
                self.running.remove(each)
            outputs.append(output(name, list(written), reason))
        if (fault := os.environ.get("STANDIN_FAULT")) and outputs[0].request_id == "0":
            self.running = [each for each in self.running if each[0] != "0"]
            outputs[:1] = {
                "drop": [],
                "abort": [output("0", [60], "abort")],
                "twice": [output("0", [60], "length")] * 2,
            }[fault]
        return outputs


def output(request_id: str, ids: list[int], reason: str | None) -> SimpleNamespace:
    """A RequestOutput with all tokens so far, as RequestOutputKind.CUMULATIVE gives them."""
    row = SimpleNamespace(
        index=0, text="", token_ids=ids, cumulative_logprob=None, logprobs=None, finish_reason=reason, stop_reason=None
    )
    return SimpleNamespace(request_id=request_id, prompt=None, finished=reason is not None, outputs=[row])


def modules_of(path: Path) -> list[str]:
    """The modules of an adapter, by parse_fine_tuned_lora_name: base_model.model.MODULE.lora_A.weight and lora_B.weight."""
    from safetensors.numpy import load_file

    tensors = load_file(path)
    modules = set()
    for name in tensors:
        parts = name.split(".")
        if parts[:2] != ["base_model", "model"] or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            raise ValueError(f"{name} is unsupported LoRA weight")
        modules.add(".".join(parts[2:-2]))
    for module in modules:
        pair = [tensors[f"base_model.model.{module}.lora_{factor}.weight"].shape for factor in "AB"]
        assert pair[0][0] == pair[1][1], f"{module}: the ranks of A and B differ"
    return sorted(modules)
