"""The whole step of one leaf, from the gradient to the new parameter: what XLA runs, and Pallas on tiles."""

from jadam._core.bf16 import join, split
from jadam._core.numerics import apply_updates, at_least_float32, promote
from jadam._transformation.transformation import Job


def update_leaf(job: Job, g, p):
    """One leaf: the new parameter, and the tuple of what is stored."""
    if job.frozen:
        return p, () if job.remainder is None else (job.remainder,)
    if job.remainder is None:
        u, stored = job.update(g, p)
        return apply_updates(p, u.astype(promote(g, p))), stored
    x, g = join(p, job.remainder), g.astype(at_least_float32(g))
    u, stored = job.update(g, x)
    p, remainder = split(apply_updates(x, u.astype(promote(g, x))))
    return p, (remainder, *stored)
