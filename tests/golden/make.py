"""Writes the golden files: ``python tests/golden/make.py [FOLDER]``, from the commit before a change.

No commit changes both the committed files and the code. On another processor they are compared within rounding only. To
compare bits there, make the files in a folder of your own and run ``JADAM_GOLDEN=FOLDER pytest tests/test_golden.py``.
"""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
import orbax.checkpoint as ocp
from golden import cases, texts, where

STATES = ["adam, float32", "adam, bfloat16", "adam, int8", "exact_bf16, int8", "by_path, int8", "adam, scheduled betas"]
STATES += ["amsgrad, float32", "average_params"]


def start() -> dict[str, np.ndarray]:
    """Parameters, and gradients over six decades, some always 0 and some 0 after the first step."""
    rng, found = np.random.default_rng(0), {}
    for size, shapes in cases.SHAPES.items():
        for name, shape in shapes.items():
            found[f"params/{size}/{name}"] = rng.standard_normal(shape).astype(np.float32)
            g = rng.standard_normal((cases.STEPS, *shape)) * 10.0 ** rng.uniform(-4, 2, shape)
            if shape:
                g[..., 0] = 0
                g[1:, ..., 1] = 0
            found[f"gradients/{size}/{name}"] = _few_digits(g)
    return found


def _few_digits(x):
    """Values rounded to 11 bits, which compress well."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent).astype(np.float32)


def main(folder: Path) -> None:
    """Writes every file."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = start()
    kept = {name: cases.trajectory(case, arrays) for name, case in cases.CASES.items()}
    trajectories = {key: x for name, x in kept.items() for key, x in cases.to_arrays(name, x).items()}
    np.savez_compressed(folder / "trajectories.npz", **arrays, **trajectories)
    (folder / "states").mkdir(exist_ok=True)
    for name in STATES:
        _, state = kept[name][10]
        file = name.replace(", ", "-").replace(" ", "_")
        np.savez_compressed(folder / "states" / f"{file}.npz", **where.named(state))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "states" / file, state, force=True)
            checkpointer.wait_until_finished()
        (folder / "states" / file / "commit_success.txt").write_text(
            "Checkpoint commit was successful\n"
        )  # else it contains a path
    names = where.public_names()
    (folder / "names.json").write_text(json.dumps(names, indent=1) + "\n")
    (folder / "errors.json").write_text(json.dumps(texts.every(), indent=1, ensure_ascii=False) + "\n")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=HERE).stdout
    made = {**where.here(), "commit": commit.strip(), "date": str(datetime.date.today())}
    (folder / "made.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE)
