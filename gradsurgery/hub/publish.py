"""Write a checkpoint with its card and record into a folder, send it to the hub, and read the record back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gradsurgery.adapters.host import Adapted
from gradsurgery.anatomy.space import ParameterSpace, unwrap
from gradsurgery.errors import ArtefactError, PlanError
from gradsurgery.files import atomic_folder, read_json, write_json, write_text
from gradsurgery.formats import upgraded
from gradsurgery.hub.card import model_card
from gradsurgery.hub.record import KIND, record_of
from gradsurgery.keys.configuration import require_c1
from gradsurgery.keys.lists import LISTS
from gradsurgery.surgery.method import Method

RECORD = "gradsurgery_method.json"


def save_pretrained(
    model: Any,
    method: Method,
    folder: str | Path,
    name: str,
    results: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    **card: Any,
) -> Path:
    """A stock checkpoint with its tokenizer, ``README.md`` and ``gradsurgery_method.json``; whole or not at all.

    Args:
        model: A transformers model, in C1.
        method: What trained it.
        folder: Must not hold anything yet.
        name, results: As for `record_of`.
        tokenizer: Goes with it.
        **card: As for `model_card`.

    Raises:
        KeyStateError: the model is keyed, and would give the key away.
        PlanError: no ``save_pretrained``, or a method of another model.
        ArtefactError: the folder is there already.

    Example:
        >>> import tempfile
        >>> method = gs.methods.sgtm(anatomy, anatomy.heads[:, -1:])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     out = gs.hub.save_pretrained(model, method, f"{folder}/mine", "SGTM")
        ...     record = gs.hub.load_record(out, model)
        >>> record["method"]
        'SGTM'
    """
    base: Any = unwrap(model)
    out = Path(folder)
    require_c1(base, "save_pretrained")
    if isinstance(base, Adapted):
        raise PlanError("an adapter's host is no checkpoint: adapter.fold_() first, and publish adapter.model.")
    if not hasattr(base, "save_pretrained"):
        raise PlanError(f"{type(base).__name__} has no save_pretrained; give the transformers model.")
    if out.exists() and any(out.iterdir()):
        raise ArtefactError(f"{out} holds something already; choose another folder.")
    record = record_of(method, base, name, results)
    text = model_card(record, **{"repository": out.name, **card})
    with atomic_folder(out) as beside:
        base.save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        write_json(beside / RECORD, record)
        write_text(beside / "README.md", text)
    return out


def push_to_hub(folder: str | Path, repository: str, private: bool = True, **options: Any) -> str:
    """Send what `save_pretrained` wrote to the hub.

    Args:
        folder: Of `save_pretrained`; a folder without its record is refused.
        repository: ``"name/model"``; made if it is not there.
        private: Visible to you alone, when it is made.
        **options: For ``HfApi.upload_folder``: ``commit_message``, ``revision``, ``token``, ….

    Returns:
        Address of the commit.

    Raises:
        ArtefactError: no record in the folder, or a key beside it.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    load_record(folder)
    for path in folder.rglob("*.json"):
        held = read_json(path, "a part of a checkpoint")
        if isinstance(held, dict) and any(isinstance(held.get(name), list) for name in LISTS):
            raise ArtefactError(f"{path} is a permutation key: it stays with you; take it out of the folder.")
    api = HfApi(token=options.pop("token", None))
    api.create_repo(repository, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repository, folder_path=str(folder), **options))


def load_record(source: str | Path, model: nn.Module | None = None, **options: Any) -> dict[str, Any]:
    """What was done to a model, from a folder or a repository of the hub.

    Args:
        source: A folder, or ``"name/model"``.
        model: The model that was loaded from there: its names and shapes must be those of the record.
        **options: For ``hf_hub_download``: ``revision``, ``token``, ….

    Raises:
        ArtefactError: no record there, or of another model.
    """
    path = Path(source) / RECORD
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(str(source), RECORD, **options))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ArtefactError(
                f"{source} is no folder, and no {RECORD} came from the hub ({type(error).__name__}); give the folder "
                f"that gs.hub.save_pretrained wrote."
            ) from None
    record = upgraded(read_json(path, KIND), KIND, path, "save the model with gs.hub.save_pretrained")
    if model is not None and record["fingerprint"] != (here := ParameterSpace.of(unwrap(model)).fingerprint):
        raise ArtefactError(f"{path} is of a {record['model']} {record['fingerprint']}, and this model is {here}.")
    return record
