"""Every error the library raises on purpose: what was given, what was expected, the way out."""

from __future__ import annotations


class GradsurgeryError(Exception):
    """Base class of all errors raised by gradsurgery."""


class SelectionError(GradsurgeryError):
    """A selection of units or entries is empty, out of range, of another model, or of the wrong kind."""


class AnatomyError(GradsurgeryError):
    """A model's layout cannot be explained, or an anatomy does not fit the model it is used with."""


class PlanError(GradsurgeryError):
    """A method, pass or transform does not make sense for this model, stage or host."""


class BatchError(GradsurgeryError):
    """A batch lacks a column, or a column has the wrong shape, dtype or values."""


class SlotError(GradsurgeryError):
    """A gradient slot is stale, unknown or was never filled."""


class KeyStateError(GradsurgeryError):
    """A model is in another configuration (C1, C2, …) than the operation needs."""


class ArtefactError(GradsurgeryError):
    """A stored artefact is missing, truncated, or was made for another model."""


class DataError(GradsurgeryError):
    """Text, labels or a data set cannot be used as given."""


class KeyWarning(UserWarning):
    """A permutation key works, but not as well as it looks: others can read it, or heads move between windows."""
