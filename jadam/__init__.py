"""Adam (Kingma & Ba 2015) and its relatives for JAX, as pure ``init``/``update`` pairs that chain with Optax.

Reading order: `jadam._adam` is Algorithm 1 on one screen; `jadam._numerics` has the formulas it is written
in; `jadam._adamax`, `_nadam`, `_amsgrad` and `_radam` say what differs; `jadam._formats` and `_int8` store moments in
4 and 2 bytes; `jadam._exact_bf16` makes bf16 weights train as float32; `jadam._describe` tells what is stored how;
`jadam._transformation` maps a rule over a tree of parameters; `jadam._step` does a step in one pass, `_chain` makes
clipping visible to it and `_kernels` holds what is compiled; `jadam._checks` stops bad input. One capability each:
`jadam.averaging` keeps averages of the parameters, `groups` makes exceptions by name, `convert` changes the format of a
state, `_checksum` tells whether a restored one is the one saved, `torch_state` takes PyTorch's in and out, `sharding`
divides it over devices, `planning` counts its bytes there, `statistics` tells what Adam is doing, `recording` keeps
that over time, and `flax`, which is imported by itself, has Flax's `Optimizer` and `TrainState` with that step.
"""

from jadam import sharding as sharding
from jadam._adam import adam as adam
from jadam._adam import adamw as adamw
from jadam._adam import scale_by_adam as scale_by_adam
from jadam._adamax import adamax as adamax
from jadam._adamax import adamaxw as adamaxw
from jadam._adamax import scale_by_adamax as scale_by_adamax
from jadam._amsgrad import amsgrad as amsgrad
from jadam._amsgrad import scale_by_amsgrad as scale_by_amsgrad
from jadam._chain import chain as chain
from jadam._chain import clip as clip
from jadam._chain import clip_by_global_norm as clip_by_global_norm
from jadam._checksum import checksum as checksum
from jadam._describe import describe as describe
from jadam._exact_bf16 import exact_bf16 as exact_bf16
from jadam._exact_bf16 import float32_params as float32_params
from jadam._exact_bf16 import from_float32 as from_float32
from jadam._kernels import backends as backends
from jadam._nadam import nadam as nadam
from jadam._nadam import nadamw as nadamw
from jadam._radam import radam as radam
from jadam._radam import scale_by_radam as scale_by_radam
from jadam._step import step as step
from jadam._transformation import QuantizedAdamState as QuantizedAdamState
from jadam.averaging import average_params as average_params
from jadam.averaging import averaged_params as averaged_params
from jadam.convert import convert_moments as convert_moments
from jadam.groups import FROZEN as FROZEN
from jadam.groups import by_path as by_path
from jadam.measuring import Statistics as Statistics
from jadam.measuring import statistics as statistics
from jadam.planning import plan as plan
from jadam.recording import history as history
from jadam.recording import plot as plot
from jadam.recording import record as record

__version__ = "0.1.0"
