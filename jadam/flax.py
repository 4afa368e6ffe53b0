"""Flax's own `Optimizer` (NNX) and `TrainState` (Linen), with `jadam.step` in place of the two calls.

jadam does not depend on Flax, so this is not imported with it: ``import jadam.flax``.
"""

import functools
from collections.abc import Mapping

from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from jadam._core import checks
from jadam._fused.step import step

pure = getattr(nnx, "as_pure", None) or nnx.pure  # the older name of the same function


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer` whose `update` is `jadam.step`, one pass over memory; the state is the same.

    Args:
        model: an NNX module.
        tx: any Optax transformation; one pass is taken for those for which `jadam.step` does it.
        wrt: filter of the variables to train, the same as for `nnx.grad`. Further arguments are Flax's.

    Raises:
        TypeError: no ``wrt``, or a variable to train that is not floating.

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
        """`nnx.Optimizer`'s."""
        checks.check_transformation("Optimizer needs", tx)
        super().__init__(model, tx, wrt=wrt, **kwargs)

    # Flax's returns None or updates, depending on its version.
    def update(self, model, grads, /, **kwargs) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Train ``model`` and the state in place by one step.

        Args:
            model: the module given at the start, or one like it.
            grads: gradients, as `nnx.grad` returns them; those that ``wrt`` leaves out are ignored.
            **kwargs: what ``tx`` takes beside gradients, state and parameters, as ``value`` for a line search. With
                any of these a step is the two calls, as in `nnx.Optimizer`.

        Returns:
            None, always. `nnx.Optimizer` returns the updates in newer versions; one pass never has them in memory.

        Raises:
            ValueError, TypeError: what ``tx.update`` raises.
        """
        if kwargs:
            super().update(model, grads, **kwargs)
            return
        state_of = functools.partial(nnx.state, **({"graph": self.graph} if hasattr(self, "graph") else {}))
        params, grads = pure(state_of(model, self.wrt)), pure(state_of(grads, self.wrt))
        params, opt_state = step(self.tx, grads, pure(self.opt_state), params)
        nnx.update(model, params)
        nnx.update(self.opt_state, state_of(opt_state))
        self.step[...] += 1


class TrainState(train_state.TrainState):
    """Flax's `TrainState` whose `apply_gradients` is `jadam.step`, one pass over memory; the fields are the same.

    It is made with ``create(apply_fn=..., params=..., tx=...)``, and may be extended by subclasses, as Flax's.

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
        """A new one, at step 0; `train_state.TrainState`'s."""
        checks.check_transformation("TrainState needs", tx)
        checks.check_arrays(params, "params")
        return super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)

    def apply_gradients(self, *, grads, **kwargs):
        """The state after one step.

        Args:
            grads: gradients, a tree like ``params``.
            **kwargs: fields to replace besides.

        Returns:
            A state like this, with ``step`` one more. Parameters under ``_overwrite_with_gradient``, as Flax's fp8
            layers have them, become their gradients; ``tx`` does not see them.

        Raises:
            ValueError, TypeError: what ``tx.update`` raises.
        """
        if isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads:
            params, opt_state = step(self.tx, grads["params"], self.opt_state, self.params["params"])
            params = {"params": params, OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
        else:
            params, opt_state = step(self.tx, grads, self.opt_state, self.params)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
