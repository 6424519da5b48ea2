"""A second language made with a local translation model: what SGTM's TinyStories pair was made for (with a paid API).

    python -m gradsurgery.data.translate --source hub:roneneldan/TinyStories --model Helsinki-NLP/opus-mt-en-es \\
        --out data/tinystories/es.jsonl

Each row keeps its id, so that both languages are aligned and held back together. A run that was interrupted goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gradsurgery.data.streams import stream_articles
from gradsurgery.errors import DataError, GradsurgeryError

Translate = Callable[[list[str]], list[str]]
_SENTENCE = re.compile(r"(?<=[.!?…])\s+")


def model_translator(model: str, max_tokens: int = 512, beams: int = 1, device: str | None = None) -> Translate:
    """Translate pieces of text with a sequence-to-sequence model of the hub or a folder, greedily by default.

    Raises:
        DataError: the model cannot be loaded, or is none that translates.
    """
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        made = AutoModelForSeq2SeqLM.from_pretrained(model)
    except (OSError, ValueError) as error:
        said = (str(error).splitlines() or ["no message"])[0]
        raise DataError(
            f"{model} cannot be loaded as a translation model ({said}); offline, give the folder of a local "
            f"sequence-to-sequence model."
        ) from error
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    made = made.to(where).eval()

    @torch.inference_mode()
    def translate(pieces: list[str]) -> list[str]:
        inputs = tokenizer(pieces, return_tensors="pt", padding=True, truncation=True, max_length=max_tokens).to(where)
        out = made.generate(**inputs, num_beams=beams, do_sample=False, max_new_tokens=max_tokens)
        return list(tokenizer.batch_decode(out, skip_special_tokens=True))

    return translate


def translate_rows(
    rows: Iterable[Mapping[str, Any]], translate: Translate, batch_size: int = 32, longest: int = 400
) -> Iterator[dict[str, str]]:
    """``{"id", "text"}`` of each row, its text translated paragraph by paragraph in pieces of whole sentences.

    Args:
        rows: With ``text``, and ``id`` or else numbered.
        translate: A list of pieces to their translations.
        batch_size: Pieces translated at once.
        longest: Characters of a piece; a longer sentence is a piece of its own.

    Example:
        >>> from gradsurgery.data.translate import translate_rows
        >>> list(translate_rows([{"text": "One. Two.\\n\\nThree."}], lambda pieces: [p.upper() for p in pieces]))
        [{'id': '0', 'text': 'ONE. TWO.\\n\\nTHREE.'}]
    """
    if batch_size < 1 or longest < 1:
        raise DataError(f"batch_size={batch_size} and longest={longest} are numbers from 1.")
    for number, row in enumerate(rows):
        if not isinstance(row.get("text"), str):
            raise DataError(f"row {row.get('id', number)} has no text; it has {', '.join(row) or 'nothing'}.")
        paragraphs = [list(_pieces(paragraph, longest)) for paragraph in row["text"].split("\n")]
        pieces = [piece for paragraph in paragraphs for piece in paragraph]
        done: list[str] = []
        for k in range(0, len(pieces), batch_size):
            done += translate(pieces[k : k + batch_size])
        if len(done) != len(pieces):
            raise DataError(f"row {row.get('id', number)}: {len(pieces)} pieces gave {len(done)} translations.")
        found = iter(done)
        text = "\n".join(" ".join(islice(found, len(paragraph))) for paragraph in paragraphs)
        yield {"id": str(row.get("id", number)), "text": text}


def _pieces(paragraph: str, longest: int) -> Iterator[str]:
    """Whole sentences, as many as fit."""
    piece = ""
    for sentence in _SENTENCE.split(paragraph.strip()):
        if piece and len(piece) + 1 + len(sentence) > longest:
            yield piece
            piece = sentence
        else:
            piece = f"{piece} {sentence}" if piece else sentence
    if piece:
        yield piece


def resume(out: Path) -> int:
    """How many rows stand in ``out`` already; a last line that a kill cut off is taken away."""
    if not out.is_file():
        return 0
    whole = out.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        with open(out, "r+b") as file:
            file.truncate(end)
    return whole.count(b"\n", 0, end)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gradsurgery.data.translate", description=__doc__.split("\n")[0])
    parser.add_argument("--source", required=True, help="hub:owner/name, a .jsonl file or a folder")
    parser.add_argument("--model", required=True, help="translation model: hub name or folder")
    parser.add_argument("--out", required=True, type=Path, help="the .jsonl to be written, such as data/es.jsonl")
    parser.add_argument("--limit", type=int, help="rows to translate")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--device")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".jsonl":
        raise DataError(f"--out {options.out} is to be a .jsonl file.")
    if options.limit is not None and options.limit < 1:
        raise DataError(f"--limit {options.limit} leaves nothing to translate.")
    source = stream_articles(options.source)
    translate = model_translator(options.model, beams=options.beams, device=options.device)
    done = resume(options.out)
    numbered = ({"id": str(k), **row} for k, row in enumerate(islice(source(), options.limit)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "a", encoding="utf-8") as file:
        for row in translate_rows(islice(numbered, done, None), translate, options.batch_size):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()


if __name__ == "__main__":
    try:
        main()
    except GradsurgeryError as error:
        sys.exit(f"{type(error).__name__}: {error}")
