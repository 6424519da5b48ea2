"""Train and validation parts by a hash of the document's id: stable, seedless, the same for aligned documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from gradsurgery.data.documents import Document
from gradsurgery.errors import DataError


@dataclass(frozen=True)
class Split:
    """One category's documents."""

    train: list[Document]
    validation: list[Document]


def held_back(document_id: str, share: float) -> bool:
    """Whether the document belongs to the validation part, which holds about ``share`` of all documents.

    A document held back at some share is held back at every larger one.
    """
    digest = blake2b(document_id.encode(), digest_size=8, person=b"held-back").digest()
    return int.from_bytes(digest, "big") < share * 2**64


def split(documents: Iterable[Document], validation: float = 0.05) -> Split:
    """Deal documents into train and validation; documents of one id always land on the same side."""
    if not 0 <= validation < 1:
        raise DataError(f"validation={validation} is no share: give a number from 0 to below 1.")
    parts: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        parts[held_back(document.id, validation)].append(document)
    return Split(*parts)
