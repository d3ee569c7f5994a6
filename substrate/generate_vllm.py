"""Entry: complete the prompts of a task with vLLM, as the competition does.

    python -P -m substrate.generate_vllm [/task/task.json]

It reads the same task and writes the same files as `generate.py`, for sites with GPUs; `tasks.engine=vllm` chooses it.
vLLM has a runtime of its own, pinned by `tasks.engine_version`: between two versions the same weights lost 25 points on
one family, so a score belongs to an engine and its version. The base is the published checkpoint at /base. The adapter
is loaded before the first prompt; one that vLLM refuses is a DataError.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from substrate.data.tokenizer import Tokenizer
from substrate.generate import Progress, Shard, Task, write_sets
from substrate.interface.command_line import Parser
from substrate.interface.errors import DataError, UsageError, exit_code_of

MAX_LORA_RANK = 32  # the competition's limit


class Engine:
    """vLLM with the base and, if the task has one, the adapter."""

    def __init__(self, task: Task, tokenizer: Tokenizer) -> None:
        import vllm
        from vllm.lora.request import LoRARequest

        self.task, self.tokenizer, self.version = task, tokenizer, str(vllm.__version__)
        self.limit = int(task.model["max_sequence_length"])
        self.llm = vllm.LLM(
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
        )
        self.lora = LoRARequest("adapter", 1, str(task.adapter)) if task.adapter else None
        if self.lora is not None:
            try:
                taken = self.llm.llm_engine.add_lora(self.lora)
            except (ValueError, RuntimeError, KeyError) as error:
                message = f"vLLM {self.version} refuses the adapter: {error}; its rank may be at most {MAX_LORA_RANK}"
                raise DataError(message) from None
            if not taken:
                raise DataError(f"vLLM {self.version} did not load {task.adapter}; check it with tasks.engine=native")

    def decode(self, shard: Shard, progress: Progress) -> Iterator[dict[str, Any]]:
        """Yields the rows of a shard in the order of its prompts."""
        from vllm import SamplingParams

        how = self.task.decoding
        sampling = [
            SamplingParams(
                temperature=how.get("temperature", 0.0),
                top_p=how.get("top_p", 1.0),
                max_tokens=min(how["max_new_tokens"], self.limit - len(ids)),
                stop_token_ids=sorted(self.tokenizer.end_ids),
                seed=how.get("seed", 0),
                detokenize=False,
            )
            for _, ids in shard.prompts
        ]
        prompts = [{"prompt_token_ids": ids} for _, ids in shard.prompts]
        outputs = self.llm.generate(prompts, sampling, lora_request=self.lora, use_tqdm=False)
        for (item_id, _), output in zip(shard.prompts, outputs, strict=True):
            ids = list(output.outputs[0].token_ids)
            progress.add(len(ids))
            truncated = output.outputs[0].finish_reason != "stop"
            text = self.tokenizer.decode(ids)
            yield {"item_id": item_id, "completion": text, "num_tokens": len(ids), "truncated": truncated}


def main() -> None:
    """Reads the command line and the task, and decodes."""
    parser = Parser(prog="substrate.generate_vllm", description="Complete prompts with vLLM as a task file says.")
    parser.add_argument(
        "task", type=Path, nargs="?", default=Path("/task/task.json"), help="task file of kind generate"
    )
    task = Task.read(parser.parse_args().task)
    if task.decoding.get("stop") or task.decoding.get("log_probs"):
        raise UsageError("vLLM is asked for stop texts or log_probs here; only tasks.engine=native has them")
    tokenizer = Tokenizer.from_file(task.tokenizer)
    engine = Engine(task, tokenizer)
    write_sets(task, tokenizer, engine.limit, ("vllm", engine.version), engine.decode)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
