"""A step compiled for NVIDIA GPUs on a machine without one: launches, compile time, registers and instructions.

Programs are compiled for an H100 ahead of time, as in ``aot``. The run fails if a bar is exceeded: GPT-2's 148 leaves
take at most 7 launches and no temporaries, and compile in a part of Optax's time; on a mesh of eight GPUs nothing is
sent. NVRTC of CUDA 12 and of 13 compiles the kernel for every variant and architecture; none may spill on sm_90. The
instructions an element are those of the int8 kernel in the case that most steps are: whole blocks, b1 and b2 of at
least 1/2, no clipping, no weight decay. Those outside of its loop count once for all elements of a thread.
"""

import concurrent.futures
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROUNDS = 5
SIDES = {  # format, exact_bf16, the most compile time over Optax's
    "float32": ("float32", False, 0.4),
    "bfloat16": ("bfloat16", False, 0.5),
    "int8": ("int8", False, 0.7),
    "int8, exact_bf16": ("int8", True, 0.8),
}
LAUNCHES = {"GPT-2": 7, "1,000 leaves": 32, "8 GPUs": 2}
TEMPORARIES = 0.1  # bytes per parameter; scalars and offsets are some
ARCHITECTURES = {12: (70, 75, 80, 90, 100, 120), 13: (75, 80, 90, 100, 120)}
INT8_RULES = ("Adam", "NAdam")  # in rules.h
INSTRUCTIONS, TRANSCENDENTAL = 75, 4  # an element
ELEMENTS = 8, 32  # of a thread: in a round, and in all of an int8 program's


def run(options) -> dict:
    """Returns rows for programs and kernels. With ``--quick``: no times, few variants but on sm_90; writes nothing."""
    from benchmarks import aot

    quick = ["quick"] * options.quick
    result, missed = {}, []
    for part, platform in (("programs", "cuda"), ("kernels", "nvrtc")):
        rows = []
        for row in aot.run_in_environment(platform, part, *quick, module="benchmarks.cuda"):
            missed += [f"{part}, {next(iter(row.values()))}: {x}" for x in row.pop("missed")]
            print(f"cuda: {part}: " + ", ".join(f"{k} {v}" for k, v in row.items() if k != "registers"), flush=True)
            rows.append(row)
        result[part] = rows
    if missed:
        raise SystemExit("cuda: bars missed: " + "; ".join(missed))
    return {} if options.quick else result


# -- programs, in the environment with XLA's compiler for GPUs ---------------------------------------------------------


def programs(quick: bool):
    """Prints a line of JSON for every program."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

    from benchmarks import aot
    from benchmarks.gpu_sides import parameter_sets

    here = SingleDeviceSharding(aot.device("cuda"))
    print_programs("GPT-2", parameter_sets(False)["GPT-2"], here, quick)
    if not quick:
        print_programs("1,000 leaves", [(32, 32)] * 1000, here, quick)
    target = (HERE / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x8", target_config=target)
    mesh = Mesh(np.array(topology.devices), ("fsdp",))
    print_programs("8 GPUs", [(1024, 1024)] * 20, NamedSharding(mesh, PartitionSpec("fsdp")), True)


def print_programs(name, shapes, sharding, quick):
    """Prints a row for each format, compiled by turns with Optax's step."""
    from benchmarks import aot

    sides = list(SIDES) if quick else ["Optax", *SIDES]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    compiled = {}
    for _ in range(1 if quick else ROUNDS):
        for side in sides:
            start = time.perf_counter()
            compiled[side] = compile_step(side, shapes, sharding)
            seconds[side].append(time.perf_counter() - start)
    for side in SIDES:
        text, memory = compiled[side].as_text(), compiled[side].memory_analysis()
        row = {
            "program": f"{name}: {side}",
            "launches": text.count('custom_call_target="jadam_step"'),
            "temporaries": round(memory.temp_size_in_bytes / sum(map(math.prod, shapes)), 4),
            "collectives": aot.collectives(text),
        }
        over = not 0 < row["launches"] <= LAUNCHES[name], row["temporaries"] > TEMPORARIES, row["collectives"]
        missed = [x for x, is_over in zip(("launches", "temporaries", "collectives"), over, strict=True) if is_over]
        if not quick:
            ratio = statistics.median(x / y for x, y in zip(seconds[side], seconds["Optax"], strict=True))
            row |= {"seconds": round(statistics.median(seconds[side]), 2), "over Optax": round(ratio, 2)}
            missed += ["compile time"] * (name == "GPT-2" and ratio > SIDES[side][2])
        print(json.dumps({**row, "missed": missed}), flush=True)


