"""The whole step of one leaf, from the gradient to the new parameter: what XLA runs, and Pallas on tiles."""

from jadam._core.bf16 import split
from jadam._core.numerics import apply_updates, promote
from jadam._transformation.transformation import Job


def update_leaf(job: Job, g, p):
    """One leaf: the new parameter, and the tuple of what is stored."""
    if job.frozen:
        return p, () if job.remainder is None else (job.remainder,)
    if job.remainder is None:
        u, stored = job.update(g, p)
        return apply_updates(p, u.astype(promote(g, p))), stored
    x, stored = job.moved(g, p)
    p, remainder = split(x)
    return p, (remainder, *stored)
