"""Makes the tiny model's tokenizer: bytes, and one token for each fixed sentence of chat form and puzzle templates.

    python -m substrate.base.make_tokenizer substrate/base

It is a byte-level BPE without merges: ids 0 to 2 are the special tokens, the next 256 the bytes, then one id per phrase.
So every text can be encoded, a digit or letter inside a puzzle is always one token, as arithmetic and numerals by
character need, and a template of 200 characters takes two or three tokens. The phrases come from the families. Phrases
that the file already has keep their ids, because the weights depend on them; new ones follow.

Beside `tokenizer.json` it writes `tokens.json` and the chat template, by which `<s>` begins a prompt and `</s>` ends an
answer. The tiny model has no published template, so nothing was compared.
"""

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from substrate.data.chat_template import ASSISTANT_TURN, USER_TURN, fallback
from substrate.data.special_tokens import SpecialTokens, TemplateFacts, digest
from substrate.data.tokenizer import BOX, END_OF_THINKING, SUFFIX
from substrate.tasks import FAMILIES

SPECIAL = ("<unk>", "<s>", "</s>")  # the published file's names for ids 0, 1, 2; padding is <unk>
PAD_ID, BEGIN_ID, END_ID = 0, 1, 2
TEMPLATE = fallback("{{ bos_token }}", "{{ eos_token }}")


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


def special_tokens() -> SpecialTokens:
    """Returns the facts of `tokens.json`."""
    variables = {"bos_token": SPECIAL[BEGIN_ID], "eos_token": SPECIAL[END_ID], "unk_token": SPECIAL[PAD_ID]}
    template = TemplateFacts(False, False, None, digest(TEMPLATE), None, variables=variables)
    return SpecialTokens(BEGIN_ID, PAD_ID, (END_ID,), (END_ID,), True, template)


def main() -> None:
    """Writes the files into the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Make the tiny model's tokenizer.json, and the two files beside it.")
    parser.add_argument("folder", type=Path, help="folder of the files; phrases of its tokenizer.json keep their ids")
    folder: Path = parser.parse_args().folder
    path = folder / "tokenizer.json"
    path.write_text(make_tokenizer(path).to_str(pretty=True) + "\n", encoding="utf-8")
    special_tokens().write(folder, TEMPLATE)


if __name__ == "__main__":
    main()
