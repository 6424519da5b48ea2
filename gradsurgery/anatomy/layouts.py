"""Layouts declared by hand, where discovery cannot find the units of a module or should not be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gradsurgery.anatomy.discovery.axes import Pattern, parse
from gradsurgery.errors import AnatomyError

KINDS = ("head", "neuron", "expert", "latent")


@dataclass(frozen=True)
class Layout:
    """How units lie in the weights of some modules, for ``gs.dissect(model, layouts=[…])``.

    Every tensor of a unit gets a pattern of named axes, as in einops: ``"(3 unit d) hidden"`` says that dimension 0 is
    three parts, each of which holds ``unit`` blocks of ``d`` rows. The axis ``unit`` counts the units; a dimension
    without it belongs to every unit whole; ``+`` puts unequal parts side by side (``"(unit d + rest) hidden"`` leaves
    the last rows out); ``...`` is any number of dimensions. Two more axes have a meaning: ``group`` counts the KV
    groups of heads (``unit`` then counts within a group), and what has ``group`` but not ``unit`` is shared by the
    heads of a group; ``expert`` counts the experts that neurons lie in, one group each.

    A declaration is accepted only after it passed the tests that discovery's own findings pass, on a randomised copy:
    swapping two units changes no output (heads that depend on their position, as with ALiBi, must be closed instead),
    the consumers are heard, and no entry that acts through one unit alone is left out. It then replaces what discovery
    found in the same entries.

    Args:
        kind: ``"head"``, ``"neuron"``, ``"expert"`` or ``"latent"``.
        modules: Path of a module, or several; ``*`` stands for one step of the path. Every match has its own group.
        producers: Pattern by parameter or persistent buffer: what makes the unit's activations. Paths are relative to
            the module (absolute with a leading ``/``); ``{unit}`` in a path counts tensors that are units whole.
        consumers: The same for the weights that read the activations.
        sizes: Sizes of axes that do not follow from the shapes: a number, or the name of a config field. Models that
            are examined on a tiny twin (large ones, and those on ``meta``) need names; numbers that belong to the class
            rather than to the config go into the pattern.

    Raises:
        AnatomyError: The declaration contradicts itself.

    Example:
        >>> attention = gs.Layout(
        ...     "head",
        ...     "model.layers.*.self_attn",
        ...     producers={
        ...         "q_proj.weight": "(group unit d) hidden",
        ...         "k_proj.weight": "(group d) hidden",
        ...         "v_proj.weight": "(group d) hidden",
        ...     },
        ...     consumers={"o_proj.weight": "hidden (group unit d)"},
        ...     sizes={"group": "num_key_value_heads", "d": 8},
        ... )
        >>> gs.dissect(model, layouts=[attention]) == anatomy
        True
    """

    kind: str
    modules: str | Sequence[str]
    producers: Mapping[str, str]
    consumers: Mapping[str, str]
    sizes: Mapping[str, int | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AnatomyError(
                f"a layout of {self.kind!r}: kinds are {', '.join(KINDS)}; KV groups are the axis `group`."
            )
        if not self.producers or not self.consumers or not self.globs:
            raise AnatomyError(
                f"a layout of kind {self.kind!r} needs modules, producers and consumers: one is missing."
            )
        if both := sorted(self.producers.keys() & self.consumers.keys()):
            raise AnatomyError(
                f"{both[0]} is declared as producer and as consumer; for one unit it is one or the other."
            )
        for path, pattern in self.patterns.items():
            where = f"layouts: {path}: {pattern.text!r}"
            counted = ("{unit}" in path) + ("unit" in pattern.names)
            shared = counted == 0 and "group" in pattern.names and path in self.producers
            if counted != 1 and not shared:
                raise AnatomyError(f"{where} must count units once: by the axis `unit`, or by {{unit}} in the path.")
            for axis in ("group", "expert"):
                if axis in self.axes - pattern.names:
                    raise AnatomyError(f"{where} lacks the axis `{axis}`, which other patterns of the layout have.")
        for axis, kind in (("group", "head"), ("expert", "neuron")):
            if axis in self.axes and kind != self.kind:
                raise AnatomyError(f"the axis `{axis}` belongs to layouts of kind {kind!r}; this one is {self.kind!r}.")
        for axis, size in self.sizes.items():
            if axis not in self.axes | {"unit"}:
                raise AnatomyError(f"sizes={{{axis!r}: …}}: no pattern has this axis; they have {sorted(self.axes)}.")
            if not isinstance(size, str) and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise AnatomyError(
                    f"sizes={{{axis!r}: {size!r}}}: give a positive number or the name of a config field."
                )

    @property
    def globs(self) -> tuple[str, ...]:
        return (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)

    @property
    def patterns(self) -> dict[str, Pattern]:
        """Pattern by path, producers first."""
        return {path: parse(text) for path, text in [*self.producers.items(), *self.consumers.items()]}

    @property
    def axes(self) -> set[str]:
        return set().union(*(pattern.names for pattern in self.patterns.values()))
