"""Every side's programs, compiled for an H100 on a machine without: ``python -m benchmarks train --aot``."""

import json
import os

from benchmarks.aot import TARGETS, device, run_in_environment
from benchmarks.running import first_line, print_table
from benchmarks.train import model
from benchmarks.train.programs import Programs
from benchmarks.train.sides import sides

BAR = 0.02  # between the compiled step's arguments and `jadam.plan`
MOST_TEMPORARIES = 2**16  # bytes: scalars and the norm's partial sums


def run(options) -> dict:
    """Compile all sides; fail if the arguments or temporaries of a step are not those of the plan."""
    rows, missed = [], []
    for row in run_in_environment("train", options.size, module="benchmarks.train.aot"):
        if "error" in row:
            print(f"train: {row['side']} left out: {row['error']}", flush=True)
            continue
        print(f"train: {row['side']}: compiled for {TARGETS['cuda']}", flush=True)
        rows.append(row)
        if not row["side"].startswith("jadam"):
            continue
        if abs(row["step, arguments"] / row["plan"] - 1) > BAR:
            missed.append(f"{row['side']}: arguments {row['step, arguments']:,}, plan {row['plan']:,}")
        if row["step, temporaries"] > MOST_TEMPORARIES:
            missed.append(f"{row['side']}: {row['step, temporaries']:,} bytes of temporaries")
    columns = ["step, arguments", "plan", "step, temporaries", "training, bytes by the compiler"]
    table = [[row["side"], *("-" if row[x] is None else f"{row[x]:,}" for x in columns)] for row in rows]
    print_table(f"{options.size}, compiled for {TARGETS['cuda']}, bytes", ["", *columns], table)
    if missed:
        raise SystemExit("train: bars missed: " + "; ".join(missed))
    return {"target": TARGETS["cuda"], "rows": rows}


def main(name: str) -> None:
    """Print a line of JSON for every side; runs in the compiler's environment."""
    import jax
    import jax.numpy as jnp

    import jadam

    if jadam.backends()["cuda"].kernel is None:
        raise SystemExit(f"no CUDA kernel: {jadam.backends()['cuda'].reason}. Install by pip install -e '.[bench]'")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"  # it needs the GPU
    size = model.SIZES[name]
    there = jax.sharding.SingleDeviceSharding(device("cuda"))
    tokens, dtype = (10**6, jnp.uint8) if name == "tiny" else (15 * 10**6, jnp.uint16)
    for side, make in sides(size, "gpu").items():
        try:
            facts = Programs(make(), size, tokens, dtype, there).facts
        except ImportError as error:
            facts = {"error": first_line(error)}
        print(json.dumps({"side": side, **facts}), flush=True)


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
