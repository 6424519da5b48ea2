"""Rotated coordinates as a region: what transforms inside `gs.rotate` speak of."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradsurgery.anatomy.entries import Entries
from gradsurgery.anatomy.region import Region
from gradsurgery.errors import ArtefactError, PlanError
from gradsurgery.estimators.basis import Basis
from gradsurgery.estimators.masks import Masks


class Coordinates(Region):
    """Coordinates ``W~ = W U`` of some weights in a basis, for ``gs.rotate(basis, gs.freeze(gs.Coordinates(…)))``.

    They are no parameter entries: every one of them is spread over a row of its weight. A mask may be empty, of one
    weight or of all; what is not masked is as if there were no basis.

    Args:
        basis: The basis.
        mask: Bool tensors by parameter name, of ``basis.rotated_shape(name)``, with 1 along whole rows or columns, or
            ``[k]`` for whole directions; ``None`` means every direction that the basis keeps.

    Raises:
        SelectionError: names without a basis, masks that do not fit.
        ArtefactError: masks that were made in another basis.

    Example:
        >>> basis = gs.estimators.activation_basis(model, [batch], "down_proj", top_k=4)
        >>> gs.Coordinates(basis).count()
        256
        >>> method = gs.Method([gs.Pass("gpm")], update=[gs.rotate(basis, gs.freeze(gs.Coordinates(basis)))])
    """

    def __init__(self, basis: Basis, mask: Mapping[str, Tensor] | None = None) -> None:
        if not isinstance(basis, Basis):
            raise PlanError(f"Coordinates takes a basis first, not {type(basis).__name__}.")
        super().__init__(basis.space, {})
        if isinstance(mask, Masks) and mask.basis is not basis and mask.basis.digest != basis.digest:
            raise ArtefactError(
                f"these masks were made in another basis ({mask.basis!r}, {mask.basis.digest}; this one is {basis!r}, "
                f"{basis.digest})."
            )
        if mask is not None and not isinstance(mask, Masks):
            mask = Masks.of(basis, mask)
        self.basis, self.masks = basis, mask
        self.text = f"{self.count():,} coordinates of {len(self.names)} weights, {basis.side} basis {basis.digest}"

    @property
    def names(self) -> tuple[str, ...]:
        """The weights whose coordinates are meant."""
        return tuple(self.basis.sites if self.masks is None else self.masks)

    @property
    def entries(self) -> dict[str, Entries]:
        raise PlanError(
            "Coordinates are no parameter entries; put what acts on them into gs.rotate(basis, …), as in "
            "gs.rotate(basis, gs.freeze(gs.Coordinates(basis, mask)))."
        )

    @property
    def weights(self) -> Region:
        """The parameters that they are coordinates of."""
        return Region(self.space, {name: Entries.full(self.space.shapes[name]) for name in self.names})

    def numel(self) -> int:
        """Number of parameter entries that they are spread over."""
        return self.weights.numel()

    def count(self) -> int:
        """Number of coordinates."""
        if self.masks is not None:
            return self.masks.count()
        total = 0
        for name in self.names:
            size = 1
            for n in self.basis.rotated_shape(name):
                size *= n
            total += size
        return total

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"Coordinates({self.count():,} of {len(self.names)} weights, {self.basis!r})"
