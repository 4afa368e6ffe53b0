"""Kernels, temporaries and memory traffic of a step compiled ahead of time for a TPU v5e and an H100.

Each platform's compiler is in a virtual environment, created by the first run in ``$XDG_CACHE_HOME/jadam``
(``~/.cache/jadam``). A large kernel is an operation of the compiled program that writes more bytes than a fiftieth of
the number of parameters; its traffic is the bytes it reads and writes. The run fails if a bar is exceeded, if a step's
arguments on one or eight chips are more than 1 % from `jadam.plan`, or if a state in host memory is not counted there.
"""

import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import jax

HERE = Path(__file__).resolve().parent
CUDA = [
    *("jax==0.10.2", "optax==0.2.8", "lazy-loader==0.6", "jax-cuda12-plugin==0.10.2", "jax-cuda12-pjrt==0.10.2"),
    "nvidia-cuda-nvcc-cu12",  # for ptxas
]
PACKAGES = {
    "tpu": ["jax==0.10.2", "optax==0.2.8", "lazy-loader==0.6", "libtpu==0.0.42.*"],
    "cuda": CUDA,
    "train": [*CUDA, "flax==0.12.8"],  # for `benchmarks.train.aot`
    "nvrtc": [
        "lazy-loader==0.6",
        "nvidia-cuda-nvrtc-cu12==12.9.*",
        "nvidia-cuda-nvrtc==13.*",
        "nvidia-cuda-nvdisasm==13.*",
    ],
}
TARGETS = {"tpu": "TPU v5e", "cuda": "H100"}
SHAPES = [(4096, 4096), (131072, 4096), (262144, 512), (768, 50257), (300, 1000), (1000000, 16)]
STACKED = [(8, 1024, 4096), (6, 1000, 500), (3, 3, 512, 512), (12, 768, 12, 64)]  # layers of a scan, and convolutions
LAYERS = 1  # of Llama 2's 7B, to compare the compiler's bytes with `jadam.plan`
PLACEMENTS = {  # format, mesh, axis of the state, axes of the parameters
    "one device": ("int8", {"data": 1}, "data", None),
    "FSDP, exact_bf16": ("bfloat16 + exact_bf16", {"fsdp": 8}, "fsdp", "fsdp"),
    "FSDP x TP, int8": ("int8", {"fsdp": 4, "tensor": 2}, "fsdp", ("fsdp", "tensor")),
    "zero1": ("float32", {"data": 8}, "data", None),
    "zero1 x TP, int8": ("int8", {"data": 4, "model": 2}, "data", "model"),
    "zero1, int8, exact_bf16": ("int8 + exact_bf16", {"data": 8}, "data", None),
}
SHARDED = {  # on a mesh of 4 x 2 chips
    "matrix": ((8192, 8192), ("fsdp", "tensor")),
    "columns": ((8192, 8192), (None, "fsdp")),
    "stacked": ((8, 4096, 8192), (None, "fsdp", "tensor")),
}
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")


def cases():
    """Yields name, shape and bars: number of large kernels, bytes and bytes of temporaries per parameter."""
    whole = SHAPES[0]
    for how in ("step", "stock"):
        yield f"{how} float32", whole, {"kernels": 1, "bytes": 28.01, "temporaries": 0.001}
    yield "step bfloat16", whole, {"kernels": 1, "bytes": 20.01, "temporaries": 0.001}
    yield "step bfloat16, bf16 weights", whole, {"kernels": 1, "bytes": 18.01, "temporaries": 0.001}
    for shape in [*SHAPES, *STACKED]:  # 12 bytes for p and g, 4 for codes, and two scales a block, read and written
        scales = 16 / min(128, shape[-1]) * 1.3  # 1.3: the last block of a row may be shorter
        yield "step int8", shape, {"kernels": 1, "bytes": 16.01 + scales, "temporaries": 0.05}
    yield "step int8, bf16 weights", whole, {"kernels": 1, "bytes": 14.2, "temporaries": 0.05}
    for shape in [*STACKED, (2**22,)]:
        yield "step bfloat16", shape, {"kernels": 1, "bytes": 20.01, "temporaries": 0.001}
        yield "step bfloat16, bf16 weights", shape, {"kernels": 1, "bytes": 18.01, "temporaries": 0.001}
    for shape in STACKED:
        scales = 16 / min(128, shape[-1]) * 1.3
        yield "step int8, bf16 weights", shape, {"kernels": 1, "bytes": 14.01 + scales, "temporaries": 0.05}
    for name in ("stock bfloat16", "stock int8"):  # without a bar: `update` + `apply_updates`, for comparison
        yield name, whole, {}


