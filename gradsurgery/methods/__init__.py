"""Published methods as short compositions; each returns a `gradsurgery.Method`."""

from gradsurgery.methods.baselines import data_filter, plain
from gradsurgery.methods.forget import forget_units
from gradsurgery.methods.sgtm import sgtm

__all__ = ["data_filter", "forget_units", "plain", "sgtm"]
