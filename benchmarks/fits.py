"""Largest model that each format can train in 16, 24, 40 and 80 GiB: ``python -m benchmarks fits``.

The models are GPT-2 with other widths and numbers of layers. The width is a multiple of 64, the size of GPT-2's heads,
and 64 to 128 times the number of layers: 64 times as in the smallest GPT-2 (Radford et al. 2019), 128 times as in the
largest GPT-3 (Brown et al. 2020). Weights, gradients and optimizer state are counted, activations are not.

`jadam.plan` computes the bytes. XLA compiles one step of every model for a CPU, in place and from shapes alone; the run
fails if the bytes of its arguments are not those of the plan. On a GPU, each format takes one step in a process of its
own, with the largest model that fits into 90 % of the card.
"""

import bisect
import functools
import json
import math
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jadam
from benchmarks.gpu import HERE, last_line
from benchmarks.gpu_sides import one_pass, update_and_apply
from benchmarks.running import first_line
from jadam._diagnostics.models import MODELS
from jadam._diagnostics.plan import CONFIGURATIONS, MemoryPlan

GIB = 2**30
MEMORY = (16, 24, 40, 80)  # GiB
FORMATS = {  # name: (dtype of the weights, transformation, how to make a step of it)
    **{name: (dtype, tx, one_pass) for name, (dtype, tx) in CONFIGURATIONS.items()},
    "Optax, float32 weights": (jnp.float32, optax.adamw(1e-3), update_and_apply),
    "Optax, bf16 weights": (jnp.bfloat16, optax.adamw(1e-3), update_and_apply),
}
SHARE = 0.9  # of a GPU's memory, for the model
RESERVED = 0.95  # of a GPU's memory, for JAX


class Model(NamedTuple):
    """GPT-2 with this width and number of layers."""

    width: int
    layers: int

    @property
    def parameters(self) -> int:
        """Number of parameters: embeddings of 50,257 tokens and 1,024 positions, layers, and the last norm."""
        return (50257 + 1024 + 2) * self.width + self.layers * (12 * self.width**2 + 13 * self.width)

    def shapes(self, dtype):
        """Tree of the parameters' shapes."""
        to_shape = lambda shape: jax.ShapeDtypeStruct(shape, dtype)
        return jax.tree.map(to_shape, MODELS["gpt2"](**self._asdict()), is_leaf=lambda x: type(x) is tuple)


FAMILY = sorted(
    (
        Model(width, layers)
        for width in range(512, 8192 + 1, 64)
        for layers in range(math.ceil(width / 128), width // 64 + 1)
    ),
    key=lambda model: model.parameters,
)


@functools.cache
def plan(name: str, model: Model) -> MemoryPlan:
    """The model's memory on one device, in this format."""
    dtype, tx, _ = FORMATS[name]
    return jadam.plan(tx, model.shapes(dtype), {"data": 1}, "data")


def largest(name: str, nbytes: float) -> Model:
    """Return the largest model of the family that fits into ``nbytes`` in this format."""
    fits = lambda model: plan(name, model).total <= nbytes
    bytes_per_parameter = plan(name, FAMILY[0]).total / FAMILY[0].parameters
    n = bisect.bisect_right(FAMILY, nbytes / bytes_per_parameter, key=lambda model: model.parameters)  # nearly
    while n < len(FAMILY) and fits(FAMILY[n]):
        n += 1
    while n > 0 and not fits(FAMILY[n - 1]):
        n -= 1
    if not 0 < n < len(FAMILY):
        least, most = (plan(name, model).total / GIB for model in (FAMILY[0], FAMILY[-1]))
        raise ValueError(
            f"nbytes must be from {least:.3g} to {most:.3g} GiB for {name}, got {nbytes / GIB:.3g} GiB; "
            "widen the range of widths of benchmarks.fits.FAMILY."
        )
    return FAMILY[n - 1]


def compile_step(name: str, model: Model):
    """The compiled step, which writes the new weights and state over the old ones."""
    dtype, tx, make_step = FORMATS[name]
    params = model.shapes(dtype)
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    return step.lower(params, jax.eval_shape(tx.init, params), params).compile()


def describe(name: str, model: Model, program) -> dict:
    """The model, and its bytes as planned and as compiled."""
    memory = program.memory_analysis()
    return {
        **model._asdict(),
        "parameters": model.parameters,
        "planned": plan(name, model).total,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


def take_step(name: str, nbytes: float) -> dict:
    """Allocate the largest model that fits into ``nbytes``, and take one step."""
    dtype, tx, _ = FORMATS[name]
    model = largest(name, nbytes)
    program = compile_step(name, model)
    fill = jax.jit(lambda: jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), model.shapes(dtype)))
    params, grads = fill(), fill()
    state = jax.jit(tx.init)(params)
    jax.block_until_ready(program(params, state, grads))
    return describe(name, model, program)


