"""Articles by topic, packed on disk: the Wikipedia pipeline of SGTM (arXiv 2512.05648, section 5), in constant memory.

Articles stream by twice: first to choose each category's test articles, then to be tokenised, packed to sequences of
full context length and written. What is read afterwards is mapped from disk, not loaded.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsurgery.data.article_packing import SIDES, ArticleSorter, Source, checked
from gradsurgery.data.explore import Explorer
from gradsurgery.data.labels import Noise, label_rows
from gradsurgery.data.ores import TopicIndex
from gradsurgery.data.rows import Rows
from gradsurgery.errors import DataError
from gradsurgery.files import read_json, write_json
from gradsurgery.formats import stamp, upgraded

KIND = "prepared articles"
FORGET = ("STEM.Biology",)
ADJACENT = ("STEM.Earth_and_environment", "STEM.Chemistry", "STEM.Medicine_&_Health")


@dataclass(frozen=True, eq=False)
class Articles:
    """What `prepare_articles` wrote, mapped from disk.

    Attributes:
        about: The manifest: context, end of text, roles of the categories, counts.
        sequences: Side (``"train"``, ``"test"``) -> token ids, int32 ``[sequences, context]``.
        category: Side -> int16 ``[sequences]``, into ``categories``.
    """

    about: dict[str, Any]
    sequences: dict[str, Tensor]
    category: dict[str, Tensor]

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(self.about["categories"])

    def of_role(self, role: str) -> tuple[str, ...]:
        """Categories that are ``"forget"``, ``"adjacent"`` or ``"retain"``."""
        return tuple(name for name, its in self.about["categories"].items() if its == role)

    def rows(self, noise: Noise | None = None, seed: int = 0, **shares: float) -> Rows:
        """The training sequences with labels, drawn by sequence; ``shares`` as for `label_rows`."""
        names = [self.categories[k] for k in self.category["train"].tolist()]
        roles: dict[str, Any] = {"forget": self.of_role("forget"), "adjacent": self.of_role("adjacent"), **shares}
        labels = label_rows(names, **roles, noise=noise, seed=seed)
        category = self.category["train"].long()
        return Rows(self.sequences["train"], category, labels.forget, labels.retain, self.categories)

    def held_back(self, rows: int) -> dict[str, Tensor]:
        """At most so many test sequences of each category."""
        found = {name: self.category["test"] == k for k, name in enumerate(self.categories)}
        return {name: self.sequences["test"][flags.nonzero()[:rows, 0]] for name, flags in found.items()}


def prepare_articles(
    articles: Source,
    topics: TopicIndex,
    out: str | Path,
    tokenizer: Any,
    *,
    context: int = 1024,
    forget: Collection[str] = FORGET,
    adjacent: Collection[str] = ADJACENT,
    test_articles: int = 5000,
    limit: int | None = None,
    explorer: Explorer | None = None,
) -> Articles:
    """Choose test articles, tokenise, pack and write; articles without a topic are left out.

    Args:
        articles: Called twice; each time gives the same mappings with ``id`` (the page number) and ``text``, such as
            `stream_articles`.
        topics: Topics of the pages.
        out: Folder that appears when everything is written.
        tokenizer: With ``eos_token_id``, which closes an article.
        context: Tokens of a sequence; an incomplete last one of a category is dropped.
        forget: Topics to be removed, by name.
        adjacent: Topics close to them. All others are retain, each under its first part (``Culture.Media.Films`` under
            ``Culture``).
        test_articles: Held back from each category: those whose ids have the smallest hashes.
        limit: Articles to read, for a quick look.
        explorer: Is told of every article that is written; ``Explorer(repeats=False)`` keeps memory constant, and
            repeats are left out here anyway.

    Raises:
        DataError: unknown or empty categories, fewer articles than test articles, articles without id or text.
    """
    out = Path(out)
    if out.exists():
        raise DataError(
            f"{out} exists already: load_articles({str(out)!r}) reads it; choose another folder to redo it."
        )
    if context < 2 or test_articles < 1:
        raise DataError(f"context={context} and test_articles={test_articles}: give at least 2 tokens and 1 article.")
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        named = ArticleSorter(topics, forget, adjacent, beside / "seen.sqlite")
        last_test = named.choose(checked(articles, limit), test_articles)
        counts = named.write(checked(articles, limit), beside, tokenizer, context, last_test, explorer)
        named.close()
        end = int(tokenizer.eos_token_id)
        about = {"categories": named.roles(), "context": context, "end_of_text": end, **counts}
        write_json(beside / "manifest.json", {**stamp(KIND), **about})
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if counts["repeated"]:
        warnings.warn(
            f"{counts['repeated']} articles are left out: their id or text had come before, and stood perhaps on the "
            f"other side of the split.",
            stacklevel=2,
        )
    return load_articles(out)


def load_articles(folder: str | Path) -> Articles:
    """Map what `prepare_articles` wrote.

    Raises:
        ArtefactError: no manifest there.
        DataError: files of another size than it says.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    about = upgraded(read_json(path, KIND), KIND, path, "prepare the articles again", before=1)
    sequences, category = {}, {}
    for side in SIDES:
        count = int(about["sequences"][side])
        sizes = {"tokens": 4 * count * about["context"], "categories": 2 * count}
        for kind, size in sizes.items():
            path = folder / f"{side}.{kind}"
            if not path.is_file() or path.stat().st_size != size:
                raise DataError(f"{path} does not have the {size:,} bytes that the manifest says: prepare it again.")
        tokens = torch.from_file(str(folder / f"{side}.tokens"), size=count * about["context"], dtype=torch.int32)
        sequences[side] = tokens.view(count, about["context"])
        category[side] = torch.from_file(str(folder / f"{side}.categories"), size=count, dtype=torch.int16)
    return Articles(about, sequences, category)
