"""Text to token ids and back, in the chat form of Nemotron 3, for the tiny tokenizer and the published one.

    <s><|im_start|>system\\n<|im_end|>\\n<|im_start|>user\\n{prompt}{SUFFIX}<|im_end|>\\n<|im_start|>assistant\\n<think>\\n
    {trace}\\n</think>\\n\\boxed{answer}</s>

`encode_prompt` makes the first line, which the model is given, and `encode_answer` the second, which it must learn to
write. Both tokenizers are files of the `tokenizers` library; `substrate/base/make_tokenizer.py` makes the tiny one.

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
        """Reads a `tokenizer.json`."""
        return cls(tokenizers.Tokenizer.from_file(str(path)))

    @property
    def vocab_size(self) -> int:
        """The largest id plus one; a model's embedding may have more rows."""
        return max(self._encoder.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text, without those that begin and end a sequence."""
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """Returns the ids from the beginning of the sequence to the start of the assistant's thinking."""
        return [BOS_ID, *self.encode(f"{USER_TURN}{prompt}{SUFFIX}{ASSISTANT_TURN}")]

    def encode_answer(self, trace: str, answer: str) -> list[int]:
        """Returns the ids of the thinking, its end, the boxed answer and the end of the sequence.

        Raises ValueError if trace or answer has a thinking tag: a second `</think>` is a known fault of training data.
        """
        if "think>" in trace + answer:
            raise ValueError(f"a thinking tag in {trace!r} or {answer!r}; encode_answer adds the only one")
        return [*self.encode(f"{trace}{END_OF_THINKING}{BOX}{answer}}}"), EOS_ID]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids without padding, begin and end of sequence; the tags of the chat form stay."""
        kept = [token for token in ids if token not in (PAD_ID, BOS_ID, EOS_ID)]
        text: str = self._encoder.decode(kept, skip_special_tokens=False)
        return text
