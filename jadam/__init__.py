"""Adam and its relatives for JAX: drop-in replacements for Optax's, with lean states and a fused step.

Change one import, the rest of the training loop stays as it is::

    tx = jadam.adamw(1e-3)  # was: optax.adamw(1e-3)

Optimizers: `adam`, `adamw`, `nadam`, `nadamw`, `adamax`, `adamaxw`, `amsgrad`, `radam`. Their ``scale_by_*`` forms have
no learning rate. `by_path` sets options by the names of parameters. `chain`, `clip` and `clip_by_global_norm` are
Optax's, in a form that `step` can fuse; `average_params` keeps an average of the parameters.

Memory: ``moments="bfloat16"`` or ``"int8"`` stores the state in 4 or 2 bytes per parameter. `exact_bf16` trains
bfloat16 weights as if they were float32. `sharding.zero1` shards the state over devices; `plan` computes the memory
needed.

Speed: `step` does ``tx.update`` and ``optax.apply_updates`` in one pass over memory; `backends` shows the kernel of
each platform. For Flax there are `jadam.flax.Optimizer` and `jadam.flax.TrainState`.

Diagnostics: `describe` shows the format and size of each parameter's state, `statistics` the sizes of updates and the
signal-to-noise ratio. `record`, `history` and `plot` follow these over training.

Checkpoints: `convert_moments`, `checksum`, `torch_state`.
"""

from importlib.util import find_spec as _find_spec

import lazy_loader

__version__ = "0.1.0"
__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__.remove("flax")  # which need not be installed


def __dir__():
    return __all__ + ["flax"] * (_find_spec("flax") is not None)
