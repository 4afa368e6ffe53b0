"""RAdam: Adam that waits until its second moment can be trusted (Liu et al., ICLR 2020, arXiv:1908.03265)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax

from jadam._core import checks
from jadam._core.numerics import Beta
from jadam._moments.formats import FormatChoice
from jadam._optimizers.adam import adam_rule, hyperparam_transform, nadam_rule, nesterov_m_hat
from jadam._transformation.public import EpsMode, call_as_repr
from jadam._transformation.transformation import (
    Hyperparams,
    Rule,
    Transformation,
    scale_by_learning_rate_and_decay,
    scale_by_rule,
)


def radam_rule(hp: Hyperparams, g, m, v):
    """Adam's direction times the rectification once ``v`` is reliable, ``m_hat`` before."""
    u, m, v = adam_rule(hp, g, m, v)
    return jnp.where(hp.trusted, hp.rectification * u, m / hp.b1.correction), m, v


def nesterov_radam_rule(hp: Hyperparams, g, m, v):
    """`radam_rule` with NAdam's direction and ``m_hat``."""
    u, m, v = nadam_rule(hp, g, m, v)
    return jnp.where(hp.trusted, hp.rectification * u, nesterov_m_hat(hp, m, g)), m, v


RADAM = Rule(radam_rule, optax.ScaleByAdamState, native="radam")
NESTEROV_RADAM = Rule(nesterov_radam_rule, optax.ScaleByAdamState, native="nesterov_radam", nesterov=True)


def with_rectification(hp: Hyperparams) -> Hyperparams:
    """Add ``trusted``, whether ``v`` is reliable at this step, and the ``rectification`` factor."""
    rho, rho_inf = sma_length(hp.b2, hp.t)
    trusted = rho >= hp.threshold
    r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return hp.replace(trusted=trusted, rectification=jnp.sqrt(jnp.where(trusted, r, 1)))


def sma_length(b2: Beta, t):
    """``rho`` and ``rho_inf``: the length of the moving average after ``t`` steps, and its limit.

    Liu et al. 2020, equation 3 and Algorithm 2: ``rho_inf = 2 / (1-b2) - 1`` and
    ``rho = rho_inf - 2 * t * b2**t / (1 - b2**t)``. For small ``t`` this difference cancels almost all digits of
    float32. With ``a = 1-b2``, ``rho`` is also ``2*t - 1 - 2 * d / (a * (a*t - d))``, where ``d = b2**t - 1 + a*t`` is
    the binomial series of ``(1-a)**t`` without its first two terms. For ``a*t <= 1`` the error of twenty terms is below
    1e-18.
    """
    a = b2.one_minus_b
    rho_inf = 2 / a - 1
    early = jnp.minimum(t, 1 / a)
    k = np.arange(1, 21).astype(a.dtype)
    d = jnp.cumprod((early - (k - 1)) / k * -a)[1:].sum()
    series = 2 * early - 1 - 2 * d / (a * (a * early - d))
    log_power = t * jnp.log1p(-a)
    direct = rho_inf - 2 * t * jnp.exp(log_power) / -jnp.expm1(log_power)
    return jnp.where(a * t <= 1, series, direct), rho_inf


@call_as_repr
def scale_by_radam(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    threshold: optax.ScalarOrSchedule = 5.0,
    *,
    nesterov: bool = False,
    eps_mode: EpsMode = "paper",
    moments: FormatChoice = "float32",
) -> Transformation:
    r"""Rescale gradients by RAdam's rule, without the learning rate.

    Liu et al. 2020, Algorithm 2. With :math:`\rho_\infty = 2 / (1 - b_2) - 1` and
    :math:`\rho_t = \rho_\infty - 2 t b_2^t / (1 - b_2^t)`, the direction is :math:`\hat m_t` while
    :math:`\rho_t <` ``threshold``, and from then on that of `jadam.scale_by_adam` times

    .. math::

        r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}}.

    The paper has threshold 4 and no ``eps``; Optax and PyTorch have threshold 5. PyTorch adds ``eps`` before the bias
    correction: ``eps_mode="hat"`` equals `torch.optim.RAdam`.

    Args:
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1). Of a schedule, :math:`\rho_t` takes the current value.
        eps: added to the denominator, >= 0, in the unit of the gradient.
        eps_root: added inside the square root, >= 0, in the unit of the gradient squared.
        threshold: :math:`\rho_t` from which on Adam's direction is taken, >= 4, in steps.
        nesterov: True takes the Nesterov momentum of `jadam.nadam`.
        eps_mode: ``"paper"`` adds ``eps`` as Algorithm 1 does; ``"hat"`` takes it as the paper's :math:`\hat\epsilon`,
            added before the bias correction.
        moments: storage of the moments: ``"float32"`` or ``"bfloat16"``, or a function ``f(path, leaf)`` that returns
            one of these.

    Returns:
        A transformation with `jadam.scale_by_adam`'s state.

    Raises:
        ValueError, TypeError: see `jadam.scale_by_adam`; also for a ``threshold`` below 4.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.scale_by_radam()
        >>> g = jnp.array([4.0, -2.0])
        >>> print(tx.update(g, tx.init(g))[0].round(3))  # too early: the gradient itself
        [ 4. -2.]
    """
    checks.check_one_of("nesterov", nesterov, (True, False))
    return scale_by_rule(
        NESTEROV_RADAM if nesterov else RADAM,
        {"b1": b1, "b2": b2},
        {"eps": eps, "eps_root": eps_root, "threshold": checks.hyperparameter("threshold", threshold, ">= 4")},
        moments=moments,
        transform=hyperparam_transform(eps_mode, (), with_rectification),
    )


@call_as_repr
def radam(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    threshold: optax.ScalarOrSchedule = 5.0,
    *,
    nesterov: bool = False,
    eps_mode: EpsMode = "paper",
    moments: FormatChoice = "float32",
) -> Transformation:
    r"""Rectified Adam, a drop-in for `optax.radam`; with ``eps_mode="hat"`` equal to `torch.optim.RAdam`.

    Args:
        learning_rate: step size :math:`\alpha` >= 0: a number, or a schedule of the number of steps taken.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the denominator, >= 0, in the unit of the gradient.
        eps_root: added inside the square root, >= 0, in the unit of the gradient squared.
        threshold: :math:`\rho_t` from which on Adam's direction is taken, >= 4, in steps.
        nesterov: True takes the Nesterov momentum of `jadam.nadam`.
        eps_mode: ``"paper"`` adds ``eps`` as Algorithm 1 does; ``"hat"`` takes it as the paper's :math:`\hat\epsilon`,
            added before the bias correction.
        moments: storage of the moments: ``"float32"`` or ``"bfloat16"``, or a function ``f(path, leaf)`` that returns
            one of these.

    Returns:
        A transformation with `optax.radam`'s state.

    Raises:
        ValueError, TypeError: see `scale_by_radam`.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.radam(0.1)
        >>> g = jnp.array([4.0, -2.0])
        >>> print(tx.update(g, tx.init(g))[0].round(3))
        [-0.4  0.2]
    """
    direction = scale_by_radam(b1, b2, eps, eps_root, threshold, nesterov=nesterov, eps_mode=eps_mode, moments=moments)
    return scale_by_learning_rate_and_decay(direction, learning_rate)
