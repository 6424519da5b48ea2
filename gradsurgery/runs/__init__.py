"""Runs of experiments: a folder that resumes, training into it, metrics as JSON lines; what recipes share."""

from gradsurgery.runs.config import TrainConfig
from gradsurgery.runs.ending import ending_in_a_sentence, leave_group
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.setup import ModelConfig, build_model, build_tokenizer, deciding, digest
from gradsurgery.runs.steps import OrderedRows, OrderedStreams, Steps
from gradsurgery.runs.train import train

__all__ = [
    "ModelConfig",
    "OrderedRows",
    "OrderedStreams",
    "RunFolder",
    "Steps",
    "TrainConfig",
    "build_model",
    "build_tokenizer",
    "deciding",
    "digest",
    "ending_in_a_sentence",
    "leave_group",
    "train",
]
