"""A keyed tier as it was: the reference that anchors one tier while another is finetuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradsurgery.anatomy.space import unwrap
from gradsurgery.keys.key import PermutationKey
from gradsurgery.losses import Snapshot
from gradsurgery.losses.references.base import Reference, forward_logits


class KeyedSnapshot(Reference):
    """The logits of a snapshot under a key: the kept values go in in C1, then the key turns the model.

    Args:
        snapshot: The entries that train, as they were.
        key: The tier.
    """

    def __init__(self, snapshot: Snapshot, key: PermutationKey) -> None:
        self.snapshot, self.key = snapshot, key

    @property
    def source(self) -> Snapshot:
        """What is taken and saved: several tiers may share it."""
        return self.snapshot

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        base = unwrap(model)
        with self.snapshot.applied(base), self.key.applied(base, gradients=False):
            return forward_logits(model, inputs)

    def describe(self) -> str:
        return f"{self.snapshot.describe()} under {self.key.describe()}"
