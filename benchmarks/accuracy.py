"""Distance of each library's float32 Adam from Algorithm 1 in float64.

The measure is the maximum error of the direction (the update at learning rate 1) over 1,500 steps. Gradients are N(0,
1) scaled by 1, 1e-6 and 1e6; b2 is 0.95, 0.999, 0.9999; all else is default. The maximum grows with the number of
coordinates, so it is given for 16 and 1,000. The floor is Adam in float64 that stores only v in float32.
"""

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax

import jadam

STEPS = 1500
B1, EPS = 0.9, 1e-8
CASES = list(itertools.product([0.95, 0.999, 0.9999], [1.0, 1e-6, 1e6]))


def gradients(coordinates, scale):
    """Gradients of all steps, reproducible."""
    rng = np.random.default_rng(0)
    return (scale * rng.standard_normal((STEPS, coordinates))).astype(np.float32)


def exact(g, b2, stored=np.float64):
    """Directions of Algorithm 1 in float64, with v stored as ``stored``."""
    m = v = np.zeros(g.shape[1])
    out = []
    for t, g_t in enumerate(g.astype(np.float64), start=1):
        m = B1 * m + (1 - B1) * g_t
        v = (v + (1 - b2) * (g_t**2 - v)).astype(stored).astype(np.float64)
        out.append(m / (1 - B1**t) / (np.sqrt(v / (1 - b2**t)) + EPS))
    return np.array(out)


def with_optax_api(scale_by_adam):
    """Function that returns the directions of an Optax-style transformation."""

    def directions(g, b2):
        tx = scale_by_adam(b2=b2)
        body = lambda state, g_t: tx.update(g_t, state)[::-1]
        return jax.jit(lambda g: jax.lax.scan(body, tx.init(g[0]), g)[1])(g)

    return directions


def with_torch(python):
    """Function that returns the directions of ``torch.optim.Adam``, run with the interpreter ``python``."""
    program = """if True:
        import sys, numpy as np, torch
        data = np.load(sys.argv[1])
        p = torch.zeros(data["g"].shape[1], requires_grad=True)
        adam = torch.optim.Adam([p], lr=1.0, betas=(0.9, float(data["b2"])), fused=True)
        out = []
        for g in data["g"]:
            p.data.zero_()
            p.grad = torch.from_numpy(g)
            adam.step()
            out.append(-p.detach().numpy().copy())
        np.save(sys.argv[2], np.array(out))
    """

    def directions(g, b2):
        with tempfile.TemporaryDirectory() as folder:
            given, found = Path(folder) / "given.npz", Path(folder) / "found.npy"
            np.savez(given, g=g, b2=b2)
            subprocess.run([python, "-c", program, given, found], check=True)
            return np.load(found)

    return directions


def run(options) -> dict:
    """The table of errors."""
    from rich.progress import track  # which `benchmarks.gpu` does without

    sides = {"jadam": with_optax_api(jadam.scale_by_adam), "optax": with_optax_api(optax.scale_by_adam)}
    sides["floor"] = lambda g, b2: exact(g, b2, np.float32)
    if options.torch_python:
        sides["torch"] = with_torch(options.torch_python)
    else:
        print("accuracy: torch left out, --torch-python not given", file=sys.stderr)
    table = []
    for (b2, scale), coordinates in track(list(itertools.product(CASES, [16, 1000])), description="accuracy"):
        g = gradients(coordinates, scale)
        expected = exact(g, b2)
        errors = {name: float(np.abs(side(g, b2) - expected).max()) for name, side in sides.items()}
        table.append({"b2": b2, "scale": scale, "coordinates": coordinates, **errors})
    largest = {
        str(n): {name: max(row[name] for row in table if row["coordinates"] == n) for name in sides} for n in (16, 1000)
    }
    for n, errors in largest.items():
        print(f"largest error over {n} coordinates:", ", ".join(f"{k} {v:.2g}" for k, v in errors.items()))
    return {"largest": largest, "table": table}
