"""What transforms need to know of a model and its data: gradients of earlier tasks, bases, importances, directions."""

from gradsurgery.estimators.activation_basis import activation_basis
from gradsurgery.estimators.basis import Basis, identity_basis
from gradsurgery.estimators.coordinates import Coordinates
from gradsurgery.estimators.direction import Direction
from gradsurgery.estimators.gradient_memory import GradientMemory, gradient_memory
from gradsurgery.estimators.importance import Importance, importance
from gradsurgery.estimators.masks import Masks
from gradsurgery.estimators.paired_direction import paired_direction
from gradsurgery.estimators.top_k_masks import top_k

__all__ = [
    "Basis",
    "Coordinates",
    "Direction",
    "GradientMemory",
    "Importance",
    "Masks",
    "activation_basis",
    "gradient_memory",
    "identity_basis",
    "importance",
    "paired_direction",
    "top_k",
]
