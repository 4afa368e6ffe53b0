"""What XLA makes of a step on hardware that is not here: kernels, temporaries and bytes, compiled ahead of time.

For a TPU v5e and an H100, each in an environment of its own with that platform's compiler, made on the first run and
kept in ``$XDG_CACHE_HOME/jadam`` (``~/.cache/jadam``). Counted are the operations of the compiled program that write
more bytes than a fiftieth of the number of parameters; their bytes are those of what they read and write. The run fails
where a bar is missed.
"""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import jax

HERE = Path(__file__).resolve().parent
PACKAGES = {
    "tpu": ["jax==0.10.2", "optax==0.2.8", "libtpu==0.0.42.*"],
    "cuda": [
        *("jax==0.10.2", "optax==0.2.8", "jax-cuda12-plugin==0.10.2", "jax-cuda12-pjrt==0.10.2"),
        "nvidia-cuda-nvcc-cu12",  # for ptxas
    ],
}
TARGETS = {"tpu": "TPU v5e", "cuda": "H100"}
SHAPES = [(4096, 4096), (131072, 4096), (262144, 512), (768, 50257), (300, 1000), (1000000, 16)]
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")


def cases():
    """Name, shape, and what must hold: how many large kernels, bytes and bytes of temporaries per parameter."""
    whole = SHAPES[0]
    for how in ("step", "stock"):
        yield f"{how} float32", whole, {"kernels": 1, "bytes": 28.01, "temporaries": 0.001}
    yield "step bfloat16", whole, {"kernels": 1, "bytes": 20.01, "temporaries": 0.001}
    yield "step bfloat16, bf16 weights", whole, {"kernels": 1, "bytes": 18.01, "temporaries": 0.001}
    for shape in SHAPES:  # 12 for p and g, 4 for codes, and two scales a block read and written
        scales = 16 / min(128, shape[-1]) * 1.3  # the last block of a row is shorter
        yield "step int8", shape, {"kernels": 1, "bytes": 16.01 + scales, "temporaries": 0.05}
    yield "step int8, bf16 weights", whole, {"kernels": 1, "bytes": 14.2, "temporaries": 0.05}
    for name in ("stock bfloat16", "stock int8"):  # no bar: what the update alone costs
        yield name, whole, {}


def run(options) -> dict:
    """Every case on both platforms, each in its environment."""
    del options
    rows, missed = [], []
    for platform in PACKAGES:
        python = environment(platform)
        search = os.pathsep.join([os.environ.get("PATH", ""), *map(str, python.parent.parent.rglob("cuda_nvcc/bin"))])
        quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
        env = {**os.environ, **quiet, "JAX_PLATFORMS": "cpu", "PATH": search, "PYTHONPATH": str(HERE.parent)}
        child = subprocess.run(
            [python, "-m", "benchmarks.aot", platform], cwd=HERE.parent, env=env, capture_output=True, text=True
        )
        lines = [line for line in child.stdout.splitlines() if line.startswith("{")]
        if child.returncode or not lines:
            raise SystemExit(f"aot: {platform} failed:\n{child.stderr[-4000:]}")
        for row in map(json.loads, lines):
            rows.append(row)
            over = [k for k, bar in row["bars"].items() if row[k] > bar]
            missed += [f"{row['target']}, {row['case']}, {row['shape']}: {k} {row[k]}" for k in over]
            values = (f"{row['kernels']} large kernels", f"{row['bytes']:6.2f} bytes", f"{row['temporaries']:.4f} temp")
            shape = "x".join(map(str, row["shape"]))
            print(f"aot: {row['target']:8}{row['case']:28}{shape:12}", *values, *over, sep="  ")
    if missed:
        raise SystemExit("aot: bars missed: " + "; ".join(missed))
    return {"per parameter": rows}


def environment(platform) -> Path:
    """The Python of the environment with a platform's compiler, made if it is not there."""
    wanted = hashlib.sha1(repr((sys.version_info[:2], PACKAGES[platform])).encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jadam" / f"aot-{platform}-{wanted}"
    python = cache / "bin" / "python"
    if not (cache / "complete").exists():
        print(f"aot: making {cache}", file=sys.stderr)
        venv.create(cache, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[platform]], check=True)
        (cache / "complete").touch()
    return python


def device(platform):
    """A device of the platform, to compile for."""
    from jax.experimental import topologies

    if platform == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    else:
        config = (HERE / "h100.txtpb").read_text()
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)
    return topology.devices[0]


def compiled(name, shape, to):
    """The program of a case."""
    import jax.numpy as jnp
    import optax

    import jadam

    narrow = name.endswith("bf16 weights")
    tx = jadam.adam(1e-3, moments=re.split("[ ,]", name)[1])
    tx = jadam.exact_bf16(tx) if narrow else tx
    params = jax.ShapeDtypeStruct(shape, jnp.bfloat16 if narrow else jnp.float32)

    def step(params, state, grads):
        if name.startswith("step"):
            return jadam.step(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    there = jax.sharding.SingleDeviceSharding(to)
    args = params, jax.eval_shape(tx.init, params), params
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), args)
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


def count(text, parameters) -> tuple[int, int]:
    """Of a program's text, operations that write as much as a fiftieth of its parameters, and the bytes they touch."""
    entry = text[text.index("\nENTRY") :].split("\n}")[0]
    size, large, touched = {}, 0, 0
    for line in entry.splitlines():
        found = re.match(r"\s*(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)", line)
        if found is None:
            continue
        name, result, operation, rest = found.groups()
        size[name] = sum(map(array_bytes, re.findall(r"([a-z]+\d+|pred)\[([\d,]*)\]", result)))
        if operation not in FREE and size[name] > parameters / 50:
            large += 1
            touched += size[name] + sum(size[x] for x in re.findall(r"%([\w.-]+)", rest.split("), ")[0]) if x in size)
    return large, touched


def array_bytes(found):
    """Bytes of ``(dtype, dimensions)`` in HLO's notation."""
    dtype, dimensions = found
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return bits // 8 * math.prod(int(x) for x in dimensions.split(",") if x)


def main(platform):
    """In the platform's environment: a line of JSON for every case."""
    to = device(platform)
    for name, shape, bars in cases():
        program = compiled(name, shape, to)
        parameters = math.prod(shape)
        large, touched = count(program.as_text(), parameters)
        row = {
            "target": TARGETS[platform],
            "case": name,
            "shape": shape,
            "kernels": large,
            "bytes": round(touched / parameters, 3),
            "temporaries": round(program.memory_analysis().temp_size_in_bytes / parameters, 4),
            "bars": bars,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
