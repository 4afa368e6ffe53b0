"""How long a step of 1,000 leaves takes to trace, lower and compile for eight devices, beside Optax's.

Each program is compiled in processes of its own, which take turns; the median of the ratios to Optax's in the same
round is printed. A leaf has 64x128 elements. With "fsdp" parameters and state are sharded alike; with "zero1" the
parameters are replicated, and Optax's state is sharded by ``out_shardings``.
"""

import json
import os
import statistics
import subprocess
import sys
import time

from rich.progress import track

LEAVES, ROUNDS = 1000, 3
OPTAX = {"fsdp": "Optax", "zero1": "Optax, sharded state"}
SIDES = {
    "Optax": "fsdp",
    "float32": "fsdp",
    "bfloat16": "fsdp",
    "int8": "fsdp",
    "Optax, sharded state": "zero1",
    "zero1, float32": "zero1",
}


def run(options) -> dict:
    """Returns the seconds of every program, and the ratios to Optax's."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in track(range(ROUNDS), "mesh"):
        for side in SIDES:
            seconds[side].append(in_fresh_process(side))
    rows = {}
    for side, layout in SIDES.items():
        ratios = [x / y for x, y in zip(seconds[side], seconds[OPTAX[layout]], strict=True)]
        rows[side] = {"seconds": seconds[side], "over Optax": round(statistics.median(ratios), 3)}
        print(f"mesh: {side:22} {statistics.median(seconds[side]):6.2f} s, over Optax {rows[side]['over Optax']:.2f}")
    return {"leaves": LEAVES, "devices": 8, "trace, lower and compile": rows}


def in_fresh_process(side: str) -> float:
    """Seconds of one program, measured in a process with eight devices."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", "benchmarks.mesh", side], env=env, capture_output=True, check=True)
    return json.loads(done.stdout)


def measure(side: str) -> float:
    """Seconds to trace, lower and compile one program."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import jadam

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    of_params = sharded if SIDES[side] == "fsdp" else whole
    params = {f"w{i}": jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=of_params) for i in range(LEAVES)}
    on_mesh = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharded if x.ndim == 2 else whole)
    if side.startswith("Optax"):
        tx = optax.adamw(1e-3)
        state = jax.tree.map(on_mesh, jax.eval_shape(tx.init, params))
    elif SIDES[side] == "zero1":
        tx = jadam.sharding.zero1(jadam.adamw(1e-3), params, mesh, "data")
        state = tx.layout.state
    else:
        tx = jadam.adamw(1e-3, moments=side)
        state = jax.tree.map(on_mesh, jax.eval_shape(tx.init, params))

    def step(params, state, grads):
        if not side.startswith("Optax"):
            return jadam.step(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    out_shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)
    jax.jit(lambda x: x + 1)(jnp.zeros(8)).block_until_ready()  # what every process compiles first
    begin = time.perf_counter()
    jitted.lower(params, state, params).compile()
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
