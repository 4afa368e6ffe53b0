"""Sides of `benchmarks.gpu`: the optimizers that it times, how it times them, and what it runs in child processes."""

import contextlib
import functools
import itertools
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jadam
from benchmarks.aot import FREE
from benchmarks.running import first_line
from jadam._diagnostics.plan import shapes_of

STEPS = 20  # of a loop within one program
ROUNDS = 7
BATCH_SECONDS = 0.015  # of steps that are enqueued before a wait, at least; 10 to 100 calls
FORMATS = ("float32", "bfloat16", "int8")


# ---------------------------------------------------------------- sets of parameters


def parameter_sets(small: bool) -> dict[str, list[tuple[int, ...]]]:
    """``{name: shapes}``, the important ones first; ``small`` ones for a CPU."""
    one_leaf = lambda n: [(2 ** (n // 2), 2 ** (n - n // 2))]
    gpt2 = [x.shape for x in jax.tree.leaves(shapes_of("gpt2", jnp.float32))]
    narrow = [tuple(max(1, n // 16) for n in shape) for shape in gpt2[-52:]]  # 4 of 12 blocks, and the embeddings
    network = [(64, 32), (32,), *[(32, 32), (32,)] * 4, (32, 10), (10,)]
    sizes, leaves = ((18, 16, 14), 30) if small else ((27, 25, 22), 1000)
    return {
        "GPT-2": narrow if small else gpt2,
        **{f"2^{n}": one_leaf(n) for n in sizes},
        "12 small leaves": network,
        f"{leaves:,} leaves of 32x32": [(32, 32)] * leaves,
    }


@functools.cache
def _normal(dtype) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(2**20).astype(dtype)


def gradients(shapes, dtype) -> list[jax.Array]:
    """Normal gradients, in large leaves periodic."""
    return [jnp.asarray(np.resize(_normal(np.dtype(dtype)), shape)) for shape in shapes]


# ---------------------------------------------------------------- JAX


def update_and_apply(tx):
    """Step with ``tx.update`` and `optax.apply_updates`."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def one_pass(tx):
    """Step with `jadam.step`."""
    return lambda params, state, grads: jadam.step(tx, grads, state, params)


class JaxSide:
    """A step compiled in two programs: one step, and a loop of `STEPS`. Both work in place."""

    def __init__(self, tx, step, grads, name="loop", only_loop=False):
        params = [jnp.zeros(g.shape, g.dtype) for g in grads]
        self.held, self.grads = (params, tx.init(params)), grads
        self.parameters = sum(p.size for p in params)
        size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        self.bytes = 2 * size(self.held) + size(grads)
        self.facts, self.call = {}, None
        if not only_loop:
            self.call, seconds = self._compile(step)
            operations = run_operations(self.call.as_text())
            memory = self.call.memory_analysis()
            temporaries = None if memory is None else round(memory.temp_size_in_bytes / self.parameters, 4)
            self.facts = {
                "compile, s": round(seconds, 3),
                "temporaries, bytes per parameter": temporaries,
                "kernels": len(operations),
                "custom calls": operations.count("custom-call"),
            }

        def loop(params, state, grads):
            return jax.lax.fori_loop(0, STEPS, lambda _, held: step(*held, grads), (params, state))

        loop.__name__ = name  # that of the program, by which XLA names its dump
        self.loop, _ = self._compile(loop)

    def _compile(self, function):
        """The compiled program, and the seconds to trace, lower and compile it."""
        start = time.perf_counter()
        program = jax.jit(function, donate_argnums=(0, 1)).lower(*self.held, self.grads).compile()
        return program, time.perf_counter() - start

    def _run(self, program, n) -> float:
        """Seconds of ``n`` runs, enqueued before one wait."""
        start = time.perf_counter()
        for _ in range(n):
            self.held = program(*self.held, self.grads)
        jax.block_until_ready(self.held)
        return time.perf_counter() - start

    def programs(self):
        """``{column: (run(n) -> seconds, steps in a run)}``."""
        runs = {"in a loop, ms": (functools.partial(self._run, self.loop), STEPS)}
        return runs if self.call is None else runs | {"a call, ms": (functools.partial(self._run, self.call), 1)}


def run_operations(text) -> list[str]:
    """Operations of an HLO text's entry computation that run something: on a GPU kernels, copies and custom calls."""
    entry = text[text.index("\nENTRY") :].split("\n}")[0]
    found = (re.match(r"\s*(?:ROOT )?%?[\w.-]+ = .*? ([a-z][a-z0-9-]*)\(", line) for line in entry.splitlines())
    return [x[1] for x in found if x and x[1] not in FREE]


def _optax(**options):
    tx = optax.adam(1e-3, **options)
    return functools.partial(JaxSide, tx, update_and_apply(tx))


def _jadam(moments, make_step=one_pass, exact=False):
    tx = jadam.adam(1e-3, moments=moments)
    tx = jadam.exact_bf16(tx) if exact else tx
    return functools.partial(JaxSide, tx, make_step(tx))


def _flashoptim(grads):
    """flashoptim-jax's 8-bit Adam with float32 weights; its fused kernels need a GPU."""
    from flashoptim_jax import flash_adam

    tx = flash_adam(1e-3, master_weight_bits=None, fused=_on_gpu(grads[0]))
    return JaxSide(tx, tx.step, grads)


def _on_gpu(x) -> bool:
    return next(iter(x.devices())).platform == "gpu"


# ---------------------------------------------------------------- PyTorch


class TorchSide:
    """An optimizer of PyTorch's. It has no loop: steps are enqueued one by one."""

    def __init__(self, make, grads):
        import torch

        on_gpu = _on_gpu(grads[0])
        if on_gpu and not torch.cuda.is_available():
            raise RuntimeError("this PyTorch has no CUDA")
        self.wait = torch.cuda.synchronize if on_gpu else lambda: None
        to_torch = lambda x: torch.tensor(np.asarray(x), device="cuda" if on_gpu else "cpu")
        self.params = [torch.zeros_like(to_torch(g)).requires_grad_() for g in grads]
        for p, g in zip(self.params, grads, strict=True):
            p.grad = to_torch(g)
        self.optimizer, self.facts, self.is_tensor = make(self.params), {}, torch.is_tensor
        self._run(1)  # makes the state

    @property
    def bytes(self) -> int:
        """Bytes that a step must read and write."""
        state = [x for leaf in self.optimizer.state.values() for x in leaf.values() if self.is_tensor(x)]
        size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)
        return 3 * size(self.params) + 2 * size(state)  # parameters and gradients are float32

    def _run(self, n) -> float:
        start = time.perf_counter()
        for _ in range(n):
            self.optimizer.step()
        self.wait()
        return time.perf_counter() - start

    def programs(self):
        """``{column: (run(n) -> seconds, steps in a run)}``."""
        return {"a call, ms": (self._run, 1)}


def _torch(grads):
    import torch

    return TorchSide(lambda params: torch.optim.Adam(params, lr=1e-3, fused=True), grads)


def _bitsandbytes(grads):
    import bitsandbytes

    return TorchSide(lambda params: bitsandbytes.optim.Adam8bit(params, lr=1e-3), grads)


# ---------------------------------------------------------------- all sides


SIDES = {  # name: (function that makes the side from gradients, dtype of weights and gradients)
    "Optax": (_optax(), jnp.float32),
    **{f"step {x}": (_jadam(x), jnp.float32) for x in FORMATS},
    **{f"step {x}, exact_bf16": (_jadam(x, exact=True), jnp.bfloat16) for x in FORMATS},
    "torch, fused": (_torch, jnp.float32),
    "jadam, two calls": (_jadam("float32", update_and_apply), jnp.float32),
    "Optax, bfloat16 mu": (_optax(mu_dtype=jnp.bfloat16), jnp.float32),
    "bitsandbytes, 8-bit": (_bitsandbytes, jnp.float32),
    "flashoptim-jax, 8-bit": (_flashoptim, jnp.float32),
}
MANY_LEAVES = ("Optax", "step float32", "step bfloat16", "step float32, exact_bf16", "torch, fused")  # Optax: 16 s each


def time_sides(sides, report, time_left=lambda: math.inf) -> dict[str, dict]:
    """Milliseconds of each side's programs, medians of `ROUNDS` in which the sides take turns.

    ``report(name, error)`` is called for a side that fails, which is then left out.
    """
    seconds, times = {}, {}
    for i in range(ROUNDS + 1):  # the first warms up
        start = time.perf_counter()
        for name, side in list(sides.items()):
            try:
                for column, (run, steps) in side.programs().items():
                    if i == 0:
                        run(1)
                        times[name, column] = min(100, max(1 if steps > 1 else 10, math.ceil(BATCH_SECONDS / run(1))))
                    else:
                        n = times[name, column]
                        seconds.setdefault(name, {}).setdefault(column, []).append(run(n) / (n * steps))
            except Exception as error:
                report(name, error)
                sides.pop(name)
                seconds.pop(name, None)
        if i and time_left() < 2 * (time.perf_counter() - start):
            break
    return {
        name: {column: round(1e3 * statistics.median(x), 5) for column, x in columns.items()}
        | {"rounds": len(next(iter(columns.values())))}
        for name, columns in seconds.items()
    }


def copy_bandwidth(elements: int) -> tuple[float, int]:
    """Bytes a second of ``x + 1`` in place, which reads and writes 4 bytes an element; and the number of elements.

    The number is halved until the array fits.
    """
    while True:
        try:
            x = jnp.zeros(elements, jnp.float32)
            add = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
            rates = []
            for _ in range(ROUNDS):
                x = jax.block_until_ready(add(x))
                start = time.perf_counter()
                for _ in range(STEPS):
                    x = add(x)
                x.block_until_ready()
                rates.append(8 * elements * STEPS / (time.perf_counter() - start))
            return statistics.median(rates), elements
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or elements < 2**20:
                raise
            elements //= 2


# ---------------------------------------------------------------- child processes


def captured(dump: Path, name: str) -> str | None:
    """How much of a loop XLA runs as CUDA graphs, from the folder ``--xla_dump_to``; None if the dump does not tell.

    XLA calls a graph a command buffer. It makes them of a program's thunks, which it dumps after its passes over them;
    before, it made them of HLO, as computations called ``command_buffer``.
    """
    for file in dump.glob(f"*{name}.thunk_sequence_after_thunk_passes.txt"):
        return captured_thunks(file.read_text())
    for file in dump.glob(f"*{name}.*after_optimizations.txt"):
        if "gpu_after" in file.name:
            return f"{file.read_text().count('to_apply=%command_buffer')} command buffers"
    return None


def captured_thunks(text) -> str | None:
    """The same from the thunks, which are indented by what they are in."""
    parents, inside, total, within_loop = [], 0, 0, False
    for line in text.splitlines():
        found = re.match(r"( *)\d+: k(\w+)", line)
        if not found:
            continue
        indent, kind = len(found[1]), found[2]
        parents = [x for x in parents if x[0] < indent]
        kinds = [x[1] for x in parents]
        if "While" in kinds and kind not in ("CommandBuffer", "Sequential", "Conditional"):
            total += 1
            inside += "CommandBuffer" in kinds
            within_loop |= kinds.index("CommandBuffer") < kinds.index("While") if "CommandBuffer" in kinds else False
        parents.append((indent, kind))
    if not total:
        return None
    return f"{inside} of the loop's {total} operations in CUDA graphs" + ", the loop itself too" * within_loop


def graph_child(small: str, dump: str) -> None:
    """Prints a line of JSON for a loop of GPT-2 in int8 and in float32, and whether it became a CUDA graph."""
    shapes = parameter_sets(small == "small")["GPT-2"]
    for moments in ("int8", "float32"):
        name = f"step {moments}"
        try:
            side = SIDES[name][0](gradients(shapes, jnp.float32), f"loop_{moments}", only_loop=True)
            failed = []
            row = time_sides({name: side}, lambda _, error, failed=failed: failed.append(error)).get(name, {})
            row["graph"] = captured(Path(dump), f"loop_{moments}")
            row |= {"error": first_line(failed[0])} if failed else {}
        except Exception as error:
            row = {"error": first_line(error)}
        print(json.dumps({"side": name, **row}), flush=True)


def short_child() -> None:
    """Two steps in every format, donated and not, over awkward shapes, for ``compute-sanitizer``."""
    shapes = [(), (7,), (64, 777), (3, 5, 130), (4096,)]
    for moments, exact, donate in itertools.product(FORMATS, (False, True), (False, True)):
        tx = jadam.adamw(1e-3, moments=moments)
        tx = jadam.exact_bf16(tx) if exact else tx
        dtype = jnp.bfloat16 if exact else jnp.float32
        params, grads = [jnp.asarray(np.ones(shape), dtype) for shape in shapes], gradients(shapes, dtype)
        held = params, tx.init(params)
        step = jax.jit(one_pass(tx), donate_argnums=(0, 1) if donate else ())
        for _ in range(2):
            held = step(*held, grads)
        jax.block_until_ready(held)
    print("done")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        {"graph": graph_child, "short": short_child}[sys.argv[1]](*sys.argv[2:])
