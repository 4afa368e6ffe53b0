"""Adam: Algorithm 1 of Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, arXiv:1412.6980.

Variables have the paper's names: gradient ``g``, moments ``m`` and ``v``, bias-corrected moments ``m_hat`` and
``v_hat``, step ``t``. Arguments and state fields have Optax's: ``b1, b2, eps`` and ``count, mu, nu``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import optax

from jadam._core import checks
from jadam._core.numerics import abs_sq, divide, ema, sqrt
from jadam._moments.formats import FormatChoice
from jadam._transformation.public import EpsMode, Mask, call_as_repr
from jadam._transformation.transformation import (
    Hyperparams,
    Rule,
    Transformation,
    scale_by_learning_rate_and_decay,
    scale_by_rule,
)


def adam_rule(hp: Hyperparams, g, m, v):
    """One step of Algorithm 1 on one array. Returns the direction ``u``; the update is ``-learning_rate * u``."""
    m = ema(hp.b1, m, g)
    v = ema(hp.b2, v, abs_sq(g))
    m_hat = m / hp.b1.correction
    v_hat = v / hp.b2.correction
    return adam_direction(hp, m_hat, v_hat), m, v


def adam_direction(hp: Hyperparams, m_hat, v_hat):
    """The last line of Algorithm 1, without the learning rate."""
    return divide(m_hat, sqrt(v_hat + hp.eps_root) + hp.eps)


def nadam_rule(hp: Hyperparams, g, m, v):
    """Adam with the ``m_hat`` of Nesterov momentum (Dozat 2016, Algorithm 2)."""
    m = ema(hp.b1, m, g)
    v = ema(hp.b2, v, abs_sq(g))
    return adam_direction(hp, nesterov_m_hat(hp, m, g), v / hp.b2.correction), m, v


def nesterov_m_hat(hp: Hyperparams, m, g):
    """``m_hat`` of Nesterov momentum: ``m`` under the next momentum plus the current gradient, each bias-corrected.

    The momentum is ``b1``, except under PyTorch's schedule (``momentum_decay`` of `nadam`).
    """
    momentum = hp.momentum
    return momentum.next_b * m / momentum.next_correction + momentum.one_minus_b * g / momentum.correction


ADAM = Rule(adam_rule, optax.ScaleByAdamState, native="adam", int8=True)
NADAM = Rule(nadam_rule, optax.ScaleByAdamState, native="nadam", int8=True, nesterov=True)


def eps_before_correction(hp: Hyperparams) -> Hyperparams:
    """Add ``eps`` to ``sqrt(v)`` instead of ``sqrt(v_hat)`` (Kingma & Ba 2015, end of section 2)."""
    return hp.replace(eps=hp.eps / sqrt(hp.b2.correction))


def without_correction(hp: Hyperparams, *names: str) -> Hyperparams:
    """Leave out the bias corrections of the betas ``names``."""
    one = hp.t / hp.t  # in the dtype of t, and traced if t is
    return hp.replace(**{name: vars(hp)[name]._replace(correction=one, next_correction=one) for name in names})


def hyperparam_transform(
    eps_mode: str, uncorrected: tuple[str, ...] = (), *further: Callable[[Hyperparams], Hyperparams]
):
    """Build the function that adapts a rule's hyperparameters to the options of the public functions.

    Args:
        eps_mode: where ``eps`` is added.
        uncorrected: betas without bias correction.
        further: functions to apply afterwards.
    """
    checks.check_one_of("eps_mode", eps_mode, ("paper", "hat"))
    return _hyperparam_transform(eps_mode == "hat", uncorrected, further)


@functools.cache  # equal options give the same function, so that transformations share compiled programs
def _hyperparam_transform(hat, uncorrected, further):
    """`hyperparam_transform`, cached."""

    def transform(hp):
        hp = without_correction(hp, *uncorrected) if uncorrected else hp
        hp = eps_before_correction(hp) if hat else hp
        return functools.reduce(lambda hp, f: f(hp), further, hp)

    return transform


@call_as_repr
def scale_by_adam(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    eps_mode: EpsMode = "paper",
    bias_correction: bool = True,
    moments: FormatChoice = "float32",
) -> Transformation:
    r"""Rescale gradients by Adam's rule, without the learning rate.

    Kingma & Ba 2015, Algorithm 1. At step :math:`t = 1, 2, \dots`, for every coordinate,

    .. math::

        m_t &= b_1 m_{t-1} + (1 - b_1) g_t, & v_t &= b_2 v_{t-1} + (1 - b_2) |g_t|^2, \\
        \hat m_t &= m_t / (1 - b_1^t),      & \hat v_t &= v_t / (1 - b_2^t), \\
        u_t &= \hat m_t / (\sqrt{\hat v_t + \texttt{eps\_root}} + \texttt{eps}).

    ``eps_root`` (0 in the paper) and ``nesterov`` are additions. Arithmetic is in float32, or in float64 if the
    gradient or the state is; the page "Accuracy" of the documentation has the error. The range of float32 has two
    consequences:

    * :math:`|g|` below about 1e-19 has a square of 0. The update is then at most :math:`\hat m` / ``eps``, or
      :math:`\hat m` if ``eps`` is 0.
    * :math:`|g|` above 1e19 makes ``nu`` infinite. The update is 0 at this step and NaN from the next step on; it is
      NaN at once if ``b2`` is below 1/2.

    ``b1``, ``b2``, ``eps`` and ``eps_root`` may each be

    * a Python number, the most exact choice, because :math:`1-b` is computed in float64;
    * a schedule of the number of steps taken: :math:`b^t` becomes the product of the betas so far;
    * a scalar array, float32 or wider, traced or not, as `optax.inject_hyperparams` passes it: :math:`b^t` is the
      current beta to the power t. A traced value out of range cannot raise an error; it makes the update NaN. So
      does, for int8, a scheduled or traced pair with ``b1*b1 >= b2``.

    Args:
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the denominator, >= 0, in the unit of the gradient.
        eps_root: added inside the square root, >= 0, in the unit of the gradient squared.
        mu_dtype: dtype in which the first moment is stored. Default: the dtype of the parameter, at least float32.
        nesterov: True takes the Nesterov momentum of NAdam (Dozat 2016).
        eps_mode: ``"paper"`` adds ``eps`` to :math:`\sqrt{\hat v_t}`, as Algorithm 1 does. ``"hat"`` takes it as the
            paper's :math:`\hat\epsilon` (end of section 2) and adds it to :math:`\sqrt{v_t}` before the bias
            correction, as TensorFlow's Adam does.
        bias_correction: False leaves out both bias corrections, as section 6.4 of the paper does.
        moments: storage of the two moments: ``"float32"``, 8 bytes per parameter; ``"bfloat16"``, 4; ``"int8"``, 2.06,
            see `jadam.QuantizedAdamState`. Or a function ``f(path, leaf)`` that returns one of these, where ``path`` is
            a string such as ``"['embed']['kernel']"``. The step is computed in float32 from the decoded moments; no
            derivative passes through int8 codes. Some leaves stay float32 in any case: complex and float64 ones; for
            int8 also those with fewer than 2 dimensions, fewer than 4,096 elements or a last axis under 4.

    Returns:
        A transformation with state `optax.ScaleByAdamState`: ``count``, int32, is the number of steps taken and
        saturates; ``mu`` and ``nu`` have the shapes of the parameters and their dtypes, at least float32; ``nu`` is
        real. If a beta is a schedule, a `ScheduledBetasState` wraps it. Updates have the dtype to which gradient and
        parameter promote.

    Raises:
        ValueError: if a hyperparameter is out of range, ``moments="int8"`` is used with ``b1*b1 >= b2`` or with
            ``mu_dtype``, or gradients do not match the state.
        TypeError: if a hyperparameter is not a number or is narrower than float32, a leaf is not floating, or the
            second moments of the state are 16-bit.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.scale_by_adam()
        >>> params = {"w": jnp.zeros(2, jnp.bfloat16)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.array([3.0, -0.001])}, state, params)
        >>> print(updates["w"].round(3), state.nu["w"].dtype)
        [ 1. -1.] float32
    """
    checks.check_one_of("nesterov", nesterov, (True, False))
    checks.check_one_of("bias_correction", bias_correction, (True, False))
    return scale_by_rule(
        NADAM if nesterov else ADAM,
        {"b1": b1, "b2": b2},
        {"eps": eps, "eps_root": eps_root},
        mu_dtype,
        moments,
        hyperparam_transform(eps_mode, () if bias_correction else ("b1", "b2", "momentum")),
    )


@call_as_repr
def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    eps_mode: EpsMode = "paper",
    bias_correction: bool = True,
    moments: FormatChoice = "float32",
) -> Transformation:
    r"""Adam (Kingma & Ba 2015, Algorithm 1), a drop-in for `optax.adam`: the same arguments, state and checkpoints.

    :math:`\theta_t = \theta_{t-1} - \alpha_t u_t` with :math:`u_t` of `scale_by_adam`, which says more about each
    argument.

    Args:
        learning_rate: step size :math:`\alpha` >= 0: a number, or a schedule of the number of steps taken.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the denominator, >= 0, in the unit of the gradient.
        eps_root: added inside the square root, >= 0, in the unit of the gradient squared.
        mu_dtype: dtype in which the first moment is stored. Default: the dtype of the parameter, at least float32.
        nesterov: True takes the Nesterov momentum of `jadam.nadam`.
        eps_mode: ``"paper"`` adds ``eps`` as Algorithm 1 does; ``"hat"`` takes it as the paper's :math:`\hat\epsilon`,
            added before the bias correction.
        bias_correction: False leaves out both bias corrections.
        moments: storage of the moments: ``"float32"``, ``"bfloat16"`` or ``"int8"``, or a function ``f(path, leaf)``
            that returns one of these.

    Returns:
        A transformation with `optax.adam`'s state: a tuple of `optax.ScaleByAdamState` and the learning rate's.

    Raises:
        ValueError, TypeError: see `scale_by_adam`; also for ``learning_rate``.

    Example:
        >>> import jax, jax.numpy as jnp, jadam, optax
        >>> loss = lambda w: jnp.sum((w - 1.0) ** 2)
        >>> tx = jadam.adam(optax.cosine_decay_schedule(0.1, 100))
        >>> w = jnp.zeros(3)
        >>> state = tx.init(w)
        >>> for _ in range(100):
        ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> bool(loss(w) < 1e-3)
        True
    """
    switches = {"nesterov": nesterov, "eps_mode": eps_mode, "bias_correction": bias_correction, "moments": moments}
    return scale_by_learning_rate_and_decay(scale_by_adam(b1, b2, eps, eps_root, mu_dtype, **switches), learning_rate)


@call_as_repr
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = False,
    eps_mode: EpsMode = "paper",
    bias_correction: bool = True,
    moments: FormatChoice = "float32",
    max_lr: float | None = None,
) -> Transformation:
    r"""Adam with decoupled weight decay, a drop-in for `optax.adamw`: the same arguments, state and checkpoints.

    :math:`\theta_t = \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})` with :math:`u_t` of `scale_by_adam`:
    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv:1711.05101, Algorithm 2. As in Optax
    and PyTorch, the learning rate multiplies the decay.

    Args:
        learning_rate: step size :math:`\alpha` >= 0: a number, or a schedule of the number of steps taken.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the denominator, >= 0, in the unit of the gradient.
        eps_root: added inside the square root, >= 0, in the unit of the gradient squared.
        mu_dtype: dtype in which the first moment is stored. Default: the dtype of the parameter, at least float32.
        weight_decay: :math:`\lambda` >= 0: a number, or a schedule of the number of steps taken.
        mask: a tree of booleans like the parameters, a prefix of it, or a function from the parameters to one. Weight
            decay applies where it is True. Default: everywhere.
        nesterov: True takes the Nesterov momentum of `jadam.nadam`.
        eps_mode: ``"paper"`` adds ``eps`` as Algorithm 1 does; ``"hat"`` takes it as the paper's :math:`\hat\epsilon`,
            added before the bias correction.
        bias_correction: False leaves out both bias corrections.
        moments: storage of the moments: ``"float32"``, ``"bfloat16"`` or ``"int8"``, or a function ``f(path, leaf)``
            that returns one of these.
        max_lr: None multiplies the decay by the learning rate. A number > 0, the peak of the schedule, makes the decay
            independent of that peak: :math:`(\alpha_t / \texttt{max\_lr}) \lambda`.

    Returns:
        A transformation with `optax.adamw`'s state; ``update`` needs ``params``.

    Raises:
        ValueError, TypeError: see `scale_by_adam`; also for ``learning_rate``, ``weight_decay``, ``mask`` and
            ``max_lr``, and for an ``update`` without ``params``.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.adamw(0.1, weight_decay=0.5, mask={"w": True, "b": False})
        >>> params = {"w": jnp.ones(1), "b": jnp.ones(1)}
        >>> updates, _ = tx.update({"w": jnp.zeros(1), "b": jnp.zeros(1)}, tx.init(params), params)
        >>> print(updates["w"], updates["b"])
        [-0.05] [-0.]
    """
    switches = {"nesterov": nesterov, "eps_mode": eps_mode, "bias_correction": bias_correction, "moments": moments}
    direction = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, **switches)
    return scale_by_learning_rate_and_decay(direction, learning_rate, weight_decay, mask, max_lr)


@call_as_repr
def nadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = True,
    eps_mode: EpsMode = "paper",
    bias_correction: bool = True,
    moments: FormatChoice = "float32",
    momentum_decay: float | None = None,
) -> Transformation:
    r"""Adam with Nesterov momentum, a drop-in for `optax.nadam`.

    Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop 2016, Algorithm 2: `jadam.adam` with

    .. math::

        \hat m_t = \frac{\mu_{t+1} m_t}{1 - \prod_{i=1}^{t+1} \mu_i} + \frac{(1 - \mu_t) g_t}{1 - \prod_{i=1}^t \mu_i},

    where :math:`\mu_t` is ``b1``, a constant or a schedule. The paper also multiplies :math:`\hat v` by :math:`b_2`;
    like Optax and PyTorch, jadam does not.

    With ``momentum_decay`` :math:`\psi`, :math:`\hat m_t` takes :math:`\mu_t = b_1 (1 - 0.96^{t \psi} / 2)` and
    :math:`m_t` keeps the constant :math:`b_1`, as in PyTorch, where :math:`\psi` is 4e-3 by default.

    Args:
        learning_rate: step size :math:`\alpha` >= 0: a number, or a schedule of the number of steps taken.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the denominator, >= 0, in the unit of the gradient.
        eps_root: added inside the square root, >= 0, in the unit of the gradient squared.
        mu_dtype: dtype in which the first moment is stored. Default: the dtype of the parameter, at least float32.
        nesterov: False gives `jadam.adam`.
        eps_mode: ``"paper"`` adds ``eps`` as Algorithm 1 does; ``"hat"`` takes it as the paper's :math:`\hat\epsilon`,
            added before the bias correction.
        bias_correction: False leaves out both bias corrections.
        moments: storage of the moments: ``"float32"``, ``"bfloat16"`` or ``"int8"``, or a function ``f(path, leaf)``
            that returns one of these.
        momentum_decay: :math:`\psi` >= 0 takes PyTorch's momentum schedule; None keeps the momentum at ``b1``.

    Returns:
        A transformation with `optax.nadam`'s state. With ``momentum_decay``, a `ScheduledBetasState` wraps it.

    Raises:
        ValueError, TypeError: see `jadam.adam`; also for ``momentum_decay`` with a schedule for ``b1``.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.nadam(0.1)
        >>> g = jnp.array([4.0, -2.0])
        >>> print(tx.update(g, tx.init(g))[0].round(3))
        [-0.147  0.147]
    """
    switches = {"nesterov": nesterov, "eps_mode": eps_mode, "bias_correction": bias_correction, "moments": moments}
    scale = _scale_by_nadam(momentum_decay, b1, b2, eps, eps_root, mu_dtype, **switches)
    return scale_by_learning_rate_and_decay(scale, learning_rate)


@call_as_repr
def nadamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = True,
    eps_mode: EpsMode = "paper",
    bias_correction: bool = True,
    moments: FormatChoice = "float32",
    momentum_decay: float | None = None,
    max_lr: float | None = None,
) -> Transformation:
    r"""`nadam` with decoupled weight decay, a drop-in for `optax.nadamw`.

    Args:
        learning_rate: step size :math:`\alpha` >= 0: a number, or a schedule of the number of steps taken.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the denominator, >= 0, in the unit of the gradient.
        eps_root: added inside the square root, >= 0, in the unit of the gradient squared.
        mu_dtype: dtype in which the first moment is stored. Default: the dtype of the parameter, at least float32.
        weight_decay: :math:`\lambda` >= 0: a number, or a schedule of the number of steps taken.
        mask: a tree of booleans like the parameters, a prefix of it, or a function from the parameters to one. Weight
            decay applies where it is True. Default: everywhere.
        nesterov: False gives `jadam.adamw`.
        eps_mode: ``"paper"`` adds ``eps`` as Algorithm 1 does; ``"hat"`` takes it as the paper's :math:`\hat\epsilon`,
            added before the bias correction.
        bias_correction: False leaves out both bias corrections.
        moments: storage of the moments: ``"float32"``, ``"bfloat16"`` or ``"int8"``, or a function ``f(path, leaf)``
            that returns one of these.
        momentum_decay: :math:`\psi` >= 0 takes PyTorch's momentum schedule; None keeps the momentum at ``b1``.
        max_lr: None multiplies the decay by the learning rate. A number > 0, the peak of the schedule, makes the decay
            independent of that peak: :math:`(\alpha_t / \texttt{max\_lr}) \lambda`.

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
    switches = {"nesterov": nesterov, "eps_mode": eps_mode, "bias_correction": bias_correction, "moments": moments}
    scale = _scale_by_nadam(momentum_decay, b1, b2, eps, eps_root, mu_dtype, **switches)
    return scale_by_learning_rate_and_decay(scale, learning_rate, weight_decay, mask, max_lr)


def _scale_by_nadam(momentum_decay, b1, b2, eps, eps_root, mu_dtype, **switches):
    """`scale_by_adam`, or NAdam with PyTorch's momentum schedule if ``momentum_decay`` is a number."""
    if momentum_decay is None:
        return scale_by_adam(b1, b2, eps, eps_root, mu_dtype, **switches)
    if callable(b1) or not (switches["nesterov"] and switches["bias_correction"]):
        raise ValueError(
            "momentum_decay must be None unless b1 is a number and nesterov and bias_correction are True, got "
            f"{momentum_decay!r}. To schedule the momentum of Dozat's own rule, make b1 a schedule."
        )
    decay = checks.hyperparameter("momentum_decay", momentum_decay, ">= 0", schedule=False)
    momentum = lambda count: b1 * (1 - 0.5 * 0.96 ** (decay * (count + 1.0)))
    return scale_by_rule(
        NADAM,
        {"b1": b1, "b2": b2, "momentum": momentum},
        {"eps": eps, "eps_root": eps_root},
        mu_dtype,
        switches["moments"],
        hyperparam_transform(switches["eps_mode"]),
    )