def run(options) -> dict:
    """Compiles every case for both platforms, or with ``--mesh`` a model's step for many chips."""
    if options.mesh:
        return on_mesh(options.mesh, options.model)
    if options.quick:
        return check_quickly()
    rows, planned, offloaded, missed = [], [], [], []
    for row in run_in_environment("tpu", "plan"):
        planned.append(row)
        error = row["arguments"] / row["planned"] - 1
        missed += [f"{row['case']}: arguments {error:+.2%} from the plan's"] * (abs(error) > 0.01)
        missed += [f"{row['case']}: {row['temporaries']} temporaries"] * (
            not row["gathered"] and row["temporaries"] > 0
        )
        print(f"aot: TPU v5e, plan: {row['case']:24} {error:+.2%}, temporaries {row['temporaries']:,}", flush=True)
    for row in run_in_environment("tpu", "offload"):
        offloaded.append(row)
        missed += [f"offload {row['format']}: {row}"] * (abs(row["on host"] / row["state"] - 1) > 0.01)
        print(f"aot: TPU v5e, state in host memory, bytes per parameter: {row}", flush=True)
    for platform in TARGETS:
        for row in run_in_environment(platform, platform):
            rows.append(row)
            missed += print_row(row)
    for row in run_in_environment("tpu", "sharded"):
        rows.append(row)
        missed += print_row(row)
    if missed:
        raise SystemExit("aot: bars missed: " + "; ".join(missed))
    return {"per parameter": rows, "plan, bytes on a device": planned, "offload, bytes per parameter": offloaded}


def check_quickly() -> dict:
    """Compiles the matrices only, and compares with the committed results. Writes nothing."""
    known = json.loads((HERE / "results" / "aot.json").read_text())["per parameter"]
    missed = []
    for platform in TARGETS:
        for row in run_in_environment(platform, f"{platform} quick"):
            missed += print_row(row)
            if row not in known:
                print("aot: benchmarks/results/aot.json has another row")
    if missed:
        raise SystemExit("aot: bars missed: " + "; ".join(missed))
    return {}


def print_row(row) -> list[str]:
    """Prints a row with bars; returns the bars it exceeds."""
    over = [k for k, bar in row["bars"].items() if row[k] > bar]
    values = (f"{row['kernels']} large kernels", f"{row['bytes']:6.2f} bytes", f"{row['temporaries']:.4f} temp")
    shape = "x".join(map(str, row["shape"]))
    print(f"aot: {row['target']:8}{row['case']:48}{shape:14}", *values, *over, sep="  ", flush=True)
    return [f"{row['target']}, {row['case']}, {row['shape']}: {k} {row[k]}" for k in over]


def run_in_environment(platform, *arguments, module="benchmarks.aot"):
    """Runs a module in a platform's environment; yields the JSON lines it prints."""
    python = environment(platform)
    search = os.pathsep.join([os.environ.get("PATH", ""), *map(str, python.parent.parent.rglob("cuda_nvcc/bin"))])
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
    env = {**os.environ, **quiet, "JAX_PLATFORMS": "cpu", "PATH": search, "PYTHONPATH": str(HERE.parent)}
    command = [python, "-m", module, *arguments]
    found = False
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, cwd=HERE.parent, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
        for line in child.stdout or ():
            if line.startswith("{"):
                found = True
                yield json.loads(line)
        if child.wait() or not found:
            errors.seek(0)
            raise SystemExit(f"{module} {' '.join(arguments)} failed:\n{errors.read()[-4000:]}")


def on_mesh(topology, model) -> dict:
    """Compiles a model's step in every format, with `jadam.sharding.zero1`, for a TPU topology.

    Parameters are sharded over the larger mesh axis, the state over both. Each replica has its own gradients, which the
    program has to reduce. The compiler's memory must agree with `jadam.plan`.
    """
    rows = []
    for row in run_in_environment("tpu", topology, model):
        rows.append(row)
        gib = {
            name: f"{row[name] / 2**30:.3f}" for name in ("parameters", "gradients", "state", "arguments", "planned")
        }
        print(f"aot: {topology}, {model}, {row['format']}: GiB on a chip", gib, "collectives", row["collectives"])
        if abs(row["arguments"] / row["planned"] - 1) > 0.02:
            raise SystemExit("aot: the compiler's arguments are not within 2 % of jadam.plan's")
    return {"GiB are 2**30, bytes on a chip": rows}


def environment(platform) -> Path:
    """Python of the environment with a platform's compiler, created if it does not exist."""
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
    """An abstract device of the platform, to compile for."""
    from jax.experimental import topologies

    if platform == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    else:
        config = (HERE / "h100.txtpb").read_text()
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)
    return topology.devices[0]


def compile_case(name, shape, to):
    """Compiled program of a case."""
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


