"""The state of a surgery beside a checkpoint: ``surgery.json``, and ``surgery.safetensors`` for tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import ArtefactError
from gradsurgery.files import atomic_path, read_json, write_json
from gradsurgery.formats import stamp, upgraded
from gradsurgery.surgery.method import references_of
from gradsurgery.tensors import aligned, is_sharded

if TYPE_CHECKING:
    from gradsurgery.surgery.method import Method
    from gradsurgery.surgery.slots import Slots
    from gradsurgery.surgery.stepping import Stepper

NAME, KIND = "surgery", "the state of a surgery"
REFERENCE, SLOT = "reference/", "slot/"


def state_of(method: Method, model: nn.Module, stepper: Stepper, slots: Slots) -> dict[str, Any]:
    """Version, model fingerprint, method, step, what stateful transforms keep, by their position, and kept slots."""
    space = ParameterSpace.of(model)
    state: dict[str, Any] = {**stamp(KIND, "version"), "fingerprint": space.fingerprint, "method": method.describe()}
    state["step"] = stepper.step
    transforms = (*method.gradient, *method.update)
    for name, reference in references_of(method).items():
        values: Mapping[str, Tensor] = reference.state_dict() if hasattr(reference, "state_dict") else {}
        if values:
            state.setdefault("references", {})[name] = dict(values)
    kept = {
        str(k): {name: whole(value) for name, value in s.items()}
        for k, (t, s) in enumerate(zip(transforms, stepper.states, strict=True))
        if t.traits.stateful
    }
    if kept:
        state["transforms"] = kept
    for slot in method.keep:
        if slot in slots:
            held = {name: whole(grad) for name, grad in slots[slot].items()}
            state.setdefault("slots", {})[slot] = {"filled": slots.filled[slot].step, "grads": held}
    return state


def whole(value: Any) -> Any:
    """A sharded tensor gathered, which all ranks must do; anything else as it is."""
    return value.full_tensor() if is_sharded(value) else value


def take_state(state: Mapping[str, Any], method: Method, model: nn.Module, stepper: Stepper, slots: Slots) -> None:
    """Check a state against method and model, then continue from it; nothing changes if it does not fit."""
    mine = state_of(method, model, stepper, slots)
    if missing := {"step", "fingerprint", "method"} - set(state):
        raise ArtefactError(f"this is no surgery state: it has no {', '.join(sorted(missing))}.")
    for key in ("fingerprint", "method"):
        if state[key] != mine[key]:
            raise ArtefactError(f"this surgery state was saved with another {key}: {state[key]}, here {mine[key]}.")
    kept, own = state.get("transforms", {}), mine.get("transforms", {})
    if set(kept) != set(own):
        raise ArtefactError(f"this surgery state keeps transforms {sorted(kept)}, the method has {sorted(own)}.")
    held, references = state.get("references", {}), references_of(method)
    if set(held) != set(mine.get("references", {})):
        raise ArtefactError(
            f"this surgery state keeps references {sorted(held)}, the method has {sorted(mine.get('references', {}))}."
        )
    parameters = dict(model.named_parameters())
    filled = state.get("slots", {})
    for slot, kept_slot in filled.items():
        for name, grad in kept_slot["grads"].items():
            if slot not in method.keep or name not in parameters or grad.shape != parameters[name].shape:
                raise ArtefactError(
                    f"this surgery state keeps a slot {slot!r} that does not fit the method or {name!r}."
                )
    for key, values in held.items():
        references[key].load_state_dict(values)
    for key, values in kept.items():
        own_values = {name: v.clone() if isinstance(v, Tensor) else v for name, v in values.items()}
        stepper.states[int(key)].update(own_values)
    stepper.step = int(state["step"])
    stepper.new_window(slots)
    slots.clear()
    for slot, kept_slot in filled.items():
        grads = {n: aligned(g.clone(), parameters[n].detach()) for n, g in kept_slot["grads"].items()}
        slots.replace(slot, grads, int(kept_slot["filled"]))


def save_state(state: Mapping[str, Any], directory: str | Path) -> None:
    """Write a state beside a checkpoint."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {key: {} for key in state.get("transforms", {})}
    for key, values in state.get("transforms", {}).items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
            else:
                plain[key][name] = value
    for key, values in state.get("references", {}).items():
        for name, value in values.items():
            tensors[f"{REFERENCE}{key}/{name}"] = value.detach().cpu().contiguous()
    for slot, kept in state.get("slots", {}).items():
        for name, value in kept["grads"].items():
            tensors[f"{SLOT}{slot}/{name}"] = value.detach().cpu().contiguous()
    directory = Path(directory)
    if tensors:
        with atomic_path(directory / f"{NAME}.safetensors") as beside:
            save_file(tensors, beside)
    about = {**state, "transforms": plain} if "transforms" in state else dict(state)
    if "references" in state:
        about["references"] = {key: {} for key in state["references"]}
    if "slots" in state:
        about["slots"] = {slot: {"filled": kept["filled"]} for slot, kept in state["slots"].items()}
    write_json(directory / f"{NAME}.json", about)


def load_state(directory: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        ArtefactError: no ``surgery.json`` there, or a truncated file.
    """
    directory = Path(directory)
    path = directory / f"{NAME}.json"
    state = upgraded(read_json(path, KIND), KIND, path, "resume from a checkpoint of a surgery", before=1)
    tensors = directory / f"{NAME}.safetensors"
    for kept in state.get("slots", {}).values():
        kept.setdefault("grads", {})
    if state.keys() & {"transforms", "references", "slots"} and tensors.exists():
        try:
            loaded = load_file(tensors)
        except SafetensorError as error:
            raise ArtefactError(f"{tensors} is truncated or no safetensors file ({error}).") from None
        for key, value in loaded.items():
            if key.startswith(SLOT):
                slot, name = key.removeprefix(SLOT).rsplit("/", 1)
                state["slots"][slot]["grads"][name] = value
                continue
            if key.startswith(REFERENCE):
                reference, name = key.removeprefix(REFERENCE).rsplit("/", 1)
                state["references"].setdefault(reference, {})[name] = value
                continue
            number, name = key.split("/", 1)
            state["transforms"].setdefault(number, {})[name] = value
    return state
