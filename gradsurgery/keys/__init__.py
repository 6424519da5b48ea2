"""Permutation keys: two tiers in one set of weights."""

from gradsurgery.keys.configuration import configuration_of, require_c1
from gradsurgery.keys.draw import Dimensions
from gradsurgery.keys.key import PermutationKey
from gradsurgery.keys.step import StepUnder

__all__ = ["Dimensions", "PermutationKey", "StepUnder", "configuration_of", "require_c1"]
