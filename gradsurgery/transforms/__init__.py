"""WHAT happens at a region: one transform a file."""

from gradsurgery.transforms.ablate import ablate_
from gradsurgery.transforms.aggregate import Aggregate, aggregate
from gradsurgery.transforms.applied import applied
from gradsurgery.transforms.base import ForwardTransform, Traits, Transform
from gradsurgery.transforms.clip import Clip, clip
from gradsurgery.transforms.decay import DecayTo, decay_to
from gradsurgery.transforms.detach import Detach, detach
from gradsurgery.transforms.ema import Ema, ema
from gradsurgery.transforms.freeze import Freeze, freeze
from gradsurgery.transforms.mask import Mask, mask
from gradsurgery.transforms.observe import ChangedFraction, Leak, changed_fraction, leak
from gradsurgery.transforms.project import Project, ProjectUpdate, project
from gradsurgery.transforms.prune import prune_
from gradsurgery.transforms.rotate import RotatedGradient, RotatedUpdate, rotate
from gradsurgery.transforms.rotation.reparametrise import reparametrised
from gradsurgery.transforms.scale import Scale, scale
from gradsurgery.transforms.weightings import PCGrad
from gradsurgery.transforms.zero import Zero, zero

__all__ = [
    "Aggregate",
    "ChangedFraction",
    "Clip",
    "DecayTo",
    "Detach",
    "Ema",
    "ForwardTransform",
    "Freeze",
    "Leak",
    "Mask",
    "PCGrad",
    "Project",
    "ProjectUpdate",
    "RotatedGradient",
    "RotatedUpdate",
    "Scale",
    "Traits",
    "Transform",
    "Zero",
    "ablate_",
    "aggregate",
    "applied",
    "changed_fraction",
    "clip",
    "decay_to",
    "detach",
    "ema",
    "freeze",
    "leak",
    "mask",
    "project",
    "prune_",
    "reparametrised",
    "rotate",
    "scale",
    "zero",
]
