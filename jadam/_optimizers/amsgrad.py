"""AMSGrad: Adam whose second moment never shrinks (Reddi, Kale & Kumar, ICLR 2018, arXiv:1904.09237)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jadam._core import checks
from jadam._core.numerics import abs_sq, ema
from jadam._moments.formats import FormatChoice
from jadam._optimizers.adam import adam_direction, hyperparam_transform
from jadam._transformation.public import EpsMode, call_as_repr
from jadam._transformation.transformation import (
    Hyperparams,
    Rule,
    Transformation,
    scale_by_learning_rate_and_decay,
    scale_by_rule,
)


def amsgrad_rule(hp: Hyperparams, g, m, v, v_max):
    """Adam with the maximum of ``v_hat`` over all steps in place of ``v_hat``."""
    m = ema(hp.b1, m, g)
    v = ema(hp.b2, v, abs_sq(g))
    v_max = jnp.maximum(v_max, v / hp.b2.correction)
    return adam_direction(hp, m / hp.b1.correction, v_max), m, v, v_max


def amsgrad_max_of_v_rule(hp: Hyperparams, g, m, v, v_max):
    """Adam with the maximum of ``v`` over all steps, divided by the current ``1 - b2**t``, in place of ``v_hat``."""
    m = ema(hp.b1, m, g)
    v = ema(hp.b2, v, abs_sq(g))
    v_max = jnp.maximum(v_max, v)
    return adam_direction(hp, m / hp.b1.correction, v_max / hp.b2.correction), m, v, v_max


AMSGRAD = Rule(
    amsgrad_rule, optax.ScaleByAmsgradState, native="amsgrad", denominator=lambda hp, v, v_max: jnp.sqrt(v_max)
)
AMSGRAD_MAX_OF_V = Rule(
    amsgrad_max_of_v_rule,
    optax.ScaleByAmsgradState,
    native="amsgrad_max_of_v",
    denominator=lambda hp, v, v_max: jnp.sqrt(v_max / hp.b2.correction),
)


@call_as_repr
def scale_by_amsgrad(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    max_of: Literal["v_hat", "v"] = "v_hat",
    eps_mode: EpsMode = "paper",
    moments: FormatChoice = "float32",
) -> Transformation:
    r"""Rescale gradients by AMSGrad's rule, without the learning rate.

    Reddi, Kale & Kumar 2018, Algorithm 2, is `jadam.scale_by_adam` with :math:`\hat v_t` replaced by

    * ``max_of="v_hat"`` (Optax): :math:`\max_{s \le t} v_s / (1 - b_2^s)`,
    * ``max_of="v"`` (PyTorch): :math:`(\max_{s \le t} v_s) / (1 - b_2^t)`.

    The paper has no bias correction. With both corrections off, the two are the same.

    Args:
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the denominator, >= 0, in the unit of the gradient.
        eps_root: added inside the square root, >= 0, in the unit of the gradient squared.
        mu_dtype: dtype in which the first moment is stored. Default: the dtype of the parameter, at least float32.
        bias_correction_mu: False leaves out the bias correction of the first moment.
        bias_correction_nu: False leaves out the bias correction of the second moment.
        max_of: the second moment whose maximum is kept, ``"v_hat"`` (Optax) or ``"v"`` (PyTorch).
        eps_mode: ``"paper"`` adds ``eps`` as Algorithm 1 does; ``"hat"`` takes it as the paper's :math:`\hat\epsilon`,
            added before the bias correction.
        moments: storage of the moments: ``"float32"`` or ``"bfloat16"``, or a function ``f(path, leaf)`` that returns
            one of these.

    Returns:
        A transformation with state `optax.ScaleByAmsgradState`: the state of `jadam.scale_by_adam` and ``nu_max``, the
        maximum, 12 bytes per parameter in all.

    Raises:
        ValueError, TypeError: see `jadam.scale_by_adam`; also for another ``max_of``.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.scale_by_amsgrad(b1=0.0, b2=0.5)
        >>> state = tx.init(jnp.zeros(1))
        >>> for g in (10.0, 1.0):  # the denominator of the small gradient is still that of the large one
        ...     updates, state = tx.update(jnp.array([g]), state)
        >>> print(updates.round(3))
        [0.1]
    """
    checks.check_one_of("max_of", max_of, ("v_hat", "v"))
    checks.check_one_of("bias_correction_mu", bias_correction_mu, (True, False))
    checks.check_one_of("bias_correction_nu", bias_correction_nu, (True, False))
    corrected = {"b1": bias_correction_mu, "b2": bias_correction_nu}
    return scale_by_rule(
        AMSGRAD if max_of == "v_hat" else AMSGRAD_MAX_OF_V,
        {"b1": b1, "b2": b2},
        {"eps": eps, "eps_root": eps_root},
        mu_dtype,
        moments,
        hyperparam_transform(eps_mode, tuple(beta for beta, on in corrected.items() if not on)),
    )


@call_as_repr
def amsgrad(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    max_of: Literal["v_hat", "v"] = "v_hat",
    eps_mode: EpsMode = "paper",
    moments: FormatChoice = "float32",
) -> Transformation:
    r"""AMSGrad, a drop-in for `optax.amsgrad`; ``max_of="v"`` is ``torch.optim.Adam(amsgrad=True)``.

    Args:
        learning_rate: step size :math:`\alpha` >= 0: a number, or a schedule of the number of steps taken.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the denominator, >= 0, in the unit of the gradient.
        eps_root: added inside the square root, >= 0, in the unit of the gradient squared.
        mu_dtype: dtype in which the first moment is stored. Default: the dtype of the parameter, at least float32.
        bias_correction_mu: False leaves out the bias correction of the first moment.
        bias_correction_nu: False leaves out the bias correction of the second moment.
        max_of: the second moment whose maximum is kept, ``"v_hat"`` (Optax) or ``"v"`` (PyTorch).
        eps_mode: ``"paper"`` adds ``eps`` as Algorithm 1 does; ``"hat"`` takes it as the paper's :math:`\hat\epsilon`,
            added before the bias correction.
        moments: storage of the moments: ``"float32"`` or ``"bfloat16"``, or a function ``f(path, leaf)`` that returns
            one of these.

    Returns:
        A transformation with `optax.amsgrad`'s state.

    Raises:
        ValueError, TypeError: see `scale_by_amsgrad`.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.amsgrad(0.1)
        >>> g = jnp.array([4.0, -2.0])
        >>> print(tx.update(g, tx.init(g))[0].round(3))
        [-0.1  0.1]
    """
    switches = {"max_of": max_of, "eps_mode": eps_mode, "moments": moments}
    corrections = (bias_correction_mu, bias_correction_nu)
    return scale_by_learning_rate_and_decay(
        scale_by_amsgrad(b1, b2, eps, eps_root, mu_dtype, *corrections, **switches), learning_rate
    )
