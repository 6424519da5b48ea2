"""Keys over the whole sample of architectures: what a key may join, that it moves just that, and that it leads back."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from typing import Any

import pytest
import torch

import gradsurgery as gs
from gradsurgery.errors import SelectionError
from tests.keys.cases import bits, same, slots_of, slow_, tensors_of, traces
from tests.zoo.builder import runnable
from tests.zoo.sample import SAMPLE
from tests.zoo.sweep import MAPPINGS, names

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def key_of(anatomy: gs.Anatomy) -> gs.PermutationKey | None:
    """A key as large as the model has swaps for; None where no two layers have a unit alike."""
    for fraction, ratio in itertools.product((0.2, 0.1, 0.05, 0.5), (0.5, 0.25, 0.0, 1.0)):
        with contextlib.suppress(SelectionError):
            return gs.PermutationKey.generate(anatomy, fraction=fraction, attention_ratio=ratio, seed=0)
    return None


@pytest.mark.parametrize("name", SAMPLE)
def test_there_and_back(name: str) -> None:
    if name not in names():
        pytest.skip("not in this release of transformers")
    group, kind = name.split("/")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, run, _ = runnable(kind, MAPPINGS[group][0])
        anatomy = gs.dissect(model)
    if (key := key_of(anatomy)) is None:
        pytest.skip("no two layers have a unit alike")
    slots: Any = slots_of(anatomy, model)
    state, left = tensors_of(model), traces(model)
    before, wanted = bits(state), {n: t.detach().clone() for n, t in state.items()}
    slow_(wanted, slots, key)
    with torch.no_grad():
        public = run(model)
        key.apply_(model, anatomy=anatomy)
        assert same(bits(tensors_of(model)), bits(wanted))
        keyed = run(model)
        key.unapply_(model)
        assert torch.equal(run(model), public)
    assert same(bits(tensors_of(model)), before)
    assert traces(model) == left
    assert float((keyed - public).abs().max()) > 1e-6 * float(public.abs().max())
