"""WHAT happens at a region: one transform a file."""

from gradsurgery.transforms.ablate import ablate_
from gradsurgery.transforms.applied import applied
from gradsurgery.transforms.base import ForwardTransform, Traits, Transform
from gradsurgery.transforms.clip import Clip, clip
from gradsurgery.transforms.decay import DecayTo, decay_to
from gradsurgery.transforms.detach import Detach, detach
from gradsurgery.transforms.freeze import Freeze, freeze
from gradsurgery.transforms.mask import Mask, mask
from gradsurgery.transforms.prune import prune_
from gradsurgery.transforms.scale import Scale, scale
from gradsurgery.transforms.zero import Zero, zero

__all__ = [
    "Clip",
    "DecayTo",
    "Detach",
    "ForwardTransform",
    "Freeze",
    "Mask",
    "Scale",
    "Traits",
    "Transform",
    "Zero",
    "ablate_",
    "applied",
    "clip",
    "decay_to",
    "detach",
    "freeze",
    "mask",
    "prune_",
    "scale",
    "zero",
]