def take_step_on_gpu(name: str) -> dict:
    """Take one step with the largest model for this GPU; add its peak memory. Needs a process of its own."""
    device = jax.devices()[0]
    row = take_step(name, SHARE / RESERVED * device.memory_stats()["bytes_limit"])
    return {**row, "peak": device.memory_stats()["peak_bytes_in_use"]}


def in_fresh_process(name: str) -> dict:
    """Return the row of `take_step_on_gpu` for this format, or the error."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_CLIENT_MEM_FRACTION"}  # JAX refuses both names
    env |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(RESERVED), "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
    command = [sys.executable, "-m", "benchmarks.fits", name]
    done = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": last_line(done)}
    return json.loads(done.stdout.splitlines()[-1])


def main(name: str) -> None:
    """Print the row of `take_step_on_gpu`, or its error, as a line of JSON."""
    try:
        row = take_step_on_gpu(name)
    except Exception as error:
        row = {"error": first_line(error)}
    print(json.dumps(row))


def on_gpu() -> dict:
    """Rows of the steps on a GPU, or the reason why there are none."""
    device = jax.devices()[0]
    if device.platform != "gpu" or not device.memory_stats():
        reason = f"{device.device_kind} is no GPU that reports its peak memory"
        print(f"fits: no step taken: {reason}")
        return {"skipped": reason}
    steps = {name: in_fresh_process(name) for name in track(FORMATS, description="fits: steps on the GPU")}
    table = Table("", "billions", "plan, bytes", "peak, bytes", "peak / plan", title=device.device_kind)
    for name, row in steps.items():
        if "error" in row:
            print(f"fits: {name} failed: {row['error']}. If memory is short, run `python -m benchmarks fits` alone.")
            continue
        ratio = f"{row['peak'] / row['planned']:.4f}"
        table.add_row(name, billions(row), f"{row['planned']:,}", f"{row['peak']:,}", ratio)
    Console().print(table)
    return {"card": device.device_kind, "steps": steps}


def billions(row) -> str:
    """Billions of parameters."""
    return f"{row['parameters'] / 1e9:.2f}"


def run(options) -> dict:
    """Find the largest models, compile a step of each, and take steps on a GPU."""
    memory = MEMORY[:1] if options.quick else MEMORY
    cells = [(name, gib) for name in FORMATS for gib in memory]
    rows: dict[str, dict[str, dict]] = {name: {} for name in FORMATS}
    with jax.default_device(jax.devices("cpu")[0]):
        for name, gib in track(cells, description="fits"):
            model = largest(name, gib * GIB)
            rows[name][f"{gib} GiB"] = describe(name, model, compile_step(name, model))
    show(rows)
    every = [row for columns in rows.values() for row in columns.values()]
    different = [row for row in every if row["arguments"] != row["planned"]]
    if different:
        raise SystemExit(f"fits: the compiled step takes other bytes than planned: {different}")
    most = max(row["temporaries"] for row in every)
    print(f"fits: the arguments of all {len(every)} steps are as planned; temporaries at most {most:,} bytes")
    steps = on_gpu()
    return {} if options.quick else {"largest models": rows, "GPU": steps}


def show(rows) -> None:
    """Print the sizes for every format and memory, and the bytes for the largest memory."""
    memory = list(next(iter(rows.values())))
    sizes = Table("billions of parameters", *memory, title="Largest GPT-2, without activations")
    exact = Table("", "shape", "GiB", "compiled - plan", "temporaries")
    exact.title = f"Width x layers of the models for {memory[-1]}; bytes as compiled for a CPU"
    for name, row in rows.items():
        sizes.add_row(name, *map(billions, row.values()))
        last = row[memory[-1]]
        shape, gib = f"{last['width']} x {last['layers']}", f"{last['planned'] / GIB:.2f}"
        exact.add_row(name, shape, gib, str(last["arguments"] - last["planned"]), f"{last['temporaries']:,}")
    console = Console()
    console.print(sizes)
    console.print(exact)


if __name__ == "__main__":
    main(sys.argv[1])
