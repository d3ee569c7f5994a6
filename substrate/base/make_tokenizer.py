"""Makes the tiny model's tokenizer: bytes, and one token for each fixed sentence of chat form and puzzle templates.

    python -m substrate.base.make_tokenizer substrate/base/tokenizer.json

It is a byte-level BPE without merges: ids 0 to 2 are the special tokens, the next 256 the bytes, then one id per phrase.
So every text can be encoded, a digit or letter inside a puzzle is always one token, as arithmetic and numerals by
character need, and a template of 200 characters takes two or three tokens. The phrases come from the families. Phrases
that the file already has keep their ids, because the weights depend on them; new ones follow.
"""

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from substrate.data.tokenizer import ASSISTANT_TURN, BOX, END_OF_THINKING, SUFFIX, USER_TURN
from substrate.tasks import FAMILIES

SPECIAL = ("<unk>", "<s>", "</s>")  # the published file's names for ids 0, 1, 2; padding is <unk>


def make_tokenizer(existing: Path) -> Tokenizer:
    """Builds the tokenizer, with the phrases of the existing file, if there is one, first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    chat = [USER_TURN, SUFFIX + ASSISTANT_TURN, END_OF_THINKING, BOX]
    named = [*chat, *(phrase for family in FAMILIES.values() for phrase in family.PHRASES)]
    kept = [token["content"] for token in json.loads(existing.read_text())["added_tokens"]] if existing.exists() else []
    phrases = dict.fromkeys([*(phrase for phrase in kept if phrase not in SPECIAL), *named])
    tokenizer.add_tokens([AddedToken(phrase, special=False, normalized=False) for phrase in phrases])
    return tokenizer


def main() -> None:
    """Writes the file named on the command line."""
    parser = argparse.ArgumentParser(description="Make the tiny model's tokenizer.json.")
    parser.add_argument("path", type=Path, help="file to write; its phrases keep their ids if it exists")
    path: Path = parser.parse_args().path
    path.write_text(make_tokenizer(path).to_str(pretty=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
