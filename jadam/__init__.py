"""Adam (Kingma & Ba 2015) and its relatives for JAX, as pure ``init``/``update`` pairs that chain with Optax.

The code lies in layers, each of which uses only those before it: `jadam._core`, checks and exact formulas;
`jadam._moments`, how moments are stored; `jadam._transformation`, from a rule for one array to an Optax
transformation; `jadam._optimizers`, Adam and its relatives (read `jadam._optimizers.adam` first); `jadam._wrappers`,
what goes around them; `jadam._fused`, the step in one pass and its kernels; `jadam.sharding`, `jadam.flax`;
`jadam._checkpoints`, `jadam.torch_state`; `jadam._diagnostics`; `jadam._cli`.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__.remove("flax")  # which need not be installed
