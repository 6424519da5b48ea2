"""The other way to key a checkpoint: load the model, swap, save; for those that are stored unlike they are used."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from gradsurgery.anatomy import Anatomy
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.cli.key.checkpoint import tensors_in, weight_files
from gradsurgery.errors import ArtefactError, KeyWarning, PlanError
from gradsurgery.keys import PermutationKey
from gradsurgery.keys.apply import check_tensors

SHARD = "2GB"
"""Written at once; what saving needs beside the model."""
NAMES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def exchange_loaded(source: Path, staging: Path, key: PermutationKey, anatomy: Anatomy, model: nn.Module) -> None:
    """Load as the class of ``model`` in the stored dtype, swap, and save as ``transformers`` saves it.

    Raises:
        ArtefactError: weights are missing or do not fit.
        PlanError: a buffer that moves with its units is not stored.
    """
    from transformers.utils import logging

    maker: Any = type(model)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        loaded, info = maker.from_pretrained(source, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtefactError(f"transformers does not load {source}: {str(error).strip().splitlines()[0]}") from error
    if absent := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ArtefactError(
            f"{source} lacks {len(absent)} weights of {maker.__name__}, e.g. {sorted(map(str, absent))[0]}."
        )
    if gap := anatomy.space.difference(ParameterSpace.of(loaded)):
        raise ArtefactError(f"{source} loads as another model than its config says: {gap}.")
    warn_of_casts(source, loaded)
    plan = key.plan(anatomy)
    parameters = {name: loaded.get_parameter(name) for name in plan.weights.names}
    check_tensors(plan.weights, parameters)
    if computed := sorted(set(plan.buffers.names) - loaded.state_dict().keys()):
        raise PlanError(f"{computed[0]} moves with its units and is computed at loading, so no checkpoint can be C2.")
    plan.weights(parameters)
    if plan.buffers.swaps:
        plan.buffers({name: loaded.get_buffer(name) for name in plan.buffers.names})
    loaded.save_pretrained(staging, max_shard_size=SHARD)


def warn_of_casts(source: Path, loaded: nn.Module) -> None:
    """Say that loading in one dtype rounds weights that are stored in a wider one."""
    stored = Counter(one.dtype for file in weight_files(source) for one in tensors_in(file).values())
    kept = {NAMES.get(str(p.dtype), "") for p in loaded.state_dict().values()}
    if lost := sorted(dtype for dtype in stored if dtype in NAMES.values() and dtype not in kept):
        warnings.warn(
            f"{source} stores {', '.join(f'{stored[d]} tensors in {d}' for d in lost)}, which transformers loads and "
            f"saves in another dtype.",
            KeyWarning,
            stacklevel=2,
        )
