"""AdaMax: Adam with the infinity norm in place of the second moment (Kingma & Ba 2015, section 7.1, Algorithm 2)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from jadam._core.numerics import divide, ema
from jadam._moments.formats import Moments
from jadam._transformation.transformation import (
    Hyperparams,
    Rule,
    Transformation,
    call_as_repr,
    scale_by_learning_rate_and_decay,
    scale_by_rule,
)


def adamax_rule(hp: Hyperparams, g, m, u):
    """One step of Algorithm 2 on one array; ``u`` is the paper's letter for the decayed largest ``|g|``."""
    m = ema(hp.b1, m, g)
    u = jnp.maximum(hp.b2.b * u, jnp.abs(g) + hp.eps)
    m_hat = m / hp.b1.correction
    return divide(m_hat, u), m, u


ADAMAX = Rule(
    adamax_rule, optax.ScaleByAdamState, native="adamax", denominator=lambda hp, u: u, eps_in_denominator=True
)


@call_as_repr
def scale_by_adamax(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    moments: Moments = "float32",
) -> Transformation:
    r"""Rescale gradients by AdaMax's rule, without the learning rate.

    Kingma & Ba 2015, section 7.1, Algorithm 2:

    .. math::

        m_t = b_1 m_{t-1} + (1 - b_1) g_t, \qquad
        \nu_t = \max(b_2 \nu_{t-1}, |g_t| + \texttt{eps}), \qquad
        u_t = m_t / ((1 - b_1^t)\, \nu_t).

    Departure from the paper: ``eps``, which it lacks, is where Optax and PyTorch have it. With ``eps=0`` a
    coordinate that never had a gradient gets a zero update.

    Args:
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the largest gradient, in [0, 1).
        eps: added to :math:`|g|`, >= 0, in the gradient's unit.
        moments: see `jadam.scale_by_adam`; no ``"int8"``.

    Returns:
        A transformation with state `optax.ScaleByAdamState`, :math:`\nu` in ``nu``; otherwise as
        `jadam.scale_by_adam`.

    Raises:
        ValueError, TypeError: see `jadam.scale_by_adam`.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.scale_by_adamax()
        >>> g = jnp.array([4.0, -1e-3, 0.0])
        >>> updates, state = tx.update(g, tx.init(g))
        >>> print(updates.round(3))
        [ 1. -1.  0.]
    """
    return scale_by_rule(ADAMAX, {"b1": b1, "b2": b2}, {"eps": eps}, moments=moments)


@call_as_repr
def adamax(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    moments: Moments = "float32",
) -> Transformation:
    """AdaMax, a drop-in for `optax.adamax` and equal to `torch.optim.Adamax`; see `scale_by_adamax`.

    Args:
        learning_rate: see `jadam.adam`.
        b1, b2, eps, moments: see `scale_by_adamax`.

    Returns:
        A transformation with `optax.adamax`'s state.

    Raises:
        ValueError, TypeError: see `jadam.adam`.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.adamax(0.1)
        >>> g = jnp.array([4.0, -2.0])
        >>> print(tx.update(g, tx.init(g))[0].round(3))
        [-0.1  0.1]
    """
    return scale_by_learning_rate_and_decay(scale_by_adamax(b1, b2, eps, moments=moments), learning_rate)


@call_as_repr
def adamaxw(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    moments: Moments = "float32",
    max_lr: float | None = None,
) -> Transformation:
    """AdaMax with decoupled weight decay, a drop-in for `optax.adamaxw`.

    Args:
        learning_rate: see `jadam.adam`.
        b1, b2, eps, moments: see `scale_by_adamax`.
        weight_decay, mask, max_lr: see `jadam.adamw`.

    Returns:
        A transformation with `optax.adamaxw`'s state; ``update`` needs ``params``.

    Raises:
        ValueError, TypeError: see `jadam.adamw`.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.adamaxw(0.1, weight_decay=0.5)
        >>> p = jnp.ones(2)
        >>> print(tx.update(0 * p, tx.init(p), p)[0])
        [-0.05 -0.05]
    """
    return scale_by_learning_rate_and_decay(
        scale_by_adamax(b1, b2, eps, moments=moments), learning_rate, weight_decay, mask, max_lr
    )
