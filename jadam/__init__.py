"""Adam (Kingma & Ba 2015) for JAX, as pure ``init``/``update`` pairs that chain with Optax.

Reading order: `jadam._adam` is Algorithm 1 on one screen; `jadam._numerics` has the formulas it is written
in; `jadam._transformation` maps it over a tree of parameters; `jadam._checks` stops bad input.
"""

from jadam._adam import adam as adam
from jadam._adam import adamw as adamw
from jadam._adam import scale_by_adam as scale_by_adam

__version__ = "0.1.0"
