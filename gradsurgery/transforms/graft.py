"""Give a live model the sizes of another config: tensors, attributes and configs of its own modules, undoable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.space import ParameterSpace

_PLAIN = (int, float, str, bool, type(None), tuple, list, torch.Size)


class Graft:
    """What changes between two builds of a class, applied to a model like the first.

    Args:
        model: The live model.
        old: Its class, built from its config on ``meta``.
        new: Its class, built from the new config on ``meta``.
    """

    def __init__(self, model: nn.Module, old: nn.Module, new: nn.Module) -> None:
        self.model, self.old, self.new = model, old, new
        self._undo: list[tuple[dict[str, Any], str, Any]] = []

    def obstacle(self) -> str:
        """Why the model cannot get the new sizes; empty if it can."""
        paths = [dict(m.named_modules()).keys() for m in (self.old, self.new)]
        if paths[0] != paths[1]:
            return "the modules themselves would change"
        new = dict(self.new.named_buffers())
        for name, buffer in self.old.named_buffers():
            if name not in new or new[name].shape != buffer.shape or not torch.equal(new[name], buffer):
                return f"buffer {name} would change, and its values are the class's own"
        return ""

    def apply(
        self, cut: Callable[[str, Tensor], Tensor], changed: Mapping[str, tuple[int, ...]], space: ParameterSpace
    ) -> None:
        """Put the changes into the model; ``cut(name, parameter)`` gives the new values of ``changed`` parameters."""
        made: dict[str, nn.Parameter] = {}
        live, new = (dict(m.named_modules()) for m in (self.model, self.new))
        for path, old in self.old.named_modules():
            module = live[path]
            for attribute, parameter in list(module._parameters.items()):
                name = space.canonical(f"{path}.{attribute}" if path else attribute) if parameter is not None else ""
                if name in changed:
                    if name not in made:
                        made[name] = nn.Parameter(cut(name, parameter.detach()), requires_grad=parameter.requires_grad)  # type: ignore[union-attr]
                    self._set(module._parameters, attribute, made[name])
            self._attributes(module.__dict__, old.__dict__, new[path].__dict__)

    def _attributes(self, live: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> None:
        for key, value in new.items():
            before = old.get(key)
            if hasattr(value, "to_dict") and hasattr(value, "model_type"):
                if key in live and live[key] is not None:
                    self._attributes(vars(live[key]), vars(before) if before is not None else {}, vars(value))
            elif isinstance(value, _PLAIN) and isinstance(before, _PLAIN) and (key not in old or value != before):
                self._set(live, key, value)

    def _set(self, target: dict[str, Any], key: str, value: Any) -> None:
        self._undo.append((target, key, target.get(key, _ABSENT)))
        target[key] = value

    def undo(self) -> None:
        while self._undo:
            target, key, value = self._undo.pop()
            if value is _ABSENT:
                target.pop(key, None)
            else:
                target[key] = value


_ABSENT = object()
