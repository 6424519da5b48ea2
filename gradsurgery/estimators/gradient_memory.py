"""Stored gradients of earlier examples: what later tasks stay orthogonal to.

Farajtabar et al. 2020, "Orthogonal Gradient Descent for Continual Learning", arXiv 1910.07104, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace, require_same_space, unwrap
from gradsurgery.errors import ArtefactError, DataError, PlanError, SelectionError
from gradsurgery.estimators.artefacts import read, write
from gradsurgery.estimators.data import examples_of, on_device
from gradsurgery.estimators.gram_schmidt import Vector, inner, orthonormalise_
from gradsurgery.losses.causal_lm import causal_lm, shifted_labels
from gradsurgery.losses.cross_entropy import IGNORED
from gradsurgery.losses.references.base import evaluating, model_inputs
from gradsurgery.tensors import Box, is_sharded
from gradsurgery.tensors.dots import aligned, in_boxes_only
from gradsurgery.transforms.engine.program import box_columns

KIND = "a gradient memory"
Loss = Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Tensor]


@dataclass(frozen=True, eq=False)
class GradientMemory:
    """Gradients by parameter name; made by `gradient_memory`, read by ``gs.project(away_from=memory)``.

    Attributes:
        vectors: One mapping of parameter names to tensors a gradient, in fp32 (fp64 of a double model); parameters
            that it does not name count as zero.
        space: The parameters of the model that they are gradients of.
        of: What was differentiated.
        orthonormal: Whether the vectors are orthonormal.
        region: Text form of the region that they are cut to; empty for all that trained.
    """

    vectors: tuple[Vector, ...]
    space: ParameterSpace
    of: str
    orthonormal: bool
    region: str = ""

    def __len__(self) -> int:
        return len(self.vectors)

    def describe(self) -> str:
        return f"{len(self)} gradients of {self.of}"

    def __repr__(self) -> str:
        size = sum(part.numel() * part.element_size() for vector in self.vectors for part in vector.values())
        kind = "orthonormal " if self.orthonormal else ""
        return f"GradientMemory({len(self)} {kind}gradients of {self.of}, {size / 1e6:,.1f} MB)"

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; every rank calls it, and the first one writes.

        Raises:
            ArtefactError: the file cannot be written; nothing is left of it.
        """
        tensors = {}
        for k, vector in enumerate(self.vectors):
            for name, part in vector.items():
                whole = part.full_tensor() if is_sharded(part) else part  # type: ignore[attr-defined]
                tensors[f"{k}/{name}"] = whole.detach().cpu()
        space = {name: value for name, value in asdict(self.space).items() if name != "quantised"}
        about = {"fingerprint": self.space.fingerprint, "space": space, "count": len(self)}
        about |= {"of": self.of, "orthonormal": self.orthonormal, "region": self.region}
        if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            write(path, KIND, tensors, about)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> GradientMemory:
        """Read a memory for a model; its parts lie where the model's parameters lie, and sharded like them.

        Raises:
            ArtefactError: missing, damaged, or made for another model; the message says what differs.

        Example:
            >>> import tempfile
            >>> path = tempfile.mkdtemp() + "/memory.safetensors"
            >>> gs.estimators.gradient_memory(model, [batch], count=2).save(path)
            >>> len(gs.estimators.GradientMemory.load(path, model))
            2
        """
        about, tensors = read(path, KIND)
        try:
            stored = about["space"]
            shapes = {name: tuple(map(int, shape)) for name, shape in stored["shapes"].items()}
            space = ParameterSpace(stored["model"], shapes, stored["aliases"], stored["layout"])
            if gap := space.difference(ParameterSpace.of(model)):
                raise ArtefactError(f"{path} fits another model: {gap}. Take the gradients of this model again.")
            parameters = dict(unwrap(model).named_parameters())
            vectors: list[Vector] = [{} for _ in range(int(about["count"]))]
            for key, part in tensors.items():
                number, name = key.split("/", 1)
                vectors[int(number)][name] = aligned(part, parameters[name])
            if not all(vectors):
                raise ValueError("gradients are missing")
            return cls(tuple(vectors), space, str(about["of"]), bool(about["orthonormal"]), str(about["region"]))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise ArtefactError(f"{path} is damaged ({error!r}); take the gradients again.") from None


