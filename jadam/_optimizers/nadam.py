"""NAdam: Adam with Nesterov momentum (Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop 2016)."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jadam._core import checks
from jadam._moments.formats import Moments
from jadam._optimizers.adam import NADAM, adjustment, scale_by_adam
from jadam._transformation.transformation import Transformation, descend, scale_by_rule


def _scale_by_nadam(momentum_decay, b1, b2, eps, eps_root, mu_dtype, **switches):
    if momentum_decay is None:
        return scale_by_adam(b1, b2, eps, eps_root, mu_dtype, **switches)
    if callable(b1) or not (switches["nesterov"] and switches["bias_correction"]):
        raise ValueError(
            "momentum_decay must be None unless b1 is a number and nesterov and bias_correction are True, got "
            f"{momentum_decay!r}. To schedule the momentum of Dozat's own rule, make b1 a schedule."
        )
    decay = checks.hyperparameter("momentum_decay", momentum_decay, ">= 0", schedule=False)
    momentum = lambda count: b1 * (1 - 0.5 * 0.96 ** (decay * (count + 1.0)))
    betas, scalars = {"b1": b1, "b2": b2, "momentum": momentum}, {"eps": eps, "eps_root": eps_root}
    return scale_by_rule(NADAM, betas, scalars, mu_dtype, switches["moments"], adjustment(switches["eps_mode"]))


def nadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = True,
    eps_mode: str = "paper",
    bias_correction: bool = True,
    moments: Moments = "float32",
    momentum_decay: float | None = None,
) -> Transformation:
    r"""Adam with Nesterov momentum, a drop-in for `optax.nadam`.

    Dozat 2016, Algorithm 2, is `jadam.adam` with, for a constant :math:`\mu_t = b_1`,

    .. math::

        \hat m_t = \frac{\mu_{t+1} m_t}{1 - \prod_{i=1}^{t+1} \mu_i} + \frac{(1 - \mu_t) g_t}{1 - \prod_{i=1}^t \mu_i}.

    Departure from the paper, which multiplies :math:`\hat v` by a further :math:`b_2`: as in Optax and PyTorch, no
    factor. A schedule for ``b1`` is the paper's :math:`\mu_t`, in :math:`m_t` as well.

    PyTorch keeps :math:`m_t` under the constant :math:`b_1` and takes :math:`\mu_t = b_1 (1 - 0.96^{t \psi} / 2)`
    in :math:`\hat m_t` only: ``momentum_decay`` is its :math:`\psi`, and 4e-3 its default.

    Args:
        learning_rate: see `jadam.adam`.
        b1, b2, eps, eps_root, mu_dtype, eps_mode, bias_correction, moments: see `jadam.scale_by_adam`.
        nesterov: False gives `jadam.adam`.
        momentum_decay: None for Dozat's rule, a number >= 0 for PyTorch's.

    Returns:
        A transformation with `optax.nadam`'s state; with ``momentum_decay``, a `ScheduledBetasState` around it.

    Raises:
        ValueError, TypeError: see `jadam.adam`; also for ``momentum_decay`` with a schedule for ``b1``.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.nadam(0.1)
        >>> g = jnp.array([4.0, -2.0])
        >>> print(tx.update(g, tx.init(g))[0].round(3))
        [-0.147  0.147]
    """
    given = {**locals()}
    switches = {"nesterov": nesterov, "eps_mode": eps_mode, "bias_correction": bias_correction, "moments": moments}
    scale = _scale_by_nadam(momentum_decay, b1, b2, eps, eps_root, mu_dtype, **switches)
    return descend(scale, learning_rate).called(nadam, given)


def nadamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = True,
    eps_mode: str = "paper",
    bias_correction: bool = True,
    moments: Moments = "float32",
    momentum_decay: float | None = None,
    max_lr: float | None = None,
) -> Transformation:
    """`nadam` with decoupled weight decay, a drop-in for `optax.nadamw`.

    Args:
        learning_rate: see `jadam.adam`.
        b1, b2, eps, eps_root, mu_dtype, nesterov, eps_mode, bias_correction, moments, momentum_decay: see
            `nadam`.
        weight_decay, mask, max_lr: see `jadam.adamw`.

    Returns:
        A transformation with `optax.nadamw`'s state; ``update`` needs ``params``.

    Raises:
        ValueError, TypeError: see `nadam` and `jadam.adamw`.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.nadamw(0.1, weight_decay=0.5)
        >>> p = jnp.ones(2)
        >>> print(tx.update(0 * p, tx.init(p), p)[0])
        [-0.05 -0.05]
    """
    given = {**locals()}
    switches = {"nesterov": nesterov, "eps_mode": eps_mode, "bias_correction": bias_correction, "moments": moments}
    scale = _scale_by_nadam(momentum_decay, b1, b2, eps, eps_root, mu_dtype, **switches)
    return descend(scale, learning_rate, weight_decay, mask, max_lr).called(nadamw, given)
