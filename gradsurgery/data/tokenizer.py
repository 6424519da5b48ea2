"""A small byte-level BPE, for models that are trained from scratch in minutes.

The embedded one has 2,048 entries and saw only the training part of the embedded corpus; English and Spanish cost about
the same number of tokens in it, where GPT-2's spends 1.6 times as many on Spanish. It is made again by
``python -m gradsurgery.data.tokenizer OUTPUT``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gradsurgery.errors import DataError

END_OF_TEXT = "<|endoftext|>"
EMBEDDED = Path(__file__).parent / "assets" / "tokenizer.json"


def load_tokenizer(path: str | Path = EMBEDDED) -> PreTrainedTokenizerFast:
    """The tokenizer in a ``tokenizer.json``; without ``path`` the embedded one. End of text is also what pads."""
    if not Path(path).is_file():
        raise DataError(f"{path} is not a file: give the path of a tokenizer.json.")
    return _wrap(Tokenizer.from_file(str(path)))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with ``vocab_size`` entries, end of text (id 0) and all 256 bytes among them.

    Give it training text only. The result depends on nothing but the texts: no seed, no order of merging by chance.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise DataError(f"vocab_size={vocab_size} is too small: the bytes and end of text take {len(alphabet) + 1}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


if __name__ == "__main__":
    from gradsurgery.data.corpus import load_bilingual

    parts = load_bilingual("embedded").values()
    made = train_tokenizer(document.text for part in parts for document in part.train)
    made.backend_tokenizer.save(sys.argv[1], pretty=False)
