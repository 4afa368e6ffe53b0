"""Record `jadam.statistics` in the optimizer's state every few steps, and read them afterwards."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jadam._core import checks
from jadam._core.meshes import call_with_auto_axes
from jadam._core.numerics import apply_updates
from jadam._core.trees import find_states, leaf_names, params_with_gradients
from jadam._diagnostics.describe import html_table
from jadam._diagnostics.statistics import (
    QUANTILES,
    SCALARS,
    Measures,
    last_leaf_updates,
    measure,
    steps_taken,
    to_rows,
)
from jadam._transformation.transformation import CustomUpdateFn, LeafwiseUpdate, Transformation

COLUMNS = len(SCALARS) + len(QUANTILES)
REMEDY_FOR_BARE_STATE = (
    "To add record to a running training: record(tx).init(params)._replace(inner_state=state); with Flax NNX: "
    "optimizer.opt_state = optimizer.opt_state._replace(inner_state=earlier.opt_state)."
)


class Ring(NamedTuple):
    """A ring buffer of the last ``keep`` records.

    ``steps``, int32 ``[keep]``, is the step of each record, -1 for an empty slot. ``values``, float32
    ``[keep, 1 + leaves, 11]``, has the `Measures` in total and of each parameter. ``names``, uint8, has the parameters'
    paths as text, one per line.
    """

    steps: jax.Array
    values: jax.Array
    names: jax.Array
    belongs_to_no_param = True  # jadam.describe counts it under no parameter, whatever the shapes of its arrays


class RecordState(NamedTuple):
    """State of `record`: that of the wrapped transformation, and the records."""

    inner_state: optax.OptState
    ring: Ring


class Record(Transformation):
    """The transformation that `record` returns."""


def record(
    tx: optax.GradientTransformation, every: int = 100, keep: int = 1000, *, sample: int | None = 2**15
) -> Record:
    """Record `jadam.statistics` in the state at every ``every``-th step, without leaving the device.

    Updates are those of ``tx``, and `jadam.step` is fused if it is for ``tx``. Steps without a record cost next to
    nothing. The records are a ring buffer of fixed size, so nothing recompiles and memory does not grow. The buffer is
    part of the state: it works under `jax.lax.scan`, on a mesh and with donation, and is saved and restored with the
    state. Read it with `history`.

    Put `record` around `jadam.exact_bf16` and `jadam.chain`, and inside `jadam.sharding.zero1` and Optax's wrappers,
    such as `optax.chain` and `optax.MultiSteps`. Steps are those of ``tx``: with `optax.MultiSteps` one for
    several mini-batches. Changes that later stages of an `optax.chain` make to the updates are not recorded.

    To add `record` to a running training, use the state ``record(tx).init(params)._replace(inner_state=state)``. To
    remove it, continue with ``state.inner_state``. With Flax NNX, make an optimizer with ``record(tx)`` and set
    ``optimizer.opt_state = optimizer.opt_state._replace(inner_state=earlier.opt_state)``.

    Compiling the statistics takes XLA about as long as compiling a small model, once for each ``tx``. In a notebook
    make ``tx`` once: what was compiled for others stays in memory until `jax.clear_caches`.

    Args:
        tx: a transformation that `jadam.statistics` supports, except `jadam.sharding.zero1`.
        every: record when the number of steps taken is a multiple of this; >= 1.
        keep: the number of records to keep, >= 1; later ones overwrite the oldest. A record takes 44 bytes per
            parameter array. ``init`` fixes this size: restore a saved state into one with the same ``keep``.
        sample: the number of coordinates of each parameter to use, see `jadam.statistics`. With the default, a fraction
            has a standard error of 0.3 %, if the coordinates are as good as random. A single NaN may be missed. None
            uses all coordinates, which takes a CPU as long as about fifty steps.

    Returns:
        A transformation with state `RecordState`; ``update`` needs ``params``.

    Raises:
        TypeError: `jadam.statistics` does not support ``tx``, or ``tx`` is a `jadam.sharding.zero1`.
        ValueError: ``every``, ``keep`` or ``sample`` is out of range, a chain has other stages (at ``init``), or ``tx``
            is a `record`.

    Example:
        >>> import jax, jax.numpy as jnp, jadam
        >>> tx = jadam.record(jadam.adam(0.1), every=2, keep=3)
        >>> def step(carry, _):
        ...     params, state = carry
        ...     return jadam.step(tx, {"w": params["w"] - 3.0}, state, params), None
        >>> params = {"w": jnp.ones(2)}
        >>> (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=11)
        >>> history = jadam.history(state)
        >>> print(history.steps, history.total["update_rms"].shape, list(history.leaves))
        [ 6  8 10] (3,) ["['w']"]
    """
    every, keep = checks.positive_int("every", every), checks.positive_int("keep", keep)
    sample = checks.positive_int("sample", sample, none=True)
    if not isinstance(tx, Transformation):
        raise TypeError(
            f"record needs a jadam optimizer, such as jadam.adam(...), got {checks.short_repr(tx)}. Optax's wrappers "
            "and jadam.sharding.zero1 must be outside: optax.MultiSteps(jadam.record(...), 4)."
        )
    if isinstance(tx, Record):
        raise ValueError("record must not be applied to another record. Remove one.")

    def init(params) -> Any:
        params = tx.update.without_untrainable(params, params)
        state = tx.init(params)
        recorded = []
        is_trained = lambda state, params: [not leaf.frozen for leaf in last_leaf_updates(tx, state, params)[1]]
        jax.eval_shape(lambda *args: recorded.extend(is_trained(*args)), state, params)
        names = ["total", *(name for name, on in zip(leaf_names(params), recorded, strict=True) if on)]
        values = jnp.zeros((keep, 1 + sum(recorded), COLUMNS), jnp.float32)
        names = jnp.asarray(np.frombuffer("\n".join(names).encode(), np.uint8))
        return RecordState(state, Ring(jnp.full(keep, -1, jnp.int32), values, names))

    after_step = functools.partial(_after_step, tx, every, sample)

    def update(updates, state, params=None, **extra_args) -> Any:
        """The inner ``update``, then a record of the new state and parameters if one is due."""
        if params is None:
            raise ValueError("record needs params: call update(updates, state, params).")
        checks.check_state_type(state, RecordState, REMEDY_FOR_BARE_STATE)
        params, _ = params_with_gradients(params, updates)
        updates, inner = tx.update(updates, state.inner_state, params, **extra_args)
        return updates, after_step(RecordState(inner, state.ring), apply_updates(params, updates))

    def leafwise(updates, state, params) -> LeafwiseUpdate:
        """The inner optimizer's `LeafwiseUpdate`; `jadam.step` calls ``after_step`` for the record."""
        checks.check_state_type(state, RecordState, REMEDY_FOR_BARE_STATE)
        leaf_updates, rebuild_state = tx.update.leafwise(updates, state.inner_state, params)
        return LeafwiseUpdate(leaf_updates, lambda arrays: RecordState(rebuild_state(arrays), state.ring))

    return Record(
        init,
        CustomUpdateFn(
            leafwise,
            f"jadam.record({tx!r}, every={every}, keep={keep}, sample={sample})",
            tx,
            tx.update.needs_gradient_values,
            after_step,
            is_frozen=tx.update.is_frozen,
            fills_frozen=tx.update.fills_frozen,
            function=update,
        ),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # eager calls would compile the loop at every step
def _after_step(tx, every, sample, state, params):
    """The state with a new record of it and of the new parameters, if the step count is a multiple of ``every``."""

    def write_record(inner, params, steps, values):
        """The ring's ``steps`` and ``values`` after this step."""
        is_due = lambda carry: (carry[0] == 0) & (steps_taken(inner) % every == 0)

        def write(carry):
            """Compute the statistics and put them in place of the oldest record."""
            iteration, steps, values = carry
            # Tie the inputs to the loop counter, or XLA hoists the statistics out of the loop and runs them every step.
            iteration, inputs, count = jax.lax.optimization_barrier((iteration, (inner, params), steps_taken(inner)))
            *scalars, quantiles = measure(tx, sample, *inputs)[1]
            row = jnp.concatenate([jnp.stack(scalars, axis=1), quantiles], axis=1)
            slot = jnp.argmin(steps)
            put = lambda array, x: jax.lax.dynamic_update_index_in_dim(array, x, slot, 0)
            return iteration + 1, put(steps, count.astype(steps.dtype)), put(values, row)

        # A loop of at most one iteration instead of lax.cond, for which XLA would copy the ring at every step.
        return jax.lax.while_loop(is_due, write, (jnp.int32(0), steps, values))[1:]

    inner, ring, params = *jax.lax.stop_gradient(state), jax.lax.stop_gradient(params)
    steps, values = call_with_auto_axes(write_record, inner, params, ring.steps, ring.values)
    return RecordState(state.inner_state, Ring(steps, values, ring.names))


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """The records of `record`, oldest first, as NumPy arrays. Compared by identity.

    ``total`` and each of ``leaves`` map the field names of `Measures` to arrays with one value for each of ``steps``;
    ``step_quantiles`` has a row of five.
    """

    steps: np.ndarray
    total: dict[str, np.ndarray]
    leaves: dict[str, dict[str, np.ndarray]]

    def frame(self) -> Any:
        """A `pandas.DataFrame` indexed by step and parameter, including ``"total"``; needs pandas."""
        try:
            import pandas
        except ImportError:
            raise ImportError(
                "frame needs pandas: pip install pandas. Without pandas, use steps, total and leaves."
            ) from None
        columns = [*SCALARS, *(f"step_{100 * q:.0f}%" for q in QUANTILES)]
        frames = {}
        for name, x in {"total": self.total, **self.leaves}.items():
            values = np.column_stack([*(x[key] for key in SCALARS), x["step_quantiles"]])
            frames[name] = pandas.DataFrame(values, pandas.Index(self.steps, name="step"), columns)
        return pandas.concat(frames, names=["parameter"]).swaplevel().sort_index(level="step", sort_remaining=False)

    def __repr__(self):
        span = f", steps {self.steps[0]} to {self.steps[-1]}" if len(self.steps) else ""
        return f"History({len(self.steps)} records of {len(self.leaves)} parameters{span})"

    def _repr_html_(self):
        """The last record as a table, for notebooks."""
        if not len(self.steps):
            return html_table([("parameter",)], [repr(self)])
        measures = {"total": self.total, **self.leaves}
        last = {name: Measures(*(x[key][-1] for key in Measures._fields)) for name, x in measures.items()}
        return html_table(to_rows(last), [f"Last record of {self!r}"])


def history(state: optax.OptState) -> History:
    """Read the records of `record` from anywhere in ``state``.

    Args:
        state: the state of a transformation that contains one `record`.

    Returns:
        A `History`, oldest record first: ``steps``, ``total`` and ``leaves`` are NumPy arrays; ``frame()`` is a pandas
        frame where pandas is installed; `jadam.plot` draws it.

    Raises:
        ValueError: ``state`` has no `RecordState`, or several, or a batched one from `jax.vmap`; or its arrays were
            donated or deleted.
        TypeError: it was called within `jax.jit`.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.record(jadam.adam(0.1), every=1)
        >>> params = jnp.ones(2)
        >>> _, state = jadam.step(tx, jnp.ones(2), tx.init(params), params)
        >>> history = jadam.history(state)
        >>> print(history, history.total["snr"].round(3))
        History(1 records of 1 parameters, steps 1 to 1) [1.]
    """
    checks.check_not_transformation(state)
    found = find_states(state, RecordState)
    if len(found) != 1:
        raise ValueError(
            f"No recorded statistics in this state: {checks.short_repr(state)}. Wrap the optimizer: jadam.record(tx). "
            "With Flax NNX pass optimizer.opt_state; restore a checkpoint into the state that init returns."
            if not found
            else f"state must have one RecordState, found {len(found)}. Pass one of them."
        )
    ring = found[0].ring
    checks.check_values(ring, "state.ring")
    if any(isinstance(x, jax.core.Tracer) for x in ring):
        raise TypeError("state must have concrete values, got tracers. Call history outside of jax.jit.")
    if jnp.ndim(ring.steps) != 1:
        raise ValueError(
            f"state must not be batched, got steps of shape {ring.steps.shape}, as from jax.vmap. For the first one: "
            "history(jax.tree.map(lambda x: x[0], state))."
        )
    steps, values, names = map(np.asarray, ring)
    order = np.argsort(steps)[np.sum(steps < 0) :]  # without empty slots
    steps, values = steps[order], values[order]

    def columns(x):
        """Return a dict from the names of `Measures` to values, of an array ``[records, 11]``."""
        return {**{name: x[:, i] for i, name in enumerate(SCALARS)}, "step_quantiles": x[:, len(SCALARS) :]}

    total, *leaves = (columns(values[:, i]) for i in range(values.shape[1]))
    return History(steps, total, dict(zip(names.tobytes().decode().split("\n")[1:], leaves, strict=True)))
