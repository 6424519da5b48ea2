"""The sample of the zoo: every architecture is taken apart right and completely, in a few seconds together."""

from __future__ import annotations

import warnings

import pytest

from tests.zoo.sample import SAMPLE
from tests.zoo.sweep import examine, names

pytestmark = pytest.mark.filterwarnings("ignore")


def known(name: str) -> bool:
    """Whether the installed transformers has the architecture."""
    return name in names()


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str) -> None:
    if not known(name):
        pytest.skip("not in this release of transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = examine(name)
    assert found["status"] == "right", found["why"]


def test_sample_is_large_enough() -> None:
    assert len([name for name in SAMPLE if known(name)]) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", names())
def test_every_architecture(name: str, seed: int) -> None:
    found = examine(name, seed)
    if found["status"] in ("not built", "refused"):
        pytest.skip(found["why"])
    assert found["status"] == "right", found["why"]
