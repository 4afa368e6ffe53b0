"""Flax's `Optimizer` (NNX) and `TrainState` (Linen) with `jadam.step` in place of ``tx.update`` and `apply_updates`.

jadam does not depend on Flax, so import this module explicitly: ``import jadam.flax``.
"""

import functools
from collections.abc import Mapping

try:
    from flax import nnx
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state
except ModuleNotFoundError:
    raise ImportError("jadam.flax needs Flax: pip install flax.") from None

from jadam._core import checks
from jadam._core.trees import without_variables
from jadam._fused.step import step


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer` with `jadam.step` as its `update`, one pass over memory. The state is the same.

    Args:
        model: an NNX module.
        tx: any Optax transformation; `jadam.step` says which ones are fused into one pass.
        wrt: filter of the variables to train, the same as for `nnx.grad`.
        **kwargs: passed to `nnx.Optimizer`.

    Raises:
        TypeError: ``wrt`` is missing, or a variable to train is not floating.

    Example:
        >>> import jax.numpy as jnp, jadam, jadam.flax
        >>> from flax import nnx
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> optimizer = jadam.flax.Optimizer(model, jadam.adam(0.1), wrt=nnx.Param)
        >>> @nnx.jit(donate_argnames=("model", "optimizer"))
        ... def train_step(model, optimizer, x):
        ...     grads = nnx.grad(lambda model: jnp.sum(model(x)))(model)
        ...     optimizer.update(model, grads)
        >>> train_step(model, optimizer, jnp.ones((1, 2)))
        >>> print(*(f"{x:.3f}" for x in model.bias[...]), optimizer.step[...])
        -0.100 -0.100 -0.100 1
    """

    def __init__(self, model, tx, *, wrt, **kwargs):
        """The same as `nnx.Optimizer`, with a check of ``tx``."""
        checks.check_transformation("Optimizer needs", tx)
        super().__init__(model, tx, wrt=wrt, **kwargs)

    # nnx.Optimizer.update returns None or updates, depending on Flax's version.
    def update(self, model, grads, /, **kwargs) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update ``model`` and the optimizer's state in place by one step.

        Args:
            model: the module passed to the constructor, or one with the same structure.
            grads: gradients, as `nnx.grad` returns them; those not selected by ``wrt`` are ignored.
            **kwargs: extra arguments of ``tx.update``, such as ``value`` for a line search. With any of them the step
                is that of `nnx.Optimizer`, not fused.

        Returns:
            Always None. Newer versions of `nnx.Optimizer` return the updates, which a fused step never has in memory.

        Raises:
            ValueError, TypeError: the same as ``tx.update``.
            TypeError: ``model`` and ``grads`` are swapped.
        """
        if isinstance(grads, nnx.Module) and not isinstance(model, nnx.Module):
            raise TypeError(
                f"model must be an NNX module, got {type(model).__name__}. Argument order: "
                "optimizer.update(model, grads)."
            )
        if kwargs:
            super().update(model, grads, **kwargs)
            return
        state_of = functools.partial(nnx.state, **({"graph": self.graph} if hasattr(self, "graph") else {}))
        params, grads = (without_variables(state_of(x, self.wrt)) for x in (model, grads))
        params, opt_state = step(self.tx, grads, without_variables(self.opt_state), params)
        nnx.update(model, params)
        nnx.update(self.opt_state, state_of(opt_state))
        self.step[...] += 1


class TrainState(train_state.TrainState):
    """Flax's `TrainState` with `jadam.step` in `apply_gradients`, one pass over memory. The fields are the same.

    Create it with ``create(apply_fn=..., params=..., tx=...)``. It can be subclassed, as Flax's.

    Example:
        >>> import jax, jax.numpy as jnp, jadam, jadam.flax
        >>> state = jadam.flax.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=jadam.adam(0.1))
        >>> train_step = jax.jit(lambda state: state.apply_gradients(grads=state.params), donate_argnums=0)
        >>> state = train_step(state)
        >>> print(*(f"{x:.3f}" for x in state.params["w"]), state.step)
        0.900 0.900 1
    """

    @classmethod
    def create(cls, *, apply_fn, params, tx, **kwargs):
        """Create a state at step 0, as `train_state.TrainState.create`."""
        checks.check_transformation("TrainState needs", tx)
        checks.check_arrays(params, "params")
        return super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)

    def apply_gradients(self, *, grads, **kwargs):
        """Take one step and return the new state.

        Args:
            grads: gradients, a tree like ``params``.
            **kwargs: other fields to replace.

        Returns:
            The new state, with ``step`` incremented. Parameters in the collection ``_overwrite_with_gradient``, which
            Flax's fp8 layers have, are replaced by their gradients; ``tx`` does not get them.

        Raises:
            ValueError, TypeError: the same as ``tx.update``.
        """
        if isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads:
            params, opt_state = step(self.tx, grads["params"], self.opt_state, self.params["params"])
            params = {"params": params, OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
        else:
            params, opt_state = step(self.tx, grads, self.opt_state, self.params)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