def count_large_kernels(text, parameters) -> tuple[int, int]:
    """Number of large kernels in an HLO text, and the bytes they read and write."""
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
    """Bytes of an array, from ``(dtype, dimensions)`` in HLO's notation."""
    dtype, dimensions = found
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return bits // 8 * math.prod(int(x) for x in dimensions.split(",") if x)


def main(platform, quick=""):
    """Prints a line of JSON for every case, or ``quick`` for the matrices; runs in the platform's environment."""
    to = device(platform)
    for name, shape, bars in cases():
        if quick and shape not in SHAPES:
            continue
        program = compile_case(name, shape, to)
        parameters = math.prod(shape)
        large, touched = count_large_kernels(program.as_text(), parameters)
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


def compile_on_mesh(topology, model):
    """Prints a line of JSON for every format; runs in the TPU's environment."""
    import numpy as np
    from jax.experimental import topologies

    from jadam._diagnostics import plan as planning

    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    shape = {"data": 4, "model": devices.size // 4}
    mesh = jax.sharding.Mesh(devices.reshape(tuple(shape.values())), tuple(shape))
    for name, (dtype, tx) in planning.CONFIGURATIONS.items():
        shapes = planning.shapes_of(model, dtype)
        program, arguments = step_on_mesh(tx, shapes, mesh)
        parameters, state, gradients = (entry_bytes(program.as_text(), part) for part in arguments)
        row = {
            "format": name,
            "mesh": shape,
            "parameters": parameters,
            "gradients": gradients,
            "state": state,
            "arguments": program.memory_analysis().argument_size_in_bytes,
            "temporaries": program.memory_analysis().temp_size_in_bytes,
            "planned": planning.plan(tx, shapes, shape, "data", "model").total,
            "collectives": collectives(program.as_text()),
        }
        print(json.dumps(row), flush=True)


def compare_with_plan():
    """Prints a line of JSON for each of `PLACEMENTS`: a donated step's bytes on a TPU v5e, and `jadam.plan`'s."""
    import numpy as np
    from jax.experimental import topologies

    import jadam
    from jadam._diagnostics import plan as planning
    from jadam.sharding import shard_largest_dim, zero1

    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
    for name, (how, shape, axis, params_axis) in PLACEMENTS.items():
        dtype, tx = planning.CONFIGURATIONS[how]
        shapes = planning.shapes_of("llama-7b", dtype)
        shapes["layers"] = shapes["layers"][:LAYERS]
        n = math.prod(shape.values())
        mesh = jax.sharding.Mesh(devices[:n].reshape(tuple(shape.values())), tuple(shape))
        params = shard_largest_dim(shapes, mesh, params_axis)
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        if n == 1:
            state = jax.eval_shape(tx.init, params)
            state = jax.tree.map(lambda x, s=whole: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state)
        else:
            tx = zero1(tx, params, mesh, axis)
            state = tx.layout.state
        step = jax.jit(lambda params, state, grads, tx=tx: jadam.step(tx, grads, state, params), donate_argnums=(0, 1))
        memory = step.lower(params, state, params).compile().memory_analysis()
        planned = planning.plan(planning.CONFIGURATIONS[how][1], shapes, shape, axis, params_axis)
        row = {
            "case": name,
            "format": how,
            "mesh": shape,
            "arguments": memory.argument_size_in_bytes,
            "planned": planned.total,
            "parameters": planned.parameters,
            "gathered": planned.gathered,
            "temporaries": memory.temp_size_in_bytes,
        }
        print(json.dumps(row), flush=True)


def sharded_steps():
    """Prints a line of JSON for steps on eight chips: axes that are explicit, or auto with `jadam.sharding.sharded`."""
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import jadam

    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices).reshape(4, 2)
    bars = {"bfloat16": 20.01, "int8": 16.5, "bfloat16, bf16 weights": 18.01, "int8, bf16 weights": 14.5}
    kinds = {"explicit axes": AxisType.Explicit, "sharded": AxisType.Auto}
    for (how, kind), (name, bar), layout in itertools.product(kinds.items(), bars.items(), SHARDED):
        mesh = jax.sharding.Mesh(devices, ("fsdp", "tensor"), axis_types=(kind, kind))
        shape, spec = SHARDED[layout]
        inner, dtype = jadam.adamw(1e-3, moments=name.split(",")[0]), jnp.float32
        if name.endswith("bf16 weights"):
            inner, dtype = jadam.exact_bf16(inner), jnp.bfloat16
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        params = {"w": jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)}
        sharded = jadam.sharding.sharded(inner, params, mesh)
        tx = inner if kind is AxisType.Explicit else sharded
        step = jax.jit(lambda params, state, grads, tx=tx: jadam.step(tx, grads, state, params), donate_argnums=(0, 1))
        program = step.lower(params, sharded.layout.state, params).compile()
        parameters = math.prod(sharding.shard_shape(shape))
        large, touched = count_large_kernels(program.as_text(), parameters)
        row = {
            "target": TARGETS["tpu"],
            "case": f"{how}, {layout}, {name}",
            "shape": shape,
            "kernels": large,
            "bytes": round(touched / parameters, 3),
            "temporaries": round(program.memory_analysis().temp_size_in_bytes / parameters, 4),
            "collectives": collectives(program.as_text()),
            "bars": {"kernels": 1, "bytes": bar, "temporaries": 0.001},
        }
        print(json.dumps(row), flush=True)


