"""Corpora, labels and batches: the ground floor of every experiment."""

from gradsurgery.data.batches import MixedBatches, collate, drop_rows
from gradsurgery.data.corpus import attribution, load_bilingual
from gradsurgery.data.documents import Document
from gradsurgery.data.labels import Labels, Noise, label_rows
from gradsurgery.data.packing import build_rows, pack, pack_categories, tokenize
from gradsurgery.data.rows import Rows
from gradsurgery.data.sampling import MixedSampler
from gradsurgery.data.split import Split, split
from gradsurgery.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "Document",
    "Labels",
    "MixedBatches",
    "MixedSampler",
    "Noise",
    "Rows",
    "Split",
    "attribution",
    "build_rows",
    "collate",
    "drop_rows",
    "label_rows",
    "load_bilingual",
    "load_tokenizer",
    "pack",
    "pack_categories",
    "split",
    "tokenize",
    "train_tokenizer",
]
