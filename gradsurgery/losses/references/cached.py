"""Log-probabilities precomputed for a data set (TRL's ``precompute_ref_log_probs``): a reference without a forward."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.space import ParameterSpace, unwrap
from gradsurgery.errors import ArtefactError, BatchError
from gradsurgery.losses.positions import is_encoder_decoder, mask_of
from gradsurgery.losses.references.base import Reference
from gradsurgery.losses.references.store import Reader, row_hashes
from gradsurgery.losses.top_k import TopK

FULL, TOP = ("log_probs",), ("log_probs", "indices", "rest")


class Cached(Reference):
    """Stored log-probabilities by row; made by `cached`.

    Attributes:
        vocabulary: Size of the vocabulary.
        top_k: How many words of every position are stored; None for all.
        rows: How many rows are stored.
    """

    def __init__(self, path: str | Path, same_model: bool = True) -> None:
        self._reader = Reader(Path(path))
        about = self._reader.about
        self.path, self.same_model = Path(path), same_model
        self._model: weakref.ref[nn.Module] | None = None
        try:
            self.vocabulary, self.top_k, self.rows = int(about["vocabulary"]), about["top_k"], int(about["rows"])
            self.temperature, self.fingerprint = float(about["temperature"]), str(about["fingerprint"])
            self.ids: str | None = about["ids"]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{path} is damaged ({error}); precompute again.") from None
        self.columns = (self.ids,) if self.ids else ()

    def take(self, model: nn.Module) -> None:
        """Check that the cache was made with this model, before it trained.

        Raises:
            ArtefactError: another fingerprint, unless ``same_model=False``.
        """
        base = unwrap(model)
        if self._model is not None and self._model() is base:
            return
        mine = ParameterSpace.of(base).fingerprint
        if self.same_model and mine != self.fingerprint:
            raise ArtefactError(
                f"{self.path} was made with {self._reader.about.get('model')} ({self.fingerprint}), this model is "
                f"{type(base).__name__} ({mine}). If it is another teacher with the same tokenizer, or the "
                f"base of adapters, say so: cached(path, same_model=False)."
            )
        self._model = weakref.ref(base)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | TopK:
        """Log-probabilities of the rows of a batch; at positions that do not count they are zero.

        Raises:
            BatchError: a row that is not stored, or differs from what was stored under its number.
            ArtefactError: the cache is damaged, or was made with another model.
        """
        self.take(model)
        decoder = is_encoder_decoder(inputs, model)
        counted = counted_positions(inputs, decoder)
        numbers = self._numbers(inputs, row_hashes(inputs, counted, decoder, numbered=self.ids is not None))
        names = TOP if self.top_k else FULL
        device = counted.device
        out: list[Tensor] = []
        for row, number in enumerate(numbers):
            stored = self._reader.read(number, names)
            for k, part in enumerate(stored):
                if row == 0:
                    out.append(torch.zeros((*counted.shape, *part.shape[1:]), dtype=part.dtype, device=device))
                out[k][row, counted[row]] = part.to(device)
        return TopK(out[0], out[1], out[2], self.vocabulary, self.temperature) if self.top_k else out[0]

    def _numbers(self, inputs: Mapping[str, Any], hashes: list[bytes]) -> list[int]:
        reader = self._reader
        if self.ids is None:
            found = [reader.by_hash.get(hashed) for hashed in hashes]
            if None in found:
                raise BatchError(
                    f"row {found.index(None)} of this batch is not among the {self.rows} rows of {self.path}: its "
                    f"tokens differ from all of them (cut or packed otherwise?). Precompute over the very batches of "
                    f"training, or give rows numbers: ids='…'."
                )
            return [number for number in found if number is not None]
        out = []
        for row, key in enumerate(row_ids(inputs, self.ids, len(hashes))):
            if (number := reader.by_key.get(key)) is None:
                raise BatchError(
                    f"row {key} ({self.ids}) is not among the {self.rows} rows of {self.path}; precompute over the "
                    f"whole data set."
                )
            if reader.hashes[number] != hashes[row]:
                raise BatchError(
                    f"row {key} ({self.ids}) has other tokens than when {self.path} was made: the data set was "
                    f"shuffled, cut or tokenised anew. Precompute again."
                )
            out.append(number)
        return out

    def __repr__(self) -> str:
        words = f"top {self.top_k} of {self.vocabulary} words" if self.top_k else f"{self.vocabulary} words"
        return f"Cached({self.rows} rows, {words})"

    def describe(self) -> str:
        return f"cached({self.path.name}, {f'top {self.top_k}' if self.top_k else 'full'})"


def counted_positions(inputs: Mapping[str, Any], decoder: bool) -> Tensor:
    """Bool ``[batch, token]``: the positions of the logits that a loss may count."""
    mask = mask_of(inputs, None, decoder)
    tokens = inputs.get("decoder_input_ids") if decoder else inputs.get("input_ids")
    if mask is None and isinstance(tokens, Tensor):
        return torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    if mask is None:
        raise BatchError(
            f"a cache needs {'labels or decoder_input_ids' if decoder else 'input_ids'} to know the positions by; the "
            f"batch has {', '.join(map(str, inputs)) or 'nothing'}."
        )
    return mask


def row_ids(inputs: Mapping[str, Any], column: str, rows: int) -> list[int]:
    ids = inputs.get(column)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or tuple(ids.shape) != (rows,):
        have = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise BatchError(
            f"row numbers {column!r} are an int tensor [{rows}], not {have}; batches must bring them along."
        )
    return [int(i) for i in ids]


def cached(path: str | Path, same_model: bool = True) -> Cached:
    """Log-probabilities that `precompute` stored, as the reference: no second forward and no second model.

    Rows are known by a hash of their ids, wherever they are padded, or by a column of row numbers.

    Args:
        path: The folder.
        same_model: The cache was made with the architecture that trains; False for another teacher.

    Raises:
        ArtefactError: no such folder, a damaged one, or (when it is used) one of another model.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/reference"
        >>> gs.losses.precompute(path, model, [batch], top_k=4)
        Cached(2 rows, top 4 of 64 words)
        >>> p = gs.Pass("public", gs.losses.kl_divergence, refs={"reference": gs.losses.cached(path)})
    """
    return Cached(path, same_model)
