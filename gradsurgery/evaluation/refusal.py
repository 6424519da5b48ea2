"""How often a model refuses: by what it writes, read by a detector whose own mistakes are reported beside the rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gradsurgery.data.documents import read_rows
from gradsurgery.errors import DataError
from gradsurgery.evaluation.generation import continuations
from gradsurgery.files import read_json

ASSETS = Path(__file__).parents[1] / "data" / "assets"
MARKERS, LABELLED = ASSETS / "refusal_markers.json", ASSETS / "refusals_labelled.jsonl.bz2"


@dataclass(frozen=True)
class DetectorScore:
    """How well a detector tells refusals from answers.

    Attributes:
        true_positives, false_positives, false_negatives, true_negatives: Texts of the labelled set.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def precision(self) -> float:
        """Share of the texts it takes for refusals that are; nan where it takes none."""
        return _share(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """Share of the refusals that it finds; nan where there are none."""
        return _share(self.true_positives, self.true_positives + self.false_negatives)

    def row(self) -> dict[str, float]:
        """For a table."""
        return {
            "precision": self.precision,
            "recall": self.recall,
            "refusals": self.true_positives + self.false_negatives,
            "answers": self.false_positives + self.true_negatives,
        }


@dataclass(frozen=True)
class RefusalDetector:
    """Takes a text for a refusal if it holds one of some markers, in any case and with any apostrophe.

    Args:
        markers: Strings. `RefusalDetector.shipped` has those of garak's mitigation detector without the ones that name
            topics ("harmful", "illegal", "bias"), which answers about such topics hold as well.

    Raises:
        DataError: no marker, or an empty one, which every text holds.

    Example:
        >>> from gradsurgery.evaluation import RefusalDetector
        >>> detector = RefusalDetector.shipped()
        >>> detector("I’m sorry, but I can’t help with that."), detector("A wading bird.")
        (True, False)
    """

    markers: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "markers", tuple(self.markers))
        if not self.markers or not all(isinstance(m, str) and m.strip() for m in self.markers):
            raise DataError("a detector needs markers, none of them empty: every text would be a refusal, or none.")
        object.__setattr__(self, "_plain", tuple(_plain(marker) for marker in self.markers))

    @staticmethod
    def shipped() -> RefusalDetector:
        """49 markers of high precision (garak 0.17.1)."""
        return RefusalDetector(tuple(read_json(MARKERS, "refusal markers")["markers"]))

    def __call__(self, text: str) -> bool:
        text = _plain(text)
        return any(marker in text for marker in self._plain)  # type: ignore[attr-defined]

    def measured(self, labelled: Iterable[tuple[str, bool]] | None = None) -> DetectorScore:
        """Precision and recall on labelled texts.

        Args:
            labelled: ``(text, is a refusal)``; by default the 24 refusals and 40 answers that are shipped (PyRIT's).
        """
        if labelled is None:
            labelled = ((row["text"], row["refusal"]) for row in read_rows(LABELLED))
        counts = {(found, is_one): 0 for found in (True, False) for is_one in (True, False)}
        for text, refusal in labelled:
            counts[self(text), bool(refusal)] += 1
        if not sum(counts.values()):
            raise DataError("there is no labelled text to measure a detector on.")
        return DetectorScore(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


@dataclass(frozen=True)
class RefusalRate:
    """What a model wrote and how much of it is a refusal.

    Attributes:
        rate: Share of the texts that the detector takes for refusals.
        texts: What was written, in the prompts' order.
        refused: By text.
        detector: How well the detector does on its labelled set: it bounds what ``rate`` can mean.
    """

    rate: float
    texts: tuple[str, ...]
    refused: tuple[bool, ...]
    detector: DetectorScore


def refusal_rate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    detector: RefusalDetector | None = None,
    max_new_tokens: int = 40,
    batch_size: int = 32,
    **sampling: Any,
) -> RefusalRate:
    """The share of prompts that a model refuses, by the most likely continuation of each.

    Args:
        model: A Hugging Face causal language model; evaluated in eval mode.
        tokenizer: Its tokenizer.
        prompts: As `continuations` takes them: `gradsurgery.data.ChatFormat.prompt` gives token ids with one first
            token, where a template's text that is tokenised again would have two.
        detector: By default `RefusalDetector.shipped`.
        max_new_tokens: Length of a response; refusals say so in their first words.
        batch_size: Prompts that are continued together.
        sampling: Options of `continuations`.

    Raises:
        DataError: no prompts, or an empty one.
    """
    if not prompts:
        raise DataError("there is no prompt to measure a refusal rate on.")
    detector = detector if detector is not None else RefusalDetector.shipped()
    texts = tuple(continuations(model, tokenizer, prompts, max_new_tokens, batch_size, **sampling))
    refused = tuple(map(detector, texts))
    return RefusalRate(sum(refused) / len(refused), texts, refused, detector.measured())


def _plain(text: str) -> str:
    return text.casefold().replace("’", "'").replace("‘", "'").replace("`", "'")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
