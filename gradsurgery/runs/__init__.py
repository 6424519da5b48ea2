"""Runs of experiments: a folder that resumes, training into it, metrics as JSON lines."""

from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.train import TrainConfig, train

__all__ = ["RunFolder", "TrainConfig", "train"]
