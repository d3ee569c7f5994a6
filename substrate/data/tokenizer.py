"""Text to token ids and back, in the chat form of the checkpoint.

    <s><|im_start|>system\\n<|im_end|>\\n<|im_start|>user\\n{prompt}{SUFFIX}<|im_end|>\\n<|im_start|>assistant\\n<think>\\n
    {trace}\\n</think>\\n\\boxed{answer}</s>

`encode_prompt` makes the first line, which the model is given, and `encode_answer` the second, which it must learn to
write. A tokenizer is three files of a folder: `tokenizer.json` of the `tokenizers` library, `chat_template.jinja`, from
which prompts are rendered, and `tokens.json` (`special_tokens.py`). The lines above are the tiny one's; the published
one ends an answer with `<|im_end|>`, and whether a prompt begins with `<s>` is its template's business.

Sources: the chat template of NVIDIA-Nemotron-3-Nano-30B-A3B with thinking on, which puts an empty system turn first;
the suffix is the competition's.
"""

from pathlib import Path

import tokenizers

from substrate.data.chat_template import ChatTemplate
from substrate.data.special_tokens import SpecialTokens
from substrate.interface.errors import DataError

SUFFIX = "\nPlease put your final answer inside `\\boxed{}`. For example: `\\boxed{your answer}`"
END_OF_THINKING = "\n</think>\n"
BOX = "\\boxed{"


class Tokenizer:
    """A `tokenizers` file, its special tokens, and the chat form around a puzzle."""

    def __init__(self, encoder: tokenizers.Tokenizer, special: SpecialTokens, template: str) -> None:
        self.special = special
        self._encoder = encoder
        self._template = ChatTemplate(template, special.template.variables, special.template.date)

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.json` and the two files beside it. Raises DataError if one is missing or damaged."""
        special, template = SpecialTokens.read(Path(path).parent)
        return cls(read_encoder(Path(path)), special, template)

    @property
    def vocab_size(self) -> int:
        """The largest id plus one; a model's embedding may have more rows."""
        return num_ids(self._encoder)

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids of which each ends a completion."""
        return frozenset(self.special.end_ids)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text, without those that begin and end a sequence."""
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """Returns the ids from the beginning of the sequence to the start of the assistant's thinking.

        They are those of transformers' `apply_chat_template(tokenize=True, add_generation_prompt=True,
        enable_thinking=True)`. Raises DataError if the template refuses the prompt.
        """
        return self.encode(self._template.render([{"role": "user", "content": prompt + SUFFIX}], True))

    def encode_answer(self, trace: str, answer: str) -> list[int]:
        """Returns the ids of the thinking, its end, the boxed answer and the end of the assistant's turn.

        Raises ValueError if trace or answer has a thinking tag, because a second `</think>` is a known fault of training
        data, and if one has a token that ends a completion.
        """
        if "think>" in trace + answer:
            raise ValueError(f"a thinking tag in {trace!r} or {answer!r}; encode_answer adds the only one")
        ids = self.encode(f"{trace}{END_OF_THINKING}{BOX}{answer}}}")
        if self.end_ids & set(ids):
            raise ValueError(f"an end token in {trace!r} or {answer!r}; encode_answer adds the only one")
        return [*ids, *self.special.turn_end_ids]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of a completion: up to its first end id, without ids that pad or begin a sequence.

        So nothing that an engine wrote after the end of its turn can be scored. The tags of the chat form stay.
        """
        end = next((place for place, token in enumerate(ids) if token in self.special.end_ids), len(ids))
        kept = [token for token in ids[:end] if token not in (self.special.pad_id, self.special.begin_id)]
        text: str = self._encoder.decode(kept, skip_special_tokens=False)
        return text


def read_encoder(path: Path) -> tokenizers.Tokenizer:
    """Reads a `tokenizer.json` as transformers uses it for chats: it neither cuts nor pads. Raises DataError."""
    try:
        encoder = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} cannot be read: {error}; a file of the tokenizers library is needed") from None
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def num_ids(encoder: tokenizers.Tokenizer) -> int:
    """Returns the largest id plus one."""
    return int(max(encoder.get_vocab().values())) + 1
