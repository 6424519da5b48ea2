"""How much each rotated coordinate of a weight matters for some data: ``s = sum |dL / dW~|`` with ``W~ = W U``.

The gradient in rotated coordinates is the gradient rotated, ``dL/dW~ = G U`` (WaRP: Kim et al. 2023, ICLR, section
3.3). Sums are of absolute values, also over rows: the length of a row of ``G U`` is that of the row of ``G``, so
importances made of row lengths are the same in every basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gradsurgery.anatomy.adapters import base_of
from gradsurgery.anatomy.space import ParameterSpace, require_same_space, require_unpacked, unwrap
from gradsurgery.errors import ArtefactError, BatchError, PlanError
from gradsurgery.estimators.artefacts import read, require_basis, write
from gradsurgery.estimators.basis import Basis
from gradsurgery.estimators.data import DataDigest, examples_of, on_device
from gradsurgery.losses.causal_lm import causal_lm, count_tokens
from gradsurgery.losses.positions import is_encoder_decoder
from gradsurgery.losses.references.base import model_inputs
from gradsurgery.tensors import is_sharded

Form = Literal["entry", "row", "column"]
Per = Literal["batch", "sample", "token"]


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores of rotated coordinates; made by `importance`.

    Attributes:
        basis: The basis that they are in.
        form: ``"entry"``, ``"row"`` (of ``W~``) or ``"column"``.
        scores: fp32 by parameter name, of ``basis.rotated_shape(name)``, with 1 for what was summed over.
        about: Data, normalisation.
    """

    basis: Basis
    form: str
    scores: Mapping[str, Tensor]
    about: Mapping[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.scores[self.basis.canonical(name)]

    def save(self, path: str | Path) -> None:
        """One safetensors file with a manifest."""
        manifest = {"form": self.form, "about": dict(self.about), "basis": self.basis.digest}
        write(path, "importances", self.scores, manifest)

    @classmethod
    def load(cls, path: str | Path, basis: Basis) -> Importance:
        """Read what `save` wrote; raises ``ArtefactError`` where it was made in another basis."""
        manifest, scores = read(path, "importances")
        require_basis(manifest["basis"], basis, f"{path}: the importances")
        if missing := [name for name in basis.sites if name not in scores]:
            raise ArtefactError(f"{path} is damaged: it lacks the scores of {missing[0]}; estimate them again.")
        return cls(basis, manifest["form"], scores, manifest["about"])


def importance(
    model: nn.Module,
    basis: Basis,
    batches: Iterable[Mapping[str, Any]],
    loss: Callable[..., Tensor] = causal_lm,
    form: Form = "entry",
    per: Per = "batch",
    progress: bool = False,
) -> Importance:
    """Mean absolute gradient of a loss by the rotated coordinates of the weights that a basis speaks of.

    Gradients are taken in eval mode, rotated and added up one weight at a time, in fp32; those that the model holds
    already stay, and nothing of it changes.

    Args:
        model: The model.
        basis: From `activation_basis`, or `identity_basis` for importances of the original entries.
        batches: Model inputs with ``labels``.
        loss: As in `gs.Pass`: ``loss(outputs, batch, refs)``, a mean over its tokens.
        form: One score an entry of ``W~``, or the sum over each of its rows or columns (columns of ``W U`` belong to
            directions of the input).
        per: What a gradient is taken of, and what counts the same. ``"batch"``: the mean loss of every batch (the
            originals; depends on how rows are batched). ``"sample"``: the mean loss of every row, one backward each.
            ``"token"``: the mean loss of a batch, weighted by its number of tokens.
        progress: Show a bar.

    Raises:
        SelectionError: a basis of another model.
        BatchError: no batches, a loss or gradient that is not finite, weights that no gradient reaches.
        PlanError: options out of range, quantised or sharded weights.

    Example:
        >>> basis = gs.estimators.activation_basis(model, [batch], "down_proj")
        >>> scores = gs.estimators.importance(model, basis, [batch])
        >>> scores["model.layers.0.mlp.down_proj.weight"].shape
        torch.Size([32, 32])
    """
    if form not in ("entry", "row", "column") or per not in ("batch", "sample", "token"):
        raise PlanError(
            f"importance: form is entry, row or column, per is batch, sample or token; not {form!r}, {per!r}."
        )
    if isinstance(batches, Mapping):
        raise PlanError("importance takes several batches: write [batch].")
    base = unwrap(model)
    space = ParameterSpace.of(base)
    require_same_space(basis.space, space, "the basis")
    require_unpacked(space, basis.sites, "importance")
    own = dict(base.named_parameters())
    parameters = {name: own[name] for name in basis.sites}
    if sharded := [name for name, p in parameters.items() if is_sharded(p)]:
        raise PlanError(f"importance: {sharded[0]} is sharded; estimate importances before fully_shard.")
    sums = _Sums(basis, form, parameters)
    digest = DataDigest()
    weight_of_all = 0.0
    decoder = is_encoder_decoder({}, base)
    with _only(base, parameters), sums.listening():
        for number, batch in enumerate(tqdm(batches, desc="importances", unit="batch", disable=not progress)):
            digest.add(batch, number)
            batch = on_device(batch, base)
            parts: Iterable[dict[str, Any]] = examples_of(batch, _rows(batch)) if per == "sample" else [batch]
            for part in parts:
                outputs = base(**model_inputs(base_of(base), part, decoder))
                value = loss(outputs, part, {})
                if not torch.isfinite(value):
                    raise BatchError(f"importance, batch {number}: the loss is {value.item()}.")
                weight = float(_count(loss, part)) if per == "token" else 1.0
                (value * weight).backward()
                weight_of_all += weight
            sums.require_finite(number)
    if not weight_of_all:
        raise BatchError("importance: there are no batches, or none with a token to predict.")
    sums.require_reached()
    scores = {name: total.div_(weight_of_all) for name, total in sums.totals.items()}
    about = {"per": per, "loss": getattr(loss, "__name__", type(loss).__name__), "data": digest.hexdigest()}
    return Importance(basis, form, scores, about)


class _Sums:
    """Adds up ``|G U|`` as soon as a weight's gradient is there, and lets the gradient go."""

    def __init__(self, basis: Basis, form: str, parameters: Mapping[str, nn.Parameter]) -> None:
        self.basis, self.form, self.parameters = basis, form, parameters
        self.totals: dict[str, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        handles = [p.register_post_accumulate_grad_hook(self._hook(name)) for name, p in self.parameters.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def arrived(parameter: Tensor) -> None:
            assert parameter.grad is not None
            scores = rotated(self.basis, name, parameter.grad).abs_()
            if self.form != "entry":
                scores = scores.sum(-1 if self.form == "row" else -2, keepdim=True)
            self.totals[name] = self.totals[name].add_(scores) if name in self.totals else scores
            parameter.grad = None

        return arrived

    def require_finite(self, batch: int) -> None:
        for name, total in self.totals.items():
            if not total.sum().isfinite():
                raise BatchError(f"importance, batch {batch}: the gradient of {name} holds nan or inf.")

    def require_reached(self) -> None:
        if missing := [name for name in self.parameters if name not in self.totals]:
            raise BatchError(f"importance: no gradient reaches {', '.join(missing[:3])}; leave them out of the basis.")


def rotated(basis: Basis, name: str, tensor: Tensor) -> Tensor:
    """``X U`` (``V^T X`` at the output side) for a weight or its gradient, a new tensor in fp32 (fp64 stays)."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    matrices = basis.site(name).layout.matrices(tensor.detach()).to(dtype)
    vectors = basis.vectors[basis.site(name).key]
    if vectors is None:
        return matrices.clone()
    vectors = vectors.to(matrices)
    return matrices @ vectors if basis.side == "input" else vectors.mT @ matrices


@contextmanager
def _only(base: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside the block these parameters alone take gradients, from none on, in eval mode; then all is as before."""
    chosen = {id(p) for p in parameters.values()}
    before = [(p, p.requires_grad, p.grad) for p in base.parameters()]
    modes = {module: module.training for module in base.modules()}
    try:
        base.eval()
        for p, _, _ in before:
            p.requires_grad_(id(p) in chosen)
            p.grad = None
        with torch.enable_grad():
            yield
    finally:
        for p, trains, grad in before:
            p.requires_grad_(trains)
            p.grad = grad
        for module, training in modes.items():
            module.training = training


def _rows(batch: Mapping[str, Any]) -> int:
    return int(next(v for v in batch.values() if isinstance(v, Tensor) and v.dim()).shape[0])


def _count(loss: Any, batch: Mapping[str, Any]) -> Any:
    return loss.count(batch) if hasattr(loss, "count") else count_tokens(batch)
