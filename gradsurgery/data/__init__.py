"""Corpora, labels and batches: the ground floor of every experiment."""

from gradsurgery.data.articles import Articles, load_articles, prepare_articles
from gradsurgery.data.batches import MixedBatches, collate, drop_rows
from gradsurgery.data.chat import ChatFormat, Turn, TurnSplit, load_chat, require_same_tokens
from gradsurgery.data.chat_rows import ChatRows
from gradsurgery.data.corpus import attribution, load_bilingual
from gradsurgery.data.distinctive import distinctive_words
from gradsurgery.data.documents import Document
from gradsurgery.data.explore import Exploration, Explorer, explore_corpus
from gradsurgery.data.kinds import load_kinds
from gradsurgery.data.labels import Labels, Noise, label_rows
from gradsurgery.data.ores import TopicIndex
from gradsurgery.data.packing import build_rows, pack, pack_categories, tokenize
from gradsurgery.data.questions import load_questions
from gradsurgery.data.rows import Rows
from gradsurgery.data.sampling import MixedSampler
from gradsurgery.data.split import Split, split
from gradsurgery.data.streams import stream_articles
from gradsurgery.data.tokenizer import load_tokenizer, train_tokenizer
from gradsurgery.data.topics import group_topics, load_topics, without_repeats

__all__ = [
    "Articles",
    "ChatFormat",
    "ChatRows",
    "Document",
    "Exploration",
    "Explorer",
    "Labels",
    "MixedBatches",
    "MixedSampler",
    "Noise",
    "Rows",
    "Split",
    "TopicIndex",
    "Turn",
    "TurnSplit",
    "attribution",
    "build_rows",
    "collate",
    "distinctive_words",
    "drop_rows",
    "explore_corpus",
    "group_topics",
    "label_rows",
    "load_articles",
    "load_bilingual",
    "load_chat",
    "load_kinds",
    "load_questions",
    "load_tokenizer",
    "load_topics",
    "pack",
    "pack_categories",
    "prepare_articles",
    "require_same_tokens",
    "split",
    "stream_articles",
    "tokenize",
    "train_tokenizer",
    "without_repeats",
]
