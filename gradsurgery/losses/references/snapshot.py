"""The model as it was, at the price of the region that trains: the reference of a finetune without a second model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace, require_same_space, require_unpacked, unwrap
from gradsurgery.errors import ArtefactError, PlanError
from gradsurgery.losses.references.base import Reference, forward_logits
from gradsurgery.losses.references.kept import Kept, layout_of
from gradsurgery.tensors import settle
from gradsurgery.transforms.base import require_entries


class Snapshot(Reference):
    """The logits of the model with the entries of ``region`` as they were; made by `snapshot`.

    For the reference's forward the kept values and the live ones change places, part by part, so that memory peaks at
    the region's worth and one part. Afterwards, and on exceptions, the live values are back bit for bit.
    """

    def __init__(self, region: Region) -> None:
        require_entries(region, "snapshot")
        self.region = region
        self._kept: dict[str, Kept] = {}
        self._loaded: dict[str, Tensor] = {}
        self._model: weakref.ref[nn.Module] | None = None

    @property
    def taken(self) -> bool:
        return bool(self._kept or self._loaded)

    def take(self, model: nn.Module) -> None:
        """Copy the region's entries as they are now; an earlier copy goes. A surgery calls it when it is attached.

        Raises:
            SelectionError: the region belongs to another model.
            PlanError: its weights are quantised.
        """
        self._loaded = {}
        self._bind(model)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The reference's logits; a snapshot that was never taken is taken now.

        Call it before the pass's forward: a graph that is pending would see the same values again, but costs memory.

        Raises:
            PlanError: the snapshot was taken of another model, or before the model was sharded or cast.
        """
        with self.applied(model):
            return forward_logits(model, inputs)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the region has the values of the snapshot; no gradient step may run there."""
        base = unwrap(model)
        if not self._kept:
            self._bind(base)
        parameters = self._require_fit(base)
        swapped = dict.fromkeys(self._kept, 0)
        try:
            for name, kept in self._kept.items():
                for number in kept.exchange_(parameters[name]):
                    swapped[name] = number
            settle(base)
            yield
        finally:
            settle(base)
            for name, kept in self._kept.items():
                for _ in kept.exchange_(parameters[name], most=swapped[name]):
                    pass

    def state_dict(self) -> dict[str, Tensor]:
        """The kept values by parameter, flat, in the order of the region's entries (of all ranks; no copy if plain)."""
        if self._loaded or not self._kept:
            return dict(self._loaded)
        base = self._model() if self._model is not None else None
        if base is None:
            raise PlanError("the model that this snapshot was taken of is gone.")
        parameters = self._require_fit(base)
        return {name: kept.all_values(parameters[name]) for name, kept in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Keep these values instead, so that a resumed run has the reference of the first one.

        Raises:
            ArtefactError: they are of another region.
        """
        expected = {name: part.numel() for name, part in self.region.entries.items()}
        given = {name: value.numel() for name, value in state.items()}
        if state and given != expected:
            name = next(n for n in {**expected, **given} if expected.get(n) != given.get(n))
            raise ArtefactError(
                f"this state keeps {given.get(name, 0)} entries of {name}, snapshot({self.region.text or 'region'}) "
                f"has {expected.get(name, 0)}; resume with the region of the first run."
            )
        self._loaded = {name: value.detach().reshape(-1).clone() for name, value in state.items()}
        self._kept, self._model = {}, None

    def describe(self) -> str:
        return f"snapshot({self.region.text or self.region.digest})"

    def _bind(self, model: nn.Module) -> None:
        """Keep the entries of a model: those it has, or those that were loaded."""
        base = unwrap(model)
        settle(base)
        space = ParameterSpace.of(base)
        require_same_space(self.region.space, space, f"the region of {self.describe()}")
        require_unpacked(space, self.region.entries, self.describe())
        parameters = dict(base.named_parameters())
        kept = {}
        with torch.no_grad():
            for name, entries in self.region.entries.items():
                kept[name] = Kept(parameters[name], entries)
                if (values := self._loaded.get(name)) is not None:
                    if values.dtype != kept[name].values.dtype:
                        raise PlanError(
                            f"{self.describe()} was saved in {values.dtype}, {name} now is {kept[name].values.dtype}; "
                            f"load the model in the dtype of the first run."
                        )
                    kept[name].set_(parameters[name], values)
        self._kept, self._loaded, self._model = kept, {}, weakref.ref(base)

    def _require_fit(self, base: nn.Module) -> dict[str, Tensor]:
        """The model's parameters, after checking that the kept values are theirs."""
        if self._model is None or self._model() is not base:
            raise PlanError(f"{self.describe()} was taken of another model; call take(model) for this one.")
        settle(base)
        parameters: dict[str, Tensor] = dict(base.named_parameters())
        for name, kept in self._kept.items():
            if (now := layout_of(parameters[name])) != kept.layout:
                raise PlanError(
                    f"{self.describe()}: {name} was {kept.layout} when the snapshot was taken and is {now} now; cast "
                    f"and shard the model first, then attach, or call take(model) again."
                )
            if kept.values.device != (device := parameters[name].device):
                kept.values = kept.values.to(device)
        return parameters


def snapshot(region: Region) -> Snapshot:
    """The model with the entries of ``region`` as they are when the surgery is attached, as the reference.

    If only ``region`` trains, that is the frozen model: a finetune of 20% of the weights keeps 20%, not a second model.

    Raises:
        SelectionError: ``region`` is empty, or of another model (when it is taken).

    Example:
        >>> region = anatomy.neurons[:, :16]
        >>> reference = gs.losses.snapshot(region)
        >>> before = reference(model, batch)                # taken here, if no surgery took it before
        >>> _ = gs.ablate_(model, region)
        >>> torch.equal(reference(model, batch), before)
        True
    """
    return Snapshot(region)
