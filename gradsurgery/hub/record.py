"""What a method did to a model, as data: passes, regions, and the fingerprints of keys, never a key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace, unwrap
from gradsurgery.formats import stamp
from gradsurgery.keys.key import PermutationKey
from gradsurgery.surgery.method import Method

KIND = "what a method did"


def record_of(method: Method, model: nn.Module, name: str, results: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Plain data: the library's version, the model's fingerprint, the method, its regions, and keys' fingerprints.

    Args:
        method: What trained the model.
        model: The model.
        name: What the method is called, for people: ``"SGTM"``.
        results: Figures to go with it, by name.

    Raises:
        PlanError, SelectionError, ArtefactError: the method does not fit the model.

    Example:
        >>> method = gs.methods.sgtm(anatomy, anatomy.heads[:, -1:])
        >>> record = gs.hub.record_of(method, model, "SGTM")
        >>> record["method"], [region["text"] for region in record["regions"]][-1]
        ('SGTM', 'heads[:, -1:]')
    """
    method.validate(model)
    space = ParameterSpace.of(unwrap(model))
    regions: dict[str, dict[str, Any]] = {}
    for region in regions_of(method):
        text = region.text or f"{region.numel():,} entries {region.digest}"
        regions.setdefault(text, {"text": text, "entries": region.numel(), "share": region.fraction})
    return {
        **stamp(KIND),
        "method": name,
        "model": space.model,
        "fingerprint": space.fingerprint,
        "describes": method.describe(),
        "regions": list(regions.values()),
        "keys": sorted({key.fingerprint for key in keys_of(method)}),
        "results": dict(results or {}),
    }


def regions_of(method: Method) -> Iterator[Region]:
    """Every region of every transform; what a key moves is named by the key alone."""
    for transform in (*(t for p in method.passes for t in p.under), *method.gradient, *method.update):
        if not isinstance(transform, PermutationKey):
            yield from transform.regions()


def keys_of(method: Method) -> Iterator[PermutationKey]:
    return (t for p in method.passes for t in p.under if isinstance(t, PermutationKey))
