"""Mixed batches for a training loop; collating for any torch loader; dropping rows as a data filter does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from gradsurgery.data.rows import Batch, Rows
from gradsurgery.data.sampling import MixedSampler
from gradsurgery.errors import DataError


class MixedBatches:
    """The batches of a ``MixedSampler``, collated: ``for batch in MixedBatches(rows, {"en": 4, "es": 4}): …``.

    Takes the sampler's arguments. A ``DataLoader(rows, batch_sampler=batches.sampler, collate_fn=collate)`` gives the
    same batches (with workers, the loader runs ahead: set the sampler's step from your own count when you resume).
    """

    def __init__(
        self,
        rows: Rows,
        per_batch: Mapping[str, int] | int,
        upsample: Mapping[str, float] | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> None:
        self.rows = rows
        self.sampler = MixedSampler(rows, per_batch, upsample, seed, steps)

    def batch(self, step: int) -> Batch:
        """Batch number ``step``, whatever the position."""
        return collate([self.rows[index] for index in self.sampler.indices(step)])

    def __iter__(self) -> Iterator[Batch]:
        for indices in self.sampler:
            yield collate([self.rows[index] for index in indices])

    def __len__(self) -> int:
        return len(self.sampler)

    def state_dict(self) -> dict[str, object]:
        """See ``MixedSampler.state_dict``."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """See ``MixedSampler.load_state_dict``."""
        self.sampler.load_state_dict(state)


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Rows to one batch, for a ``DataLoader`` or as a Hugging Face Trainer's ``data_collator``.

    Sequences of unequal length are padded on the right, with label -100 and with an ``attention_mask``, which is absent
    where nothing is padded. Every other column (``forget``, ``retain``, ``category``, …) is stacked as it is. A Trainer
    drops columns its model does not name before they get here: set ``remove_unused_columns=False``.
    """
    if not rows:
        raise DataError("there is no row to collate.")
    texts = [torch.as_tensor(row["input_ids"]).long() for row in rows]
    targets = [torch.as_tensor(row.get("labels", row["input_ids"])).long() for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {"input_ids": pad(texts, batch_first=True), "labels": pad(targets, batch_first=True, padding_value=-100)}
    if len({len(text) for text in texts}) > 1:
        batch["attention_mask"] = pad([torch.ones_like(text) for text in texts], batch_first=True)
    for name in rows[0]:
        if name not in ("input_ids", "labels", "attention_mask"):
            batch[name] = torch.stack([torch.as_tensor(row[name]) for row in rows])
    return batch


def drop_rows(batch: Batch, where: str = "forget") -> Batch:
    """The batch without the rows flagged in column ``where``: what a data filter trains on."""
    if where not in batch:
        raise DataError(f"the batch has no column {where!r}; it has {', '.join(batch)}.")
    keep = ~batch[where]
    if not keep.any():
        raise DataError(f"every row of the batch is flagged {where!r}: dropping them leaves nothing to train on.")
    return {name: column[keep] for name, column in batch.items()}
