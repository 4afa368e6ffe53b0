"""Training program that `test_resume.py` kills; it resumes from its latest checkpoint."""

import argparse
import functools
import os
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import jadam

STEPS, SAVE_EVERY = 60, 3
BATCH, INPUTS, HIDDEN, CLASSES = 128, 64, 256, 10


def optimizer(moments="float32"):
    """An optimizer whose steps depend on all of its state: moments, count, and for int8 codes, scales and dither."""
    rate = optax.cosine_decay_schedule(1e-2, STEPS)
    return jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adamw(rate, weight_decay=1e-2, moments=moments))


CONFIGURATIONS = {
    "float32": (jnp.float32, optimizer()),
    "exact_bf16": (jnp.bfloat16, jadam.exact_bf16(optimizer("int8"))),
}


def initial(dtype):
    rng = np.random.default_rng(0)
    kernel = lambda *shape: rng.standard_normal(shape) / shape[0] ** 0.5
    params = {
        "hidden": {"kernel": kernel(INPUTS, HIDDEN), "bias": np.zeros(HIDDEN)},
        "output": {"kernel": kernel(HIDDEN, CLASSES), "bias": np.zeros(CLASSES)},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def batch(step):
    """Batch of a step, the same in every process."""
    x = np.random.default_rng(step).standard_normal((BATCH, INPUTS), np.float32)
    return x, x[:, :CLASSES].argmax(axis=1)


def loss(params, x, labels):
    hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = hidden @ params["output"]["kernel"] + params["output"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("configuration", choices=CONFIGURATIONS)
    parser.add_argument("directory", type=Path, help="folder of the checkpoints")
    parser.add_argument("result", type=Path, help=".npz of the last parameters and state")
    parser.add_argument(
        "--disk-full-at", type=int, metavar="STEP", help="the save of this step cannot write its arrays"
    )
    arguments = parser.parse_args()
    dtype, tx = CONFIGURATIONS[arguments.configuration]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, x, labels):
        return jadam.step(tx, jax.grad(loss)(params, x, labels), state, params)

    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(arguments.directory.absolute(), options=options) as manager:
        params = initial(dtype)
        state = tx.init(params)
        done = manager.latest_step() or 0
        if done:
            params, state = manager.restore(done, args=ocp.args.StandardRestore((params, state)))
        print("resumed from", done, flush=True)
        for step in range(done + 1, STEPS + 1):
            params, state = train_step(params, state, *batch(step))
            print("step", step, flush=True)
            if step % SAVE_EVERY == 0:
                if step == arguments.disk_full_at:
                    manager.wait_until_finished()  # let the previous save finish
                    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
                manager.save(step, args=ocp.args.StandardSave((params, state)))
    print("loss", jax.jit(loss)(params, *batch(0)))
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path((params, state))}
    incomplete = arguments.result.with_suffix(".incomplete")
    with incomplete.open("wb") as file:
        np.savez(file, **leaves)
    os.replace(incomplete, arguments.result)


if __name__ == "__main__":
    main()
