"""Published methods as short compositions; each returns a `gradsurgery.Method`."""

from gradsurgery.methods.baselines import data_filter, plain
from gradsurgery.methods.forget import forget_units
from gradsurgery.methods.private_finetune import private_finetune
from gradsurgery.methods.sgtm import sgtm
from gradsurgery.methods.tiered import tiered

__all__ = ["data_filter", "forget_units", "plain", "private_finetune", "sgtm", "tiered"]
