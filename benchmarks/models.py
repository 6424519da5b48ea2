"""The models of the columns: those of the papers and two Llamas, random weights; settings, and the batch that fills
one.

17m is that of `benchmarks.steps`; 34m and 254m are the GPT-Neo configurations of SGTM (Shilov et al. 2025, table 3)
and tiered alignment (El Feghali et al. 2026); 1b and 8b have the shapes of Llama 3.2 1B and Llama 3.1 8B, 70b those of
Llama 3.1 70B.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig, PretrainedConfig

from benchmarks.steps import HEADS, LAYERS, VOCABULARY, WIDTH

Run = Callable[[], None]


def neo(layers: int, width: int, heads: int, vocabulary: int = 50257, context: int = 1024) -> PretrainedConfig:
    """GPT-Neo, global and local attention in turn, output tied to the embedding, no dropout."""
    return GPTNeoConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        attention_types=[[["global", "local"], layers // 2]],
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=0,
    )


def llama(
    layers: int,
    width: int,
    neurons: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocabulary: int = 128_256,
    tied: bool = False,
) -> PretrainedConfig:
    """Llama 3: heads that share keys and values, gated MLPs, no biases."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "tiny": lambda: neo(2, 16, 4, vocabulary=64, context=32),
    "1m": lambda: llama(4, 128, 344, 4, 2, 32, vocabulary=2048),
    "17m": lambda: neo(LAYERS, WIDTH, HEADS, VOCABULARY),
    "34m": lambda: neo(8, 384, 32),
    "254m": lambda: neo(16, 1024, 32),
    "1b": lambda: llama(16, 2048, 8192, 32, 8, 64, tied=True),
    "8b": lambda: llama(32, 4096, 14336, 32, 8, 128),
    "70b": lambda: llama(80, 8192, 28672, 64, 8, 128),
}
TOKENS = {"tiny": 16, "1m": 256, "17m": 256, "34m": 256, "254m": 1024, "1b": 1024, "8b": 1024}
"""Of a row, where nothing else is asked for."""
LARGE = ("1b", "8b", "70b")
"""Trained in bf16 weights and moments: in fp32 the larger do not fit on one card."""
MOST, LEAST = 512, 2
"""Rows of a batch on an accelerator, where the search for the largest begins and ends: two make a mixed one."""


def empty(name: str) -> Any:
    """A model without weights, on ``meta``."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS[name]())


@dataclass(frozen=True)
class Setting:
    """What a column is measured in.

    Attributes:
        model: Name in `CONFIGS`.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: ``"fp32"``; ``"autocast"``, weights and moments in fp32 and bf16 autocast around a step's forward and
            backward; or ``"bf16"``, weights and moments in it.
        compile: Whether the stock model and that with the method are compiled, each for itself.
        batch: Rows of a batch.
        tokens: Of a row.
    """

    model: str
    device: str
    dtype: str
    compile: bool
    batch: int
    tokens: int

    @classmethod
    def of(cls, model: str, device: str, compile: bool = False, batch: int = 0, tokens: int = 0) -> Setting:
        """The setting of a device: fp32 and 4 rows on a CPU, bf16 and the largest batch (`fill`) elsewhere."""
        on_cpu = device.startswith("cpu")
        dtype = "fp32" if on_cpu else "bf16" if model in LARGE else "autocast"
        return cls(model, device, dtype, compile, batch or (4 if on_cpu else 0), tokens or TOKENS[model])

    def build(self) -> nn.Module:
        """The model with random weights, the same each time, in training mode."""
        torch.manual_seed(0)
        dtype = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(CONFIGS[self.model](), dtype=dtype)
        return model.train()

    def ids(self) -> torch.Tensor:
        """Token ids ``[batch, tokens]``, drawn at random."""
        generator = torch.Generator().manual_seed(0)
        words = CONFIGS[self.model]().vocab_size
        return torch.randint(0, words, (self.batch, self.tokens), generator=generator).to(self.device)

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast, where the setting asks for it."""
        if self.dtype != "autocast":
            return nullcontext()
        return torch.autocast(self.device.partition(":")[0], dtype=torch.bfloat16)

    def host(self, model: nn.Module) -> Any:
        """The model as it is called: compiled or as it is."""
        return torch.compile(model) if self.compile else model

    def describe(self) -> str:
        """One line: what was measured."""
        kept = {"fp32": "fp32", "bf16": "bf16 weights and moments", "autocast": "fp32 weights, bf16 autocast"}
        how = ", compiled" if self.compile else ""
        return f"{self.model}, {self.device}, {kept[self.dtype]}{how}, {self.batch} x {self.tokens} tokens"


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)


def twin(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Modules, parameters and an optimizer of their own around the memory of a model's weights and moments.

    A method can then be attached to one while the other stays the stock model, and both fit where one does; gradients
    are each one's own. The optimizer has made a step.
    """
    shared: dict[int, Any] = {id(b): b for b in model.buffers()}
    shared |= {id(p): nn.Parameter(p.data, p.requires_grad) for p in model.parameters()}
    other = copy.deepcopy(model, dict(shared))
    follower = optimizer_of(other)
    for parameter, state in optimizer.state.items():
        follower.state[shared[id(parameter)]] = state
    return other, follower


def stock_step(setting: Setting, model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> Run:
    """What a user writes."""
    host = setting.host(model)

    def step() -> None:
        with setting.precision():
            host(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fill(setting: Setting, start: int = MOST, least: int = LEAST) -> Setting:
    """The setting with the largest batch, halving from ``start``, of which three stock steps fit in memory, uncompiled.

    Raises:
        torch.OutOfMemoryError: not even ``least`` rows fit.
    """
    batch = start
    while True:
        found = replace(setting, batch=batch)
        try:
            steps(replace(found, compile=False), 3)
        except torch.OutOfMemoryError:
            if batch <= least:
                raise
            batch = max(batch // 2, least)
        else:
            return found
        finally:
            release()


def steps(setting: Setting, count: int) -> None:
    """Some stock steps on a model of their own."""
    model = setting.build()
    run = stock_step(setting, model, optimizer_of(model), setting.ids())
    for _ in range(count):
        run()


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