def compile_step(side, shapes, sharding):
    """The compiled step of leaves of these shapes. JAX's caches are cleared first."""
    import jax
    import jax.numpy as jnp
    import optax

    import jadam

    jax.clear_caches()
    format, exact, _ = SIDES.get(side, ("float32", False, None))
    tx = optax.adam(1e-3) if side == "Optax" else jadam.adam(1e-3, moments=format)
    tx = jadam.exact_bf16(tx) if exact else tx
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = [place(jax.ShapeDtypeStruct(shape, jnp.bfloat16 if exact else jnp.float32)) for shape in shapes]
    if len(sharding.device_set) > 1:
        state = jadam.sharding.sharded(tx, params, sharding.mesh).abstract_state
    else:
        state = jax.tree.map(place, jax.eval_shape(tx.init, params))

    def step(params, state, grads):
        if side != "Optax":
            return jadam.step(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


# -- kernels, in the environment with NVRTC and nvdisasm ---------------------------------------------------------------


def kernels(quick: bool):
    """Prints a line of JSON for every architecture: the most registers of a variant, and spills. Then instructions."""
    from jadam._fused.cuda import nvrtc

    listed = re.findall(r"using Rules = List<(.*?)>;", (nvrtc.FUSED / "native" / "rules.h").read_text(), re.S)[0]
    rules = [x.strip() for x in listed.split(",")]
    numbers = itertools.product(range(len(rules)), range(3), range(2), range(2))
    variants = [nvrtc.Variant(*x) for x in numbers if x[1] != nvrtc.INT8 or rules[x[0]] in INT8_RULES]
    for major, architectures in ARCHITECTURES.items():
        compiler = next(x for x in nvrtc.installed(None)[0] if x.version[0] == major)
        for number in architectures:
            chosen = variants[::20] if quick and number != 90 else variants
            compile_one = lambda variant, a=f"sm_{number}", n=compiler: usage(nvrtc, n, variant, a)
            with concurrent.futures.ThreadPoolExecutor(2) as threads:
                used = dict(zip(chosen, threads.map(compile_one, chosen), strict=True))
            spills = {x.name: spilled for x, (_, spilled) in used.items() if spilled}
            row = {
                "NVRTC": ".".join(map(str, compiler.version)),
                "architecture": f"sm_{number}",
                "variants": len(used),
                "spilling": len(spills),
                "most bytes of spills": max(spills.values(), default=0),
                "registers": {x.name.removeprefix("jadam_"): registers for x, (registers, _) in used.items()},
                "missed": [f"{spills}"] * (number == 90 and bool(spills)),
            }
            print(json.dumps(row), flush=True)
        print(json.dumps({"NVRTC": ".".join(map(str, compiler.version)), **instructions(nvrtc, compiler)}), flush=True)


def usage(nvrtc, compiler, variant, architecture) -> tuple[int, int]:
    """The registers and the bytes of spills of a variant."""
    log = nvrtc.compile_source(compiler, (*nvrtc.options(variant, architecture), "--ptxas-options=-v"))[1]
    (registers,) = re.findall(r"Used (\d+) registers", log)
    return int(registers), sum(map(int, re.findall(r"(\d+) bytes spill", log)))


def instructions(nvrtc, compiler) -> dict:
    """The instructions an element of the int8 kernel in the usual case, and how many of them are transcendental."""
    (nvdisasm,) = Path(sys.prefix).rglob("bin/nvdisasm")
    options = (*nvrtc.options(nvrtc.Variant(0, nvrtc.INT8, 0, 0), "sm_90"), "-DJADAM_COUNT_USUAL")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(nvrtc.compile_source(compiler, options)[0])
        file.flush()
        text = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    operations, labels, jumps = [], {}, []
    for line in map(str.strip, text.splitlines()):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif found := re.match(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
            if found[1].startswith("BRA"):
                jumps.append((len(operations), re.findall(r"\.L_x_\d+", found[2])[0]))
            operations += [found[1]] * (found[1] != "NOP")
    start, end = max(((labels[to], i) for i, to in jumps if labels[to] < i), key=lambda x: x[1] - x[0])
    is_slow = lambda x: x.split(".")[0] in ("MUFU", "I2F", "I2FP", "F2I", "F2F", "FRND")
    of = lambda kept: (
        sum(map(kept, operations[start : end + 1])) / ELEMENTS[0]
        + sum(map(kept, operations[:start] + operations[end + 1 :])) / ELEMENTS[1]
    )
    counts = {"instructions an element": round(of(lambda x: True), 2), "transcendental": round(of(is_slow), 2)}
    missed = [f"{counts}"] * (
        counts["instructions an element"] > INSTRUCTIONS or counts["transcendental"] > TRANSCENDENTAL
    )
    return {"int8 kernel": "sm_90", **counts, "missed": missed}


if __name__ == "__main__":
    {"programs": programs, "kernels": kernels}[sys.argv[1]](sys.argv[2:] == ["quick"])
