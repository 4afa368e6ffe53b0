"""AdaMax: Adam with the infinity norm in place of the second moment (Kingma & Ba 2015, section 7.1, Algorithm 2)."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jadam._core.numerics import divide, ema
from jadam._moments.formats import FormatChoice
from jadam._transformation.public import Mask, call_as_repr
from jadam._transformation.transformation import (
    Hyperparams,
    Rule,
    Transformation,
    scale_by_learning_rate_and_decay,
    scale_by_rule,
)


def adamax_rule(hp: Hyperparams, g, m, nu):
    """One step of Algorithm 2 on one array. Returns the direction, ``m`` and the infinity norm ``nu`` (paper: u)."""
    m = ema(hp.b1, m, g)
    nu = jnp.maximum(hp.b2.b * nu, jnp.abs(g) + hp.eps)
    m_hat = m / hp.b1.correction
    return divide(m_hat, nu), m, nu


ADAMAX = Rule(adamax_rule, optax.ScaleByAdamState, native="adamax", denominator=lambda hp, nu: nu, eps_in_moment=True)


@call_as_repr
def scale_by_adamax(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    moments: FormatChoice = "float32",
) -> Transformation:
    r"""Rescale gradients by AdaMax's rule, without the learning rate.

    Kingma & Ba 2015, section 7.1, Algorithm 2:

    .. math::

        m_t = b_1 m_{t-1} + (1 - b_1) g_t, \qquad
        \nu_t = \max(b_2 \nu_{t-1}, |g_t| + \texttt{eps}), \qquad
        u_t = m_t / ((1 - b_1^t)\, \nu_t).

    The paper has no ``eps``; it is added where Optax and PyTorch add it. With ``eps=0`` the update of a coordinate
    whose gradients were all 0 is 0.

    Args:
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the infinity norm, in [0, 1).
        eps: added to :math:`|g|`, >= 0, in the unit of the gradient.
        moments: storage of the moments: ``"float32"`` or ``"bfloat16"``, or a function ``f(path, leaf)`` that returns
            one of these.

    Returns:
        A transformation with state `optax.ScaleByAdamState`, where ``nu`` is :math:`\nu`.

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
    moments: FormatChoice = "float32",
) -> Transformation:
    r"""AdaMax, a drop-in for `optax.adamax` and equal to `torch.optim.Adamax`; see `scale_by_adamax`.

    Args:
        learning_rate: step size :math:`\alpha` >= 0: a number, or a schedule of the number of steps taken.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the infinity norm, in [0, 1).
        eps: added to :math:`|g|`, >= 0, in the unit of the gradient.
        moments: storage of the moments: ``"float32"`` or ``"bfloat16"``, or a function ``f(path, leaf)`` that returns
            one of these.

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
    mask: Mask | None = None,
    *,
    moments: FormatChoice = "float32",
    max_lr: float | None = None,
) -> Transformation:
    r"""AdaMax with decoupled weight decay, a drop-in for `optax.adamaxw`.

    Args:
        learning_rate: step size :math:`\alpha` >= 0: a number, or a schedule of the number of steps taken.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the infinity norm, in [0, 1).
        eps: added to :math:`|g|`, >= 0, in the unit of the gradient.
        weight_decay: :math:`\lambda` >= 0: a number, or a schedule of the number of steps taken.
        mask: a tree of booleans like the parameters, a prefix of it, or a function from the parameters to one. Weight
            decay applies where it is True. Default: everywhere.
        moments: storage of the moments: ``"float32"`` or ``"bfloat16"``, or a function ``f(path, leaf)`` that returns
            one of these.
        max_lr: None multiplies the decay by the learning rate. A number > 0, the peak of the schedule, makes the decay
            independent of that peak: :math:`(\alpha_t / \texttt{max\_lr}) \lambda`.

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
