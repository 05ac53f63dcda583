"""How sure a share of a sample is."""

import math
from statistics import NormalDist


def wilson(right: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval (JASA 22(158), 1927) of a share of `count` independent answers, `right` of them 1: it does not
    shrink to nothing where all are equal."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = right / count, z * z / count
    centre, width = share + weight / 2, z * math.sqrt((share * (1 - share) + weight / 4) / count)
    return max(0.0, (centre - width) / (1 + weight)), min(1.0, (centre + width) / (1 + weight))
