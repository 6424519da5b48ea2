"""Published methods as short compositions; each returns a `gradsurgery.Method`."""

from gradsurgery.methods.actsvd import actsvd
from gradsurgery.methods.baselines import data_filter, plain
from gradsurgery.methods.forget import forget_units
from gradsurgery.methods.gpm import gpm
from gradsurgery.methods.gradient_ascent import gradient_ascent
from gradsurgery.methods.gru import gru
from gradsurgery.methods.mixing import mixed
from gradsurgery.methods.npo import npo
from gradsurgery.methods.ogd import ogd
from gradsurgery.methods.ogpsa import ogpsa
from gradsurgery.methods.opposed import opposed
from gradsurgery.methods.original_space_mask import original_space_mask
from gradsurgery.methods.pcgrad import pcgrad
from gradsurgery.methods.private_finetune import private_finetune
from gradsurgery.methods.quarantine import quarantine
from gradsurgery.methods.rmu import rmu
from gradsurgery.methods.safegrad import safegrad
from gradsurgery.methods.sgtm import sgtm
from gradsurgery.methods.tiered import tiered
from gradsurgery.methods.warp import warp

__all__ = [
    "actsvd",
    "data_filter",
    "forget_units",
    "gpm",
    "gradient_ascent",
    "gru",
    "mixed",
    "npo",
    "ogd",
    "ogpsa",
    "opposed",
    "original_space_mask",
    "pcgrad",
    "plain",
    "private_finetune",
    "quarantine",
    "rmu",
    "safegrad",
    "sgtm",
    "tiered",
    "warp",
]
