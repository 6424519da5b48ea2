"""Corpora: the bilingual one that is shipped, the hub's, or your own files, all as category -> train and validation.

The experiment is the one of SGTM (Shilov et al. 2025, arXiv 2512.05648, section 4): two languages, one to be removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from gradsurgery.data.documents import Document, read_rows, readable, stem
from gradsurgery.data.split import Split, split
from gradsurgery.errors import DataError

ASSETS = Path(__file__).parent / "assets"
CATEGORIES = ("en", "es")
HUB = "hub:"
_LANGUAGE_OF_COLUMN = {"text": "en", "text_en": "en", "en": "en", "text_es": "es", "es": "es"}
_CATEGORY_COLUMNS = ("category", "language", "lang", "label")


def load_bilingual(
    source: str | Path = "embedded", *, validation: float = 0.05, limit: int | None = None
) -> dict[str, Split]:
    """Load a corpus as ``{"en": Split, "es": Split}`` (other categories where local files name others).

    Args:
        source: ``"embedded"``: 5,214 aligned documents (Bible chapters and everyday sentences, 7 MB of text each).
            ``"hub:owner/name"``: a Hugging Face data set, such as ``hub:ffuuugor/tinystories-spanish``.
            A path: a file ``.txt`` or ``.jsonl`` (also ``.gz``, ``.xz``, ``.bz2``), a folder of those (a file or a
            sub-folder for each category, named after it), or a folder that ``datasets`` wrote with ``save_to_disk``.
            Rows hold ``text`` and perhaps ``category`` and ``id``, or one column for each language (``text`` or ``en``
            with ``text_es`` or ``es``: aligned).
        validation: Share of the documents that is held back, by a hash of their id: aligned documents together.
        limit: Keep the first ``limit`` documents of each category, counted before the split.

    Raises:
        DataError: nothing there, truncated, not UTF-8, empty, or rows without text; one sentence says which and where.
    """
    if str(source) == "embedded":
        rows: Mapping[str, Iterable[Mapping[str, Any]]] = {c: read_rows(ASSETS / f"{c}.jsonl.bz2") for c in CATEGORIES}
    else:
        rows = source_rows(source, limit)
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} keeps no document: give a number from 1, or None.")
    documents: dict[str, list[Document]] = {}
    for name, part in rows.items():
        for row in part:
            for category, document in _documents(row, name):
                documents.setdefault(category, []).append(document)
    if not documents:
        raise DataError(f"{source} holds no document.")
    return {category: split(documents[category][:limit], validation) for category in sorted(documents)}


def source_rows(
    source: str | Path, limit: int | None = None, part: str | None = None
) -> dict[str, Iterable[Mapping[str, Any]]]:
    """Rows of a data set of the hub or of local files, by the name of the set, file or folder; each has an ``id``.

    Args:
        source: ``"hub:owner/name"`` or a path, as for `load_bilingual`.
        limit: Rows to read, of a data set of the hub.
        part: The only part of a data set of the hub to read, such as ``"train"``.
    """
    if str(source).startswith(HUB):
        return _hub_rows(str(source)[len(HUB) :], limit, part)
    if part is not None:
        raise DataError(f"part={part!r} is for data sets of the hub; give the path of that part instead of {source}.")
    return _local_rows(Path(source).expanduser())


def attribution() -> dict[str, dict[str, list[str]]]:
    """Who wrote the embedded everyday sentences: document id -> language -> ``"sentence-number author"`` in order.

    The number is that of tatoeba.org; the licence (CC BY 2.0 FR) asks to keep this with the text.
    """
    rows = read_rows(ASSETS / "tatoeba_attribution.jsonl.bz2")
    return {row["id"]: {category: row[category] for category in CATEGORIES} for row in rows}


def _documents(row: Mapping[str, Any], name: str) -> list[tuple[str, Document]]:
    columns = [column for column in _LANGUAGE_OF_COLUMN if isinstance(row.get(column), str)]
    if not columns:
        raise DataError(f"{name}: row {row.get('id')} has no text; expected a column text, or one for each language.")
    if len(columns) > 1:
        return [(_LANGUAGE_OF_COLUMN[c], Document(str(row["id"]), row[c])) for c in columns if row[c].strip()]
    named = next((str(row[c]) for c in _CATEGORY_COLUMNS if row.get(c) is not None), None)
    category = named or (name if columns == ["text"] else _LANGUAGE_OF_COLUMN[columns[0]])
    return [(category, Document(str(row["id"]), row[columns[0]]))] if row[columns[0]].strip() else []


def _local_rows(path: Path) -> dict[str, Iterable[Mapping[str, Any]]]:
    if not path.exists():
        raise DataError(f"{path} does not exist: give a .txt or .jsonl file, a folder, 'embedded' or 'hub:owner/name'.")
    if path.is_file():
        return {stem(path): read_rows(path)}
    if any((path / marker).is_file() for marker in ("dataset_dict.json", "dataset_info.json", "state.json")):
        return {path.name: _saved_rows(path)}
    rows: dict[str, Iterable[Mapping[str, Any]]] = {}
    for entry in sorted(path.iterdir()):
        if entry.is_file() and readable(entry):
            if stem(entry) in rows:
                raise DataError(
                    f"{path} holds two files for category {stem(entry)!r}: put them into a folder {stem(entry)}/."
                )
            rows[stem(entry)] = read_rows(entry)
        elif entry.is_dir() and any((entry / name).is_file() for name in ("dataset_dict.json", "state.json")):
            rows[entry.name] = _saved_rows(entry)
        elif entry.is_dir() and (files := [file for file in sorted(entry.iterdir()) if readable(file)]):
            rows[entry.name] = [{**r, "id": f"{stem(f)}/{r['id']}"} for f in files for r in read_rows(f)]
    if not rows:
        raise DataError(f"{path} holds no .txt, no .jsonl (.gz, .xz, .bz2) and no saved data set.")
    return rows


def _saved_rows(path: Path) -> list[Mapping[str, Any]]:
    import datasets

    try:
        return _numbered(datasets.load_from_disk(str(path)), None)
    except DataError:
        raise
    except Exception as error:  # datasets raises Arrow's, JSON's and its own errors alike
        raise DataError(f"{path} is a damaged or truncated saved data set ({_first_line(error)}).") from error


def _hub_rows(name: str, limit: int | None, part: str | None = None) -> dict[str, Iterable[Mapping[str, Any]]]:
    import datasets

    chosen = {} if part is None else {"split": part}
    try:
        return {name.rpartition("/")[2]: _numbered(datasets.load_dataset(name, **chosen), limit)}
    except DataError:
        raise
    except Exception as error:  # connection, HTTP, missing data set and damaged cache all end here
        raise DataError(
            f"{name} cannot be loaded from the hub ({type(error).__name__}: {_first_line(error)}); offline, give local "
            "files instead: a folder with en.jsonl and es.jsonl, or one written by datasets' save_to_disk."
        ) from error


def _numbered(loaded: Any, limit: int | None) -> list[Mapping[str, Any]]:
    """Rows of all parts of a data set; the split is made anew, by id, so that every source is held back alike."""
    parts = loaded if isinstance(loaded, Mapping) else {"rows": loaded}
    rows = ({**row, "id": str(row.get("id", f"{part}/{i}"))} for part in parts for i, row in enumerate(parts[part]))
    return list(islice(rows, limit))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no message"])[0]
