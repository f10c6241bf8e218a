"""In what steps sizes are chosen: multiples that kernels of quantised weights and of tensor cores take."""

import math

# From these widths of the model on, the widest first. bitsandbytes packs 32 rows of 4-bit weights, in groups of 64
# inputs; tensor cores are busiest with tiles of 64. In a tiny model that would be half of a layer, and below 64 any
# step would.
_STEPS = ((512, 64), (64, 16), (1, 1))


def unit_of(width: int, whole: int | None = None) -> int:
    """What the sizes that a method chooses are multiples of: 64 from a hidden size of 512 on, 16 from 64 on, else 1.

    Args:
        width: d of the model.
        whole: what is cut, where that is another size; the unit divides it, so that what is left can be multiples.
    """
    step = next(step for least, step in _STEPS if width >= least)
    return math.gcd(step, width if whole is None else whole)


def whole_units(size: int, unit: int) -> int:
    """The size rounded down to a multiple of the unit, at least one."""
    return max(size // unit, 1) * unit
