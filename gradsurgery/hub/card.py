"""A model card from a record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gradsurgery.evaluation.tables import table

LOADING = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repository}")
```"""


def model_card(
    record: Mapping[str, Any],
    base_model: str | None = None,
    licence: str | None = None,
    language: str | list[str] | None = None,
    datasets: Sequence[str] | None = None,
    repository: str = "this/repository",
    says: str = "",
) -> str:
    """The text of a ``README.md``: metadata for the hub, the method, its regions, keys' fingerprints, figures.

    Args:
        record: Of `record_of`.
        base_model: Repository of the model that was trained on.
        licence: Identifier of a licence, as the hub spells them.
        language: Codes of languages.
        datasets: Repositories of data.
        repository: Where the model will be.
        says: A paragraph of your own.

    Example:
        >>> method = gs.methods.sgtm(anatomy, anatomy.heads[:, -1:])
        >>> card = gs.hub.model_card(gs.hub.record_of(method, model, "SGTM", {"loss, English": 4.32}))
        >>> card.splitlines()[0], "loss, English" in card, "heads[:, -1:]" in card
        ('---', True, True)
    """
    from huggingface_hub import ModelCardData

    about = ModelCardData(
        base_model=base_model,
        license=licence,
        language=language,
        datasets=list(datasets) if datasets else None,
        library_name="transformers",
        tags=["gradsurgery", str(record["method"]).lower().replace(" ", "-")],
    )
    parts = [f"---\n{about.to_yaml()}\n---", f"# {repository.rpartition('/')[2]}"]
    parts += [says] if says else []
    parts.append(
        f"Trained with {record['method']} by [gradsurgery](https://pypi.org/project/gradsurgery/) "
        f"{record['gradsurgery']}. The weights are a stock `{record['model']}` checkpoint: nothing of gradsurgery is "
        f"needed to load it."
    )
    parts.append(LOADING.format(repository=repository))
    if record["keys"]:
        parts.append(
            "## Keys\n\nThe weights are C1, the public configuration. Another one opens with a key that is not here; "
            "fingerprints say which key fits, and nothing of what it is.\n\n"
            + "\n".join(f"- `{key}`" for key in record["keys"])
        )
    rows = [
        {"region": f"`{r['text']}`", "entries": f"{r['entries']:,}", "of the model": f"{100 * r['share']:.2f}%"}
        for r in record["regions"]
    ]
    parts.append("## Method\n\n```json\n" + json.dumps(record["describes"], indent=1, ensure_ascii=False) + "\n```")
    if rows:
        parts.append("## Regions\n\n" + table(rows, "markdown"))
    if record["results"]:
        figures = [{"figure": name, "value": figure(value)} for name, value in record["results"].items()]
        parts.append("## Results\n\n" + table(figures, "markdown"))
    parts.append(f"Parameter names and shapes: fingerprint `{record['fingerprint']}`.")
    return "\n\n".join(parts) + "\n"


def figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
