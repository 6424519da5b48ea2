"""Exchanges of lines against the slow way, bit for bit; all of it or nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradsurgery.tensors import Exchange, Lines, LineSwap, exchange
from tests.tensors.draws import DTYPES, Board, boards, raw, slow_, values

many = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(raw(a[name]), raw(b[name])) for name in a)


@many
@given(boards())
def test_equals_the_slow_way_and_is_its_own_inverse(board: Board) -> None:
    found, wanted = board.copy(), board.copy()
    swap = Exchange(board.swaps)
    swap(found)
    slow_(wanted, board.swaps)
    assert same(found, wanted)
    swap(found)
    assert same(found, board.tensors)


@settings(many, max_examples=60)
@given(boards(dtypes=(torch.float32, torch.bfloat16)), st.integers(1, 64))
def test_buffers_of_any_size(board: Board, size: int) -> None:
    """Chunks of rows and blocks of columns of a few bytes give what large ones give."""
    wanted = board.copy()
    slow_(wanted, board.swaps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "CHUNK", size)
        patch.setattr(exchange, "CACHE", {"cpu": size})
        found = board.copy()
        swap = Exchange(board.swaps)
        swap(found)
        assert same(found, wanted)
        swap(found)
    assert same(found, board.tensors)


@settings(many, max_examples=60)
@given(boards(dtypes=(torch.float32,)), st.integers(0, 12))
def test_a_failure_leaves_everything_as_it_was(board: Board, stop: int) -> None:
    """Whichever write fails."""
    found, calls = board.copy(), iter(range(10**6))
    plain = {name: getattr(torch.Tensor, name) for name in ("index_copy_", "scatter_")}

    def failing(name: str) -> Any:
        def write(self: torch.Tensor, *args: Any) -> torch.Tensor:
            if next(calls) == stop:
                raise KeyboardInterrupt
            return plain[name](self, *args)

        return write

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "CHUNK", 16)
        patch.setattr(exchange, "CACHE", {"cpu": 16})
        for name in plain:
            patch.setattr(torch.Tensor, name, failing(name))
        try:
            Exchange(board.swaps)(found)
        except KeyboardInterrupt:
            pass
        else:
            return
    assert same(found, board.tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_dtypes(dtype: torch.dtype, dim: int) -> None:
    """Rows and columns of matrices, within one and between two."""
    tensors = {"a": values((48, 64), dtype, 1), "b": values((48, 64), dtype, 2)}
    one, other = np.array([5, 0, 47]), np.array([2, 46, 1])
    swaps = [LineSwap(Lines("a", dim, one), Lines("b", dim, other))]
    swaps.append(LineSwap(Lines("a", dim, np.array([7])), Lines("a", dim, np.array([9]))))
    board = Board(tensors, swaps)
    found, wanted = board.copy(), board.copy()
    Exchange(swaps)(found)
    slow_(wanted, swaps)
    assert same(found, wanted)
    assert not same(found, tensors)


def test_one_plan_serves_tensors_of_several_layouts() -> None:
    """Weights, their gradients in another dtype, their moments transposed."""
    swap = Exchange([LineSwap(Lines("a", 1, np.array([0, 3])), Lines("b", 1, np.array([2, 1])))])
    for dtype, order in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, (1, 0))):
        board = Board({n: values((6, 5), dtype, k, order) for k, n in enumerate("ab")}, list(swap.swaps))
        found, wanted = board.copy(), board.copy()
        swap(found)
        slow_(wanted, board.swaps)
        assert same(found, wanted)


def test_one_end_transposed() -> None:
    """A gradient may lie in memory otherwise than its partner's."""
    for dim in (0, 1):
        swap = Exchange([LineSwap(Lines("a", dim, np.array([0, 3])), Lines("b", dim, np.array([2, 1])))])
        for orders in ((None, (1, 0)), ((1, 0), None)):
            tensors = {
                n: values((6, 6), torch.float32, k, o) for k, (n, o) in enumerate(zip("ab", orders, strict=True))
            }
            board = Board(tensors, list(swap.swaps))
            found, wanted = board.copy(), board.copy()
            swap(found)
            slow_(wanted, board.swaps)
            assert same(found, wanted)


def test_versions_of_parameters_say_that_they_changed() -> None:
    parameters = {n: torch.nn.Parameter(torch.rand(4, 4)) for n in "ab"}
    loss = (parameters["a"] * parameters["b"]).sum()
    Exchange([LineSwap(Lines("a", 0, np.array([0])), Lines("b", 0, np.array([2])))])(parameters)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_is_left_on_the_graph() -> None:
    parameters = {n: torch.nn.Parameter(torch.rand(4, 4)) for n in "ab"}
    Exchange([LineSwap(Lines("a", 1, np.array([0])), Lines("b", 1, np.array([2])))])(parameters)
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in parameters.values())


@pytest.mark.parametrize("dim", [0, 1])
def test_expanded_tensors_are_refused(dim: int) -> None:
    """Several of their entries are one place in memory; nothing has moved."""
    tensors = {"a": torch.rand(4, 6), "b": torch.rand(1, 6).expand(4, 6)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    swap = Exchange([LineSwap(Lines("a", dim, np.array([0, 3])), Lines("b", dim, np.array([2, 1])))])
    with pytest.raises(RuntimeError):
        swap(tensors)
    assert same(tensors, before)
