"""Adapters with a quarantine: what flagged rows would teach goes into a part that is thrown away."""

from gradsurgery.adapters.adapter import Adapter
from gradsurgery.adapters.add import add
from gradsurgery.adapters.cosines import cosines
from gradsurgery.adapters.decide import decide
from gradsurgery.adapters.handle import Handle
from gradsurgery.adapters.kinds import Kinds
from gradsurgery.adapters.peft import PeftAdapter, from_peft
from gradsurgery.adapters.score import Quantile, Score
from gradsurgery.adapters.store import load

__all__ = [
    "Adapter",
    "Handle",
    "Kinds",
    "PeftAdapter",
    "Quantile",
    "Score",
    "add",
    "cosines",
    "decide",
    "from_peft",
    "load",
]
