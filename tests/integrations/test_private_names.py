"""No private name of torch, transformers, accelerate, PEFT, TRL or Lightning is used without a check that it exists."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.integrations.private_names import names_overridden, names_used, source


def module_has(name: str) -> Callable[[], bool]:
    return lambda: name in vars(nn.Linear(1, 1)) or hasattr(nn.Module, name)


def in_source(text: str, *places: str) -> Callable[[], bool]:
    return lambda: any(text in source(place) for place in places)


def wrapped_by_accelerate() -> bool:
    hooks = pytest.importorskip("accelerate.hooks")
    return "_old_forward" in vars(hooks.add_hook_to_module(nn.Linear(1, 1), hooks.ModelHook()))


def wrapped_by_fabric() -> bool:
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    model = nn.Linear(1, 1)
    wrapper = fabric.setup(model)
    return type(wrapper).__name__ == "_FabricModule" and wrapper._modules["_forward_module"] is model


FSDP = ("torch.distributed.fsdp._fully_shard._fsdp_state", "torch.distributed.fsdp._fully_shard._fsdp_param")
MARKS = "torch.distributed.fsdp._fully_shard._fully_shard"

KNOWN: dict[str, Callable[[], bool]] = {
    # torch: what a module keeps
    **{
        name: module_has(name)
        for name in (
            "_backward_hooks",
            "_backward_pre_hooks",
            "_compiled_call_impl",
            "_forward_hooks",
            "_forward_hooks_always_called",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks",
            "_forward_pre_hooks_with_kwargs",
            "_load_state_dict_pre_hooks",
            "_non_persistent_buffers_set",
            "_parameters",
            "_state_dict_pre_hooks",
        )
    },
    "_BatchNorm": lambda: issubclass(nn.BatchNorm1d, nn.modules.batchnorm._BatchNorm),
    "_NormBase": lambda: issubclass(nn.BatchNorm1d, nn.modules.batchnorm._NormBase),
    "_ConvNd": lambda: issubclass(nn.Conv1d, nn.modules.conv._ConvNd),
    "_ConvTransposeNd": lambda: issubclass(nn.ConvTranspose1d, nn.modules.conv._ConvTransposeNd),
    "_DropoutNd": lambda: issubclass(nn.Dropout, nn.modules.dropout._DropoutNd),
    "_reversed_padding_repeated_twice": lambda: hasattr(nn.Conv1d(1, 1, 1), "_reversed_padding_repeated_twice"),
    # torch: compile and what is sharded
    "_dynamo": lambda: callable(torch._dynamo.maybe_mark_dynamic),
    "_functorch": lambda: isinstance(torch._functorch.config.donated_buffer, bool),
    "_orig_mod": lambda: "_orig_mod" in torch.compile(nn.Linear(1, 1), backend="eager")._modules,  # type: ignore[attr-defined]
    "_local_tensor": in_source("_local_tensor", "torch.distributed.tensor._api"),
    "_StridedShard": in_source("class _StridedShard", "torch.distributed.tensor.placement_types"),
    "torch.distributed.tensor._utils": in_source(
        "def compute_local_shape_and_global_offset", "torch.distributed.tensor._utils"
    ),
    "_get_fsdp_state": in_source("def _get_fsdp_state", MARKS),
    "_fsdp_param_group": in_source("_fsdp_param_group", FSDP[0]),
    "_fsdp_param_groups": in_source("_fsdp_param_group", FSDP[0]),  # several since torch 2.11, one before
    "_unsharded_param": in_source("_unsharded_param", FSDP[1]),
    "_fsdp_use_orig_params": in_source("_fsdp_use_orig_params", MARKS),
    "_is_fsdp_managed_module": in_source("_is_fsdp_managed_module", MARKS),
    # transformers
    "_attn_implementation": in_source("_attn_implementation", "transformers.PreTrainedConfig"),
    "_experts_implementation": in_source("_experts_implementation", "transformers.PreTrainedConfig"),
    "_heterogeneity_spec": lambda: True,  # of configs with other sizes in single layers; read where it is there
    "_init_weights": in_source("def _init_weights", "transformers.PreTrainedModel"),
    "_prepare_inputs": in_source("def _prepare_inputs(self, inputs", "transformers.Trainer"),
    # the others
    "_old_forward": wrapped_by_accelerate,
    "_active_adapter": in_source("_active_adapter", "peft.tuners.tuners_utils"),
    "_disable_adapters": in_source("_disable_adapters", "peft.tuners.tuners_utils"),
    "_FabricModule": wrapped_by_fabric,
    "_forward_module": wrapped_by_fabric,
}

OVERRIDDEN: dict[str, dict[str, list[str]]] = {
    "SurgeryTrainer": {"_set_signature_columns_if_needed": ["self"]},
    "SurgerySFTTrainer": {},
    "SurgeryGRPOTrainer": {
        "_generate_and_score_completions": ["self", "inputs"],
        "_set_signature_columns_if_needed": ["self"],
    },
    "_InOrder": {"_get_train_sampler": ["self", "train_dataset"]},
}
"""Private methods of trainers that ours replace, with the parameters that their callers give."""


def test_every_private_name_has_a_check() -> None:
    found = names_used()
    assert sorted(found) == sorted(KNOWN), {n: found.get(n, "no longer used") for n in {*found} ^ {*KNOWN}}


@pytest.mark.parametrize("name", KNOWN)
def test_a_private_name_is_there(name: str) -> None:
    if name.startswith(("_active", "_disable")):
        pytest.importorskip("peft")
    assert KNOWN[name]()


def test_private_methods_that_are_overridden_are_called_as_before() -> None:
    pytest.importorskip("trl")
    assert names_overridden() == OVERRIDDEN