def gradient_memory(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    count: int,
    of: Literal["loss", "label_logit"] = "loss",
    region: Region | None = None,
    orthonormal: bool = True,
    loss: Loss = causal_lm,
    extend: GradientMemory | None = None,
) -> GradientMemory:
    """The gradients of ``count`` single examples, in eval mode.

    A memory takes four bytes an entry and gradient: 100 gradients of 135 million parameters are 54 GB, so give large
    models a region. The model's own gradients stay as they are.

    Args:
        model: The model after the task whose predictions later tasks are to leave alone.
        batches: Examples of that task; those without labels are passed over. On several ranks all of them give the
            same ones.
        count: How many examples to take, in order.
        of: What is differentiated, the ``"loss"``, or ``"label_logit"``, the mean logit of an example's labels, which
            the paper found best: the loss's gradient vanishes where the task is learned, the logit's does not.
        region: Entries that are kept; all that train by default.
        orthonormal: Take out of every gradient what the ones before it span, and normalise it (Gram-Schmidt, twice);
            those that add no direction are left out.
        loss: The loss, where ``of="loss"``.
        extend: A memory of earlier tasks, whose vectors come first.

    Raises:
        DataError: fewer examples with a gradient than ``count``.
        PlanError: ``count`` or ``of`` out of range, or a memory of another kind or model to extend.
        SelectionError: nothing of ``region`` trains.

    Example:
        >>> gs.estimators.gradient_memory(model, [batch], count=2)
        GradientMemory(2 orthonormal gradients of loss, 0.1 MB)
    """
    base = unwrap(model)
    space = ParameterSpace.of(base)
    if type(count) is not int or count < 1:
        raise PlanError(f"gradient_memory: count is a positive number of examples, not {count!r}.")
    if of not in ("loss", "label_logit"):
        raise PlanError(f'gradient_memory: of is "loss" or "label_logit", not {of!r}.')
    if extend is not None and (extend.orthonormal != orthonormal or extend.space.difference(space)):
        gap = extend.space.difference(space) or f"orthonormal={extend.orthonormal} there, {orthonormal} here"
        raise PlanError(f"gradient_memory: the memory to extend does not go with this one: {gap}.")
    kept = _kept(base, space, region)
    vectors: list[Vector] = list(extend.vectors) if extend is not None else []
    found = 0
    for example in _examples(batches, base):
        vector = _gradient(base, example, of, loss, kept)
        if not inner(vector, vector):
            continue
        found += 1
        if not orthonormal or orthonormalise_(vector, vectors):
            vectors.append(vector)
        if found == count:
            text = "" if region is None else region.text or region.digest
            return GradientMemory(tuple(vectors), space, of, orthonormal, text)
    raise DataError(f"gradient_memory: {count} gradients were asked for, and {found} examples of the batches have one.")


def _kept(base: nn.Module, space: ParameterSpace, region: Region | None) -> dict[str, list[Box] | None]:
    """By parameter, the parts that are kept; None for all of it."""
    trained = [name for name, p in base.named_parameters() if p.requires_grad]
    if region is None:
        kept: dict[str, list[Box] | None] = dict.fromkeys(trained)
    else:
        require_same_space(region.space, space, f"gradient_memory: region {region.text or 'given'}")
        parts = {name: region.of(name) for name in trained if name in region.entries}
        kept = {
            name: None if part.whole else [box_columns(box, part.shape) for box in part.boxes()]
            for name, part in parts.items()
        }
    if not kept:
        raise SelectionError("gradient_memory: no parameter that is asked for trains, so there is no gradient to keep.")
    return kept


def _examples(batches: Iterable[Mapping[str, Any]], base: nn.Module) -> Iterator[dict[str, Any]]:
    for batch in batches:
        sizes = [value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()]
        yield from examples_of(on_device(batch, base), sizes[0] if sizes else 0)


def _gradient(
    base: nn.Module, example: dict[str, Any], of: str, loss: Loss, kept: Mapping[str, list[Box] | None]
) -> Vector:
    """The gradient on one example; ``.grad`` is taken aside, since sharded models reduce only into it."""
    parameters = {name: p for name, p in base.named_parameters() if p.requires_grad}
    aside = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    try:
        decoder = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
        takes_labels = decoder or getattr(loss, "takes_labels", False)
        with evaluating(base), torch.enable_grad():
            outputs = base(**model_inputs(base, example, takes_labels))
            value = loss(outputs, example, {}) if of == "loss" else label_logit(outputs.logits, example)
            value.backward()
        out: Vector = {}
        for name, boxes in kept.items():
            if (grad := parameters[name].grad) is not None:
                part = grad.detach().to(torch.promote_types(grad.dtype, torch.float32))
                out[name] = part if boxes is None else in_boxes_only(part, boxes)
        return out
    finally:
        for name, p in parameters.items():
            p.grad = aside[name]


def label_logit(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Mean logit of the token that comes next, over the labelled positions."""
    targets = shifted_labels(batch).to(logits.device)
    counted = targets != IGNORED
    picked = logits.gather(-1, targets.masked_fill(~counted, 0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
