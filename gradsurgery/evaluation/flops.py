"""Training FLOPs of a transformer, and tokens per second.

    C = tokens * (6 N + 12 L H T)      L layers, H = width of all heads together, T = context length

6 N: two FLOPs for each parameter and token in the forward, four in the backward. The second term is attention's
scores and weighted sum, 2 * 2 T H forward and twice that backward for each layer (Kaplan et al. 2020, arXiv 2001.08361;
Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from gradsurgery.errors import DataError


def training_flops(parameters: int, tokens: int, *, layers: int = 0, width: int = 0, context: int = 0) -> float:
    """``tokens * (6 * parameters + 12 * layers * width * context)``; the attention term is 0 without its numbers.

    ``parameters`` are those that multiply each token: leave out embeddings that are only looked up.
    """
    for name, number in (("parameters", parameters), ("tokens", tokens), ("layers", layers), ("context", context)):
        if number < 0:
            raise DataError(f"{name}={number} is negative.")
    return float(tokens) * (6.0 * parameters + 12.0 * layers * width * context)


def model_flops(model: nn.Module, tokens: int, context: int) -> float:
    """``training_flops`` with the numbers of a Hugging Face model.

    Every parameter counts but the embeddings; a tied token embedding counts once, as the output projection it is.
    """
    hugging_face: Any = model
    text = hugging_face.config.get_text_config()
    output = getattr(hugging_face.get_output_embeddings(), "weight", None)
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not output}
    parameters = sum(p.numel() for p in model.parameters() if id(p) not in looked_up)
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    return training_flops(parameters, tokens, layers=text.num_hidden_layers, width=width, context=context)


class Throughput:
    """Tokens per second since it was made or last reset: ``meter.add(tokens)``, ``meter.per_second``."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.tokens, self._start = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count tokens that have been processed."""
        self.tokens += tokens

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def per_second(self) -> float:
        """Tokens per second so far."""
        return self.tokens / max(self.seconds, 1e-9)
