"""Adam (Kingma & Ba 2015) and its relatives for JAX, as pure ``init``/``update`` pairs that chain with Optax.

The code lies in layers, each of which uses only those before it: `jadam._core`, checks and exact formulas;
`jadam._moments`, how moments are stored; `jadam._transformation`, from a rule for one array to an Optax
transformation; `jadam._optimizers`, Adam and its relatives (read `jadam._optimizers.adam` first); `jadam._wrappers`,
what goes around them; `jadam._fused`, the step in one pass and its kernels; `jadam.sharding`, `jadam.flax`;
`jadam._checkpoints`, `jadam.torch_state`; `jadam._diagnostics`; `jadam._cli`.
"""

from jadam import sharding as sharding
from jadam._checkpoints.checksum import checksum as checksum
from jadam._checkpoints.convert import convert_moments as convert_moments
from jadam._diagnostics.describe import describe as describe
from jadam._diagnostics.plan import plan as plan
from jadam._diagnostics.record import history as history
from jadam._diagnostics.record import plot as plot
from jadam._diagnostics.record import record as record
from jadam._diagnostics.statistics import Statistics as Statistics
from jadam._diagnostics.statistics import statistics as statistics
from jadam._fused.backends import backends as backends
from jadam._fused.step import step as step
from jadam._optimizers.adam import adam as adam
from jadam._optimizers.adam import adamw as adamw
from jadam._optimizers.adam import scale_by_adam as scale_by_adam
from jadam._optimizers.adamax import adamax as adamax
from jadam._optimizers.adamax import adamaxw as adamaxw
from jadam._optimizers.adamax import scale_by_adamax as scale_by_adamax
from jadam._optimizers.amsgrad import amsgrad as amsgrad
from jadam._optimizers.amsgrad import scale_by_amsgrad as scale_by_amsgrad
from jadam._optimizers.nadam import nadam as nadam
from jadam._optimizers.nadam import nadamw as nadamw
from jadam._optimizers.radam import radam as radam
from jadam._optimizers.radam import scale_by_radam as scale_by_radam
from jadam._transformation.transformation import QuantizedAdamState as QuantizedAdamState
from jadam._wrappers.average_params import average_params as average_params
from jadam._wrappers.average_params import averaged_params as averaged_params
from jadam._wrappers.by_path import FROZEN as FROZEN
from jadam._wrappers.by_path import by_path as by_path
from jadam._wrappers.chain import chain as chain
from jadam._wrappers.chain import clip as clip
from jadam._wrappers.chain import clip_by_global_norm as clip_by_global_norm
from jadam._wrappers.exact_bf16 import exact_bf16 as exact_bf16
from jadam._wrappers.exact_bf16 import float32_params as float32_params
from jadam._wrappers.exact_bf16 import from_float32 as from_float32

__version__ = "0.1.0"
