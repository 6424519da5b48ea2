"""What the tiers of a model know, and what is left of the keyed one for those who do not have the key."""

from gradsurgery.evaluation.tiers.curves import Curve, Point, corrupted_keys, curve_rows, partial_keys, wrong_keys
from gradsurgery.evaluation.tiers.draws import corrupted_key, wrong_key
from gradsurgery.evaluation.tiers.facts import (
    Fact,
    Recall,
    fact_questions,
    fact_rows,
    planted_facts,
    recall,
    tier_recall,
)
from gradsurgery.evaluation.tiers.gains import gain_rows, relative_gains
from gradsurgery.evaluation.tiers.plots import (
    gain_bars,
    recall_bars,
    recovery_bars,
    tier_bars,
    tier_curves,
    wrong_key_bars,
)
from gradsurgery.evaluation.tiers.recovery import Recovery, recovery_by_gradient, recovery_by_magnitude, recovery_rows
from gradsurgery.evaluation.tiers.samples import sample_tiers
from gradsurgery.evaluation.tiers.scores import TierScore, evaluate_tiers, score
from gradsurgery.evaluation.tiers.weights import corrupted_weights

__all__ = [
    "Curve",
    "Fact",
    "Point",
    "Recall",
    "Recovery",
    "TierScore",
    "corrupted_key",
    "corrupted_keys",
    "corrupted_weights",
    "curve_rows",
    "evaluate_tiers",
    "fact_questions",
    "fact_rows",
    "gain_bars",
    "gain_rows",
    "partial_keys",
    "planted_facts",
    "recall",
    "recall_bars",
    "recovery_bars",
    "recovery_by_gradient",
    "recovery_by_magnitude",
    "recovery_rows",
    "relative_gains",
    "sample_tiers",
    "score",
    "tier_bars",
    "tier_curves",
    "tier_recall",
    "wrong_key",
    "wrong_key_bars",
    "wrong_keys",
]
