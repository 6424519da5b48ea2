"""Checkpoints of a training loop of one's own, sharded or not: saved at one world size, resumed at another.

Recipes and Trainers keep a Trainer's checkpoints; these are for plain loops, under DDP and ``fully_shard``. Every rank
writes what it holds through torch's distributed checkpoint, as safetensors, so that no rank ever holds the model.
"""

from gradsurgery.checkpoints.load import load_checkpoint
from gradsurgery.checkpoints.manifest import latest_checkpoint
from gradsurgery.checkpoints.save import save_checkpoint

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]
