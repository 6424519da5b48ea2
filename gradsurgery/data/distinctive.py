"""Words that set one category apart: log-odds with an informative Dirichlet prior (Monroe, Colaresi & Quinn 2008).

With y the counts of word w in a category (n words in all) and x those in all others (m words), and the prior
a_w = strength * (share of w in everything), a_0 = strength:

    d_w = log (y_w + a_w) / (n + a_0 - y_w - a_w)  -  log (x_w + a_w) / (m + a_0 - x_w - a_w)
    z_w = d_w / sqrt(1 / (y_w + a_w) + 1 / (x_w + a_w))

"Fightin' Words", Political Analysis 16(4), equations 16, 20 and 22, against the rest instead of one other group.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping

from gradsurgery.errors import DataError


def distinctive_words(
    counts: Mapping[str, Mapping[str, int]], most: int = 20, strength: float = 500.0
) -> dict[str, list[tuple[str, float]]]:
    """Category -> its words of the highest ``z``, with ``z``; those below 0 are left out. Ties go by the alphabet.

    Args:
        counts: Category -> word -> how often it is there.
        most: Words a category.
        strength: Weight of the prior, in words: the larger, the less rare words count.

    Raises:
        DataError: fewer than two categories, a category without words, a strength of 0 or less.

    Example:
        >>> from gradsurgery.data import distinctive_words
        >>> found = distinctive_words({"pets": {"the": 90, "cat": 10}, "cars": {"the": 90, "engine": 10}}, most=1)
        >>> [(category, words[0][0]) for category, words in found.items()]
        [('pets', 'cat'), ('cars', 'engine')]
    """
    sizes = {category: sum(of.values()) for category, of in counts.items()}
    if len(counts) < 2 or not all(sizes.values()):
        without = [category for category, size in sizes.items() if not size]
        said = f"{without[0]} has none" if without else f"given are {', '.join(counts) or 'none'}"
        raise DataError(f"distinctive words compare two categories or more that have words: {said}.")
    if not 0 < strength < math.inf:
        raise DataError(f"strength={strength}: the prior weighs more than 0 words.")
    total: Counter[str] = Counter()
    for of in counts.values():
        total.update(of)
    everything = sum(sizes.values())
    out = {}
    for category, of in counts.items():
        size, rest = sizes[category], everything - sizes[category]
        scores = []
        for word, here in of.items():
            if not here or total[word] == everything:  # a word that is all there is tells nothing apart
                continue
            prior = strength * total[word] / everything
            mine, theirs = here + prior, total[word] - here + prior
            odds = math.log(mine / (size + strength - mine)) - math.log(theirs / (rest + strength - theirs))
            scores.append((word, odds / math.sqrt(1 / mine + 1 / theirs)))
        best = heapq.nsmallest(most, scores, key=lambda score: (-score[1], score[0]))
        out[category] = [(word, z) for word, z in best if z > 0]
    return out
