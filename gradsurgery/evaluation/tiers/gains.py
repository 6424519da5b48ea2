"""What an attack gains, next to what the key gains: extraction by finetuning, wrong keys, parts of the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gradsurgery.errors import DataError


def relative_gains(public: float, keyed: float, attacks: Mapping[str, float | Sequence[float]]) -> dict[str, float]:
    """Share of the key's gain that each attack reaches: ``(public - attack) / (public - keyed)``, means of several.

    Args:
        public: Loss of the public tier on the private text, before any attack.
        keyed: Loss of the keyed tier on it.
        attacks: Loss that each attack ends at, or the losses of several runs of it.

    Raises:
        DataError: the key gains nothing that an attack could be compared with.

    Example:
        >>> gains = relative_gains(5.0, 3.0, {"random key": 4.9, "half of the key": [4.5, 4.7]})
        >>> {name: round(gain, 2) for name, gain in gains.items()}
        {'random key': 0.05, 'half of the key': 0.2}
    """
    if not public > keyed:
        raise DataError(f"the keyed tier ({keyed:.3f}) is no better than the public one ({public:.3f}): no gain.")
    losses = {name: np.asarray(found, dtype=float).reshape(-1) for name, found in attacks.items()}
    return {name: float((public - found.mean()) / (public - keyed)) for name, found in losses.items()}


def gain_rows(public: float, keyed: float, attacks: Mapping[str, float | Sequence[float]]) -> list[dict[str, object]]:
    """Rows for `gradsurgery.evaluation.table`: loss, gain in nats, and share of the key's gain."""
    shares = {"no attack": 0.0, "the key": 1.0, **relative_gains(public, keyed, attacks)}
    gain = public - keyed
    return [
        {
            "attack": name,
            "loss": public - share * gain,
            "gain": share * gain,
            "of the key's gain": f"{100 * share:.1f}%",
        }
        for name, share in shares.items()
    ]
