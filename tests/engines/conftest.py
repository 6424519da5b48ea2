"""One thread: these models are tiny, and threads only wait for each other."""

from typing import Any

import pytest
import torch

from tests.engines.equality import RANKS, on_ranks
from tests.engines.methods import CASES, QUICK

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def quick_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two processes: what is quick of the matrix of equality, and what may go wrong between ranks."""
    return ranks(tmp_path_factory, QUICK, [e for e in RANKS if e.endswith("accumulation")], ["tiered", "opposed"])


@pytest.fixture(scope="session")
def all_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same with everything."""
    return ranks(tmp_path_factory, list(CASES), RANKS, QUICK)


def ranks(factory: pytest.TempPathFactory, *given: Any) -> dict[str, Any]:
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    return on_ranks(factory.mktemp("ranks"), *given)
