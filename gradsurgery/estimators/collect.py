"""Hooks that sum second moments of what layers read, once for all layers that read the same tensor."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.errors import BatchError
from gradsurgery.estimators.covariance import Covariance
from gradsurgery.estimators.matrices import Layout
from gradsurgery.estimators.operands import Products
from gradsurgery.estimators.positions import Counted
from gradsurgery.estimators.targets import Target


@dataclass(frozen=True)
class Rows:
    """What happens to rows before they are summed; options of `activation_basis`."""

    centre: bool
    normalise: str | None
    winsorise: float | None

    def prepare(self, x: Tensor) -> Tensor:
        """``[…, rows, n]`` in fp32 (fp64 stays), limited and normalised row by row."""
        x = x if x.dtype == torch.float64 else x.float()
        if self.winsorise is not None and x.shape[-1] and x.shape[-2]:
            sizes = x.abs()
            if self.winsorise < 1:
                rank = max(round(self.winsorise * x.shape[-1]), 1)
                limit = sizes.kthvalue(rank, -1, keepdim=True).values
            else:
                limit = self.winsorise * x.square().mean(-1, keepdim=True).sqrt()
            x = torch.where(sizes > limit, limit.copysign(x), x)
        if self.normalise == "token":
            x = F.normalize(x, dim=-1)
        return x


class Collector:
    """Sums second moments for some targets while a model runs.

    Attributes:
        sums: By key, the name of the first target that reads an input.
        counted: The positions of the running batch that count.
    """

    def __init__(self, targets: Sequence[Target], rows: Rows, share: bool) -> None:
        self.targets = {target.name: target for target in targets}
        self.rows, self.share = rows, share
        self.sums: dict[str, Covariance] = {}
        self.counted: Counted
        self._layouts = {t.name: t.layout for t in targets if t.layout is not None}
        self._leader: dict[str, str] = {}
        self._first = True
        self._inputs: list[tuple[weakref.ref[Tensor], int, str]] = []
        self._calls: dict[str, int] = {}

    def key(self, name: str) -> str:
        return self._leader[name]

    def layout(self, name: str) -> Layout:
        return self._layouts[name]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on inside the block; gone after it, also on an exception."""
        with ExitStack() as stack:
            experts: dict[int, tuple[str, nn.Module, list[tuple[str, str]]]] = {}
            for target in self.targets.values():
                for path, module in target.owners:
                    if target.layout is None:
                        names = experts.setdefault(id(module), (path, module, []))[2]
                        names.append((target.name, target.name.rpartition(".")[2]))
                        continue
                    handle = module.register_forward_pre_hook(self._hook(target), with_kwargs=True)
                    stack.callback(handle.remove)
            for path, module, names in experts.values():
                handle = module.register_forward_hook(self._experts_hook(path, names), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _hook(self, target: Target) -> Any:
        name, layout = target.name, target.layout

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._calls[name] = self._calls.get(name, 0) + 1
            if self._lead(target, x) == name:
                assert layout is not None
                self._add(
                    name, self._conv_rows(name, module, x, layout) if layout.kind == "conv" else self._flat(name, x)
                )

        return before

    def _lead(self, target: Target, x: Tensor) -> str:
        """The target that sums this input: the first that reads it, the same in every batch."""
        name = target.name
        reads_alone = (
            not self.share or len(target.owners) > 1 or (target.layout is not None and target.layout.kind == "conv")
        )
        if reads_alone:
            return self._leader.setdefault(name, name)
        same = [lead for ref, version, lead in self._inputs if ref() is x and version == x._version]
        if name not in self._leader:
            self._leader[name] = same[0] if same and self._first else name
        elif self._leader[name] != name and self._leader[name] not in same:
            raise BatchError(
                f"{name} and {self._leader[name]} read one tensor at first and two now; give each its own basis: "
                f"share=False."
            )
        if self._leader[name] == name:
            self._inputs.append((weakref.ref(x), x._version, name))
        return self._leader[name]

    def _flat(self, name: str, x: Tensor) -> Tensor:
        keep = self.counted.rows(tuple(x.shape[:-1]), name)
        flat = x.detach().reshape(-1, x.shape[-1])
        return flat if keep is None else flat[keep.to(flat.device)]

    def _conv_rows(self, name: str, module: Any, x: Tensor, layout: Layout) -> Tensor:
        """Patches ``[rows, channels * offsets]``, of groups ``[group, rows, …]``, in the order of the weight."""
        if not self.counted.everything:
            raise BatchError(
                f"{name} reads patches, and some positions of this batch are padding, which patches mix in; leave the "
                f"module out (modules=…), or give batches in which every position counts."
            )
        if x.dim() == module.weight.dim() - 1:
            x = x.unsqueeze(0)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x.detach(), module._reversed_padding_repeated_twice, mode=mode)
        spatial = x.dim() - 2
        for d, (size, stride, dilation) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True)
        ):
            x = x.unfold(2 + d, (size - 1) * dilation + 1, stride)[..., ::dilation]
        x = x.movedim(1, 1 + spatial).flatten(0, spatial)  # [rows, channels, offsets …]
        return x.unflatten(1, (layout.groups, -1)).movedim(1, 0).flatten(2) if layout.groups > 1 else x.flatten(1)

    def _add(self, name: str, x: Tensor, at: int | None = None, stack: int | None = None) -> None:
        x = self.rows.prepare(x)
        if name not in self.sums:
            stack = x.shape[0] if x.dim() == 3 else stack
            self.sums[name] = Covariance(x.shape[-1], stack, self.rows.centre, x)
        self.sums[name].add(x, at)

    def _experts_hook(self, path: str, names: list[tuple[str, str]]) -> Any:
        """Run fused experts again on the tokens that count, and watch what each expert's matrices multiply."""
        running = False

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal running
            if running:
                return
            given = [*args, *kwargs.values()]
            x = next(value for value in given if isinstance(value, Tensor) and value.is_floating_point())
            keep = self.counted.rows(tuple(x.shape[:-1]), path)
            if keep is not None:
                if x.dim() != 2:
                    raise BatchError(f"{path} takes tokens {list(x.shape[:-1])}; padding cannot be left out.")
                rows, keep = x.shape[0], keep.to(x.device)
                cut = lambda v: v[keep] if isinstance(v, Tensor) and v.dim() and v.shape[0] == rows else v  # noqa: E731
                args, kwargs = tuple(map(cut, args)), {k: cut(v) for k, v in kwargs.items()}
            weights = {name: getattr(module, own) for name, own in names}
            running = True
            try:
                with Products(weights, self._seen):
                    module.forward(*args, **kwargs)
            finally:
                running = False

        return after

    def _seen(self, name: str, expert: int | None, x: Tensor, transposed: bool) -> None:
        self._calls[name] = self._calls.get(name, 0) + 1
        self._leader[name] = name
        self._layouts[name] = Layout("experts", transposed)
        (owner,) = self.targets[name].owners
        stack = owner[1].get_parameter(name.rpartition(".")[2]).shape[0]
        self._add(name, x.detach(), expert, stack)

    def end_of_batch(self) -> None:
        """Raise for nan, and for layers that shared a basis and were not called alike."""
        for name, leader in self._leader.items():
            if self._calls.get(name, 0) != self._calls.get(leader, 0):
                raise BatchError(
                    f"{name} and {leader} read one tensor at first, and one of them is not called here; give each its "
                    f"own basis: share=False."
                )
        if bad := [name for name, total in self.sums.items() if not total.finite]:
            raise BatchError(f"the input of {bad[0]} holds nan or inf (or its squares overflow in fp32).")
        self._first = False
        self._inputs.clear()
        self._calls.clear()

    def require_called(self) -> None:
        if missing := [name for name in self.targets if name not in self._leader]:
            raise BatchError(
                f"{', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''} never met an input in these "
                f"batches; leave what is not used out of modules=…"
            )
