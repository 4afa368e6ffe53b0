"""Adam, Algorithm 1 of Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, arXiv:1412.6980.

Letters are the paper's: gradient ``g``, moments ``m`` and ``v``, their bias-corrected forms ``m_hat`` and
``v_hat``, step ``t``. Arguments and state fields (``b1, b2, eps``; ``count, mu, nu``) are Optax's.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from jadam._core import checks
from jadam._core.numerics import abs_sq, divide, ema, sqrt
from jadam._moments.formats import Moments
from jadam._transformation.transformation import (
    Hyperparams,
    Rule,
    Transformation,
    call_as_repr,
    scale_by_learning_rate_and_decay,
    scale_by_rule,
)


def adam_rule(hp: Hyperparams, g, m, v):
    """One step of Algorithm 1 on one array: the direction ``u``, to be taken ``-learning_rate`` times."""
    m = ema(hp.b1, m, g)
    v = ema(hp.b2, v, abs_sq(g))
    m_hat = m / hp.b1.correction
    v_hat = v / hp.b2.correction
    return direction(hp, m_hat, v_hat), m, v


def direction(hp: Hyperparams, m_hat, v_hat):
    """The last line of Algorithm 1, without the learning rate."""
    return divide(m_hat, sqrt(v_hat + hp.eps_root) + hp.eps)


def nadam_rule(hp: Hyperparams, g, m, v):
    """Adam whose ``m_hat`` looks one step ahead (Dozat 2016, Algorithm 2)."""
    m = ema(hp.b1, m, g)
    v = ema(hp.b2, v, abs_sq(g))
    return direction(hp, nesterov_m_hat(hp, m, g), v / hp.b2.correction), m, v


def nesterov_m_hat(hp: Hyperparams, m, g):
    """Nesterov's ``m_hat``: the next step's momentum on ``m``, today's gradient besides, each corrected on its own.

    The momentum is ``b1``, under which ``m`` is the average, but for PyTorch's.
    """
    momentum = hp.momentum
    return momentum.next_b * m / momentum.next_correction + momentum.one_minus_b * g / momentum.correction


ADAM = Rule(adam_rule, optax.ScaleByAdamState, native="adam", int8=True)
NADAM = Rule(nadam_rule, optax.ScaleByAdamState, native="nadam", int8=True, nesterov=True)


def eps_before_correction(hp: Hyperparams) -> Hyperparams:
    """Kingma & Ba 2015, end of section 2: ``eps`` is added to ``sqrt(v)`` where Algorithm 1 has ``sqrt(v_hat)``."""
    return hp.replace(eps=hp.eps / sqrt(hp.b2.correction))


def without_correction(hp: Hyperparams, *names: str) -> Hyperparams:
    """The bias corrections of these betas left out."""
    one = hp.t / hp.t
    return hp.replace(**{name: vars(hp)[name]._replace(correction=one, next_correction=one) for name in names})


def hyperparam_transform(
    eps_mode: str, uncorrected: tuple[str, ...] = (), *further: Callable[[Hyperparams], Hyperparams]
):
    """The function from a rule's scalars to those under ``eps_mode``, without the corrections of these betas.

    ``further`` functions are applied to its result.
    """
    checks.check_one_of("eps_mode", eps_mode, ("paper", "hat"))
    return _hyperparam_transform(eps_mode == "hat", uncorrected, further)


@functools.cache  # one function for all transformations with these switches, so that they share compiled programs
def _hyperparam_transform(hat, uncorrected, further):
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
    eps_mode: str = "paper",
    bias_correction: bool = True,
    moments: Moments = "float32",
) -> Transformation:
    r"""Rescale gradients by Adam's rule, without the learning rate.

    Kingma & Ba 2015, Algorithm 1. At step :math:`t = 1, 2, \dots`, for every coordinate,

    .. math::

        m_t &= b_1 m_{t-1} + (1 - b_1) g_t, & v_t &= b_2 v_{t-1} + (1 - b_2) |g_t|^2, \\
        \hat m_t &= m_t / (1 - b_1^t),      & \hat v_t &= v_t / (1 - b_2^t), \\
        u_t &= \hat m_t / (\sqrt{\hat v_t + \texttt{eps\_root}} + \texttt{eps}).

    Departures from the paper: ``eps_root`` (0 in the paper) and ``nesterov``. All arithmetic is in float32,
    or float64 where gradient or state are; see the README for the error bound. Two consequences of float32's
    range: a coordinate with :math:`|g|` below about 1e-19 is squared to less than float32 can hold and moves by
    at most :math:`\hat m` / ``eps`` (by :math:`\hat m` if ``eps`` is 0); one above 1e19 makes ``nu`` infinite,
    the update 0, and from the next step on NaN; NaN at once if ``b2`` is below 1/2.

    Args:
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the denominator, >= 0, in the gradient's unit.
        eps_root: added inside the square root, >= 0, in the gradient's unit squared.
        mu_dtype: dtype in which ``mu`` is stored; default the parameter's, at least float32.
        nesterov: look one step ahead, as NAdam does (Dozat 2016).
        eps_mode: ``"paper"`` adds ``eps`` as Algorithm 1 does; ``"hat"`` adds it to :math:`\sqrt{v_t}` before the
            correction, the cheaper order at the end of the paper's section 2 and TensorFlow's Adam.
        bias_correction: False leaves out both corrections, as the paper's section 6.4 does to show their use.
        moments: how the two moments are stored: ``"float32"``, 8 bytes per parameter; ``"bfloat16"``, 4;
            ``"int8"``, 2.06, see `jadam.QuantizedAdamState`; or a function ``f(path, leaf)`` to one of these, ``path``
            being a string such as ``"['embed']['kernel']"``. The step itself is computed in float32, from moments
            decoded and before they are rounded; no derivative passes through int8 codes to later steps. A leaf that
            would not gain stays float32: one that is complex or float64; for int8 also one of fewer than 2 dimensions
            or 4,096 elements, or with a last axis under 4.

        The four numbers may be Python numbers, best because :math:`1-b` is then exact; or schedules of the number of
        steps taken, as theorem 4.1 has of :math:`b_1`: then :math:`b^t` becomes the product of the betas so far; or
        scalar arrays of at least float32, traced or not, as `optax.inject_hyperparams` passes them: then
        :math:`b^t` is today's beta to the power t. A traced value out of range cannot raise; it makes the update NaN,
        and so does, for int8, a scheduled or traced pair with ``b1*b1 >= b2``.

    Returns:
        A transformation with state `optax.ScaleByAdamState`: ``count`` int32, the number of steps taken, which
        saturates; ``mu`` and ``nu`` shaped like the parameters, of their dtype widened to float32, ``nu`` real:
        8 bytes per parameter. If a beta is a schedule, a `ScheduledBetasState` around it. Updates have the dtype of
        the gradient promoted with the parameter's.

    Raises:
        ValueError: a hyperparameter outside its range, ``moments="int8"`` with ``b1*b1 >= b2`` or with ``mu_dtype``, or
            gradients that do not match the state.
        TypeError: a hyperparameter that is no number or narrower than float32, a leaf that is not floating, or
            a state with 16-bit second moments.

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
    eps_mode: str = "paper",
    bias_correction: bool = True,
    moments: Moments = "float32",
) -> Transformation:
    r"""Adam: :math:`\theta_t = \theta_{t-1} - \alpha_t u_t` with :math:`u_t` of `scale_by_adam`.

    Kingma & Ba 2015, Algorithm 1. A drop-in for `optax.adam`: the same arguments, state and checkpoints.

    Args:
        learning_rate: step size :math:`\alpha`, >= 0, in the parameters' unit, or a schedule that maps the number
            of steps taken (int32) to it.
        b1, b2, eps, eps_root, mu_dtype, nesterov, eps_mode, bias_correction, moments: see `scale_by_adam`.

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
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    eps_mode: str = "paper",
    bias_correction: bool = True,
    moments: Moments = "float32",
    max_lr: float | None = None,
) -> Transformation:
    r"""Adam with decoupled weight decay: :math:`\theta_t = \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1})`.

    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv:1711.05101, Algorithm 2, with
    the decay multiplied by the learning rate as Optax and PyTorch do. A drop-in for `optax.adamw`: the same
    arguments, state and checkpoints.

    Args:
        learning_rate: see `adam`.
        b1, b2, eps, eps_root, mu_dtype, nesterov, eps_mode, bias_correction, moments: see `scale_by_adam`.
        weight_decay: :math:`\lambda` >= 0, or a schedule of it.
        mask: a tree of booleans with the parameters' structure (or a prefix of it), or a function from the
            parameters to one: True where the decay applies. Default: everywhere.
        max_lr: None couples the decay to the learning rate, :math:`\alpha_t \lambda`. A number > 0, the schedule's
            largest value, decouples it: :math:`(\alpha_t / \texttt{max\_lr}) \lambda`, Loshchilov & Hutter's
            :math:`\eta_t \lambda`, for which :math:`\lambda` must be smaller by a factor max_lr.

    Returns:
        A transformation with `optax.adamw`'s state; ``update`` needs ``params``.

    Raises:
        ValueError, TypeError: see `scale_by_adam`; also for ``learning_rate``, ``weight_decay`` and ``mask``, and for
            an ``update`` without ``params``.

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
    switches = {"nesterov": nesterov, "eps_mode": eps_mode, "bias_correction": bias_correction, "moments": moments}
    scale = _scale_by_nadam(momentum_decay, b1, b2, eps, eps_root, mu_dtype, **switches)
    return scale_by_learning_rate_and_decay(scale, learning_rate, weight_decay, mask, max_lr)


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
    return scale_by_rule(
        NADAM, betas, scalars, mu_dtype, switches["moments"], hyperparam_transform(switches["eps_mode"])
    )
