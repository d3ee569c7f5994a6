"""Text to token ids and back, in the chat form of Nemotron 3: one class for the tiny tokenizer and the published one.

    <s><|im_start|>system\\n<|im_end|>\\n<|im_start|>user\\n{prompt}{SUFFIX}<|im_end|>\\n<|im_start|>assistant\\n<think>\\n
    {trace}\\n</think>\\n\\boxed{answer}</s>

The first line is `encode_prompt`, the second `encode_answer`: what a model is given, and what it must learn to write.
Both files are in the HF `tokenizers` format. The tiny one is made by `substrate/base/make_tokenizer.py`.

Sources: the chat template of NVIDIA-Nemotron-3-Nano-30B-A3B with thinking on, which puts an empty system turn first;
the suffix is the competition's.
"""

from pathlib import Path

import tokenizers

SUFFIX = "\nPlease put your final answer inside `\\boxed{}`. For example: `\\boxed{your answer}`"
USER_TURN = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n"
ASSISTANT_TURN = "<|im_end|>\n<|im_start|>assistant\n<think>\n"
END_OF_THINKING = "\n</think>\n"
BOX = "\\boxed{"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2


class Tokenizer:
    """A `tokenizers` file and the chat form around it."""

    def __init__(self, encoder: tokenizers.Tokenizer) -> None:
        self._encoder = encoder

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`."""
        return cls(tokenizers.Tokenizer.from_file(str(path)))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model may have more rows."""
        return max(self._encoder.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without begin or end."""
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids from the beginning of the sequence to the start of the assistant's thinking."""
        return [BOS_ID, *self.encode(f"{USER_TURN}{prompt}{SUFFIX}{ASSISTANT_TURN}")]

    def encode_answer(self, trace: str, answer: str) -> list[int]:
        """Ids of the thinking, its end, the boxed answer and the end of the sequence.

        A second `</think>` is a known fault of training data for this model, so a trace that has a tag is refused.
        """
        if "think>" in trace + answer:
            raise ValueError(f"a thinking tag in {trace!r} or {answer!r}; encode_answer adds the only one")
        return [*self.encode(f"{trace}{END_OF_THINKING}{BOX}{answer}}}"), EOS_ID]

    def decode(self, ids: list[int]) -> str:
        """The text of ids; padding, begin and end of sequence are left out, the tags of the chat form stay."""
        kept = [token for token in ids if token not in (PAD_ID, BOS_ID, EOS_ID)]
        text: str = self._encoder.decode(kept, skip_special_tokens=False)
        return text
