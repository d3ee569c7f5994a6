"""Entry: complete the prompts of a task with vLLM, as the competition does.

    python -P -m substrate.generate_vllm [/task/task.json]

It reads the same task and writes the same files as `generate.py`, for sites with GPUs; `tasks.engine=vllm` chooses it.
vLLM has a runtime of its own, pinned by `tasks.engine_version`: between two versions the same weights lost 25 points on
one family, so a score belongs to an engine and its version. The base is the published checkpoint at /base. The adapter
is loaded before the first prompt; one that vLLM refuses is a DataError.

All items are requests to one engine, which batches them continuously; each is in the journal as soon as it ends. Each
replica is an engine of its own on `judge_tp` GPUs, because vLLM takes all the GPUs that a process sees.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from substrate.data.tokenizer import Tokenizer
from substrate.distributed.launch import run_replicas
from substrate.generate import Stops, Task, open_queue, work_through
from substrate.inference.queue import Item
from substrate.interface.command_line import Parser
from substrate.interface.errors import DataError, EngineFailed, UsageError, exit_code_of

MAX_LORA_RANK = 32  # the competition's limit
ENDS = ("stop", "length")  # why a sequence ends: the model's end, or the limit


class Engine:
    """vLLM with the base and, if the task has one, the adapter."""

    def __init__(self, task: Task, tokenizer: Tokenizer) -> None:
        import vllm
        from vllm.lora.request import LoRARequest

        self.task, self.tokenizer, self.version = task, tokenizer, str(vllm.__version__)
        self.limit = int(task.model["max_sequence_length"])
        self.engine = vllm.LLM(
            model=str(task.base),
            tokenizer=str(task.tokenizer.parent),
            skip_tokenizer_init=True,  # our own tokenizer makes ids and text with every engine
            dtype=task.model["dtype"],
            tensor_parallel_size=task.judge_tp,
            max_model_len=self.limit,
            max_num_seqs=task.decoding["batch_size"],
            enable_lora=task.adapter is not None,
            max_lora_rank=MAX_LORA_RANK,
            seed=0,
        ).llm_engine
        # By name, because versions of vLLM differ in the order of these fields.
        named = {"lora_name": "adapter", "lora_int_id": 1, "lora_path": str(task.adapter)}
        self.lora = LoRARequest(**named) if task.adapter else None
        if self.lora is not None:
            try:
                taken = self.engine.add_lora(self.lora)
            except (ValueError, RuntimeError, KeyError) as error:
                message = f"vLLM {self.version} refuses the adapter: {error}; its rank may be at most {MAX_LORA_RANK}"
                raise DataError(message) from None
            if not taken:
                raise DataError(f"vLLM {self.version} did not load {task.adapter}; check it with tasks.engine=native")

    def decode(self, items: Sequence[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        """Yields each item with its row as its sequence ends. Raises EngineFailed for one that vLLM breaks off."""
        from vllm import SamplingParams

        how, stops = self.task.decoding, Stops(self.tokenizer, self.task.decoding)
        for number, item in enumerate(items):
            sampling = SamplingParams(
                temperature=how.get("temperature", 0.0),
                top_p=how.get("top_p", 1.0),
                max_tokens=min(how["max_new_tokens"], self.limit - len(item.ids)),
                stop_token_ids=sorted(self.tokenizer.end_ids),
                seed=_seed_of(how.get("seed", 0), item),
                detokenize=False,
            )
            self.engine.add_request(str(number), {"prompt_token_ids": item.ids}, sampling, lora_request=self.lora)
        ended: set[str] = set()  # by a stop text; vLLM may still report them once
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                ids = list(output.outputs[0].token_ids)
                is_stopped = stops.are_in(ids)
                if output.request_id in ended or not (output.finished or is_stopped):
                    continue
                if not output.finished:
                    self.engine.abort_request([output.request_id])
                    ended.add(output.request_id)
                item, reason = items[int(output.request_id)], output.outputs[0].finish_reason
                if not is_stopped and reason not in ENDS:  # such as abort or error: the model did not write this end
                    raise EngineFailed(
                        f"vLLM {self.version} ended {item.item_id} for the reason {reason!r}; valid is {' or '.join(ENDS)}"
                    )
                truncated = not is_stopped and reason == "length"
                yield (
                    item,
                    {
                        "item_id": item.item_id,
                        "completion": stops.text_of(ids),
                        "num_tokens": len(ids),
                        "truncated": truncated,
                    },
                )


def _seed_of(seed: int, item: Item) -> int:
    """Returns an item's own seed: with one for all, vLLM would draw the same noise for the n-th token of every item."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{item.item_id}".encode()).digest()[:4])


def main() -> None:
    """Reads the command line and the task, then starts the replicas or decodes as one of them."""
    parser = Parser(prog="substrate.generate_vllm", description="Complete prompts with vLLM as a task file says.")
    parser.add_argument(
        "task", type=Path, nargs="?", default=Path("/task/task.json"), help="task file of kind generate"
    )
    path = parser.parse_args().task
    task = Task.read(path)
    if task.decoding.get("log_probs"):
        raise UsageError("vLLM is asked for log_probs here; only tasks.engine=native has them")
    if task.judge_replicas > 1 and "REPLICA" not in os.environ:
        sys.exit(run_replicas("substrate.generate_vllm", [str(path)], task.judge_replicas, task.judge_tp))
    tokenizer = Tokenizer.from_file(task.tokenizer)
    engine = Engine(task, tokenizer)
    replica = int(os.environ.get("REPLICA", 0))
    queue = open_queue(task, tokenizer, engine.limit, ("vllm", engine.version))
    work_through(queue, queue.done(), engine.decode, task.out, replica, task.judge_replicas)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