def offload():
    """Prints a line of JSON for every format: a step whose state is in host memory before and after it."""
    from jax.experimental.layout import Format, Layout

    import jadam
    from jadam._diagnostics import plan as planning

    here = jax.sharding.SingleDeviceSharding(device("tpu"))
    host = here.with_memory_kind("pinned_host")
    # libtpu 0.0.42 copies no 8-bit matrix from host memory in its own layout; 0.0.50 does.
    narrow = Format(Layout((0, 1), ((8, 128), (4, 1))), host)
    for name, (dtype, tx) in planning.CONFIGURATIONS.items():
        params = {"w": jax.ShapeDtypeStruct(SHAPES[0], dtype), "b": jax.ShapeDtypeStruct(SHAPES[0][1:], dtype)}
        state = jax.eval_shape(tx.init, params)

        def step(params, state, grads, tx=tx):
            state = jax.device_put(state, jax.memory.Space.Device)
            params, state = jadam.step(tx, grads, state, params)
            return params, jax.device_put(state, jax.memory.Space.Host)

        on_host = jax.tree.map(lambda x: narrow if x.ndim == 2 and x.dtype.itemsize == 1 else host, state)
        shardings = {"in_shardings": (here, on_host, here), "out_shardings": (here, on_host)}
        memory = jax.jit(step, donate_argnums=(0, 1), **shardings).lower(params, state, params).compile()
        memory = memory.memory_analysis()
        parameters = sum(x.size for x in jax.tree.leaves(params))
        row = {
            "format": name,
            "state": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
            "on host": memory.host_argument_size_in_bytes,
            "arguments on device": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        }
        print(json.dumps({k: round(x / parameters, 3) if k != "format" else x for k, x in row.items()}), flush=True)


def step_on_mesh(tx, shapes, mesh):
    """Compiled step, and the ranges of its arguments that are parameters, state and gradients."""
    import jadam
    from jadam.sharding import shard_largest_dim, zero1

    params = shard_largest_dim(shapes, mesh, "model")
    divided = zero1(tx, params, mesh, "data")
    state = divided.layout.state

    def of_each_replica(p):
        spec = jax.sharding.PartitionSpec("data", *p.sharding.spec)
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((mesh.shape["data"], *p.shape), p.dtype, sharding=sharding)

    def step(params, state, grads):
        return jadam.step(divided, jax.tree.map(lambda g: g.sum(0), grads), state, params)

    args = params, state, jax.tree.map(of_each_replica, params)
    program = jax.jit(step, donate_argnums=(0, 1), keep_unused=True).lower(*args).compile()
    ends = list(itertools.accumulate(len(jax.tree.leaves(x)) for x in args))
    return program, [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def entry_bytes(text, which) -> int:
    """Bytes on a device of the program's arguments with these numbers. The program takes all arguments as one tuple."""
    (together,) = re.findall(r"= \((.*)\)\S* parameter\(0\)", text[text.index("\nENTRY") :].split("\n}")[0])
    sizes = list(map(array_bytes, re.findall(r"([a-z]+\d+|pred)\[([\d,]*)\]", together)))
    return sum(sizes[number] for number in which)


def collectives(text) -> dict[str, int]:
    """Number of each collective. On a TPU a reduce-scatter is a fusion called all-reduce-scatter."""
    scatters = len(re.findall(r"calls=%all-reduce-scatter", text)) + len(re.findall(r" reduce-scatter\(", text))
    within = sum(
        len(re.findall(r" all-reduce\(", body))
        for body in re.findall(r"\n%all-reduce-scatter[^\n]*\{(.*?)\n\}", text, re.S)
    )
    count = lambda name: len(re.findall(rf" {name}(?:-start)?\(", text))
    found = {"reduce-scatter": scatters, "all-reduce": count("all-reduce") - within}
    found |= {name: count(name) for name in ("all-gather", "all-to-all", "collective-permute")}
    return {name: n for name, n in found.items() if n}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        compile_on_mesh(*sys.argv[1:])
    else:
        parts = {"plan": compare_with_plan, "offload": offload, "sharded": sharded_steps}
        parts.get(sys.argv[1], lambda: main(*sys.argv[1].split()))()
