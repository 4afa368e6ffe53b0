"""Two processes with four devices each train and are killed; this process, with eight devices, resumes."""

import math
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import subprocess_env, zip_leaves
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from programs import processes as program

import jadam

pytestmark = pytest.mark.slow

MESH = program.mesh()
WHOLE = NamedSharding(MESH, P())
REORDERED = 2 * (program.DEVICES - 1) * 2.0**-24  # two sums over devices, half an ulp for each addition


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_process(name, folder, port, process):
    """Starts a process with four devices and a log."""
    devices = f"--xla_force_host_platform_device_count={program.DEVICES // program.PROCESSES}"
    env = subprocess_env(JAX_PLATFORMS="cpu", XLA_FLAGS=devices, no_grpc_proxy="127.0.0.1")
    command = [sys.executable, "-W", "error", program.__file__, name, str(folder), str(port), str(process)]
    with open(folder / f"log-{process}", "w") as log:
        return subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@pytest.fixture(scope="module", params=program.OPTIMIZERS)
def killed(request, tmp_path_factory):
    """An optimizer's name, and the folder of two processes that were killed while training."""
    folder, port = tmp_path_factory.mktemp("processes"), free_port()
    processes, until = [], time.monotonic() + 100
    try:
        for process in range(program.PROCESSES):
            processes.append(start_process(request.param, folder, port, process))
        while len(list(folder.glob("ready-*"))) < program.PROCESSES:
            if time.monotonic() > until or any(x.poll() is not None for x in processes):
                logs = "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(folder.glob("log-*")))
                pytest.fail(f"the processes ended or took too long, {[x.poll() for x in processes]}\n{logs}")
            time.sleep(0.05)
        for x in processes:
            x.send_signal(signal.SIGKILL)
        assert [x.wait(timeout=10) for x in processes] == [-signal.SIGKILL] * program.PROCESSES
    finally:
        for x in processes:
            x.kill()
            x.wait(timeout=10)
    return request.param, folder


def resume(name, folder):
    """`zero1` of the optimizer on this process's devices, and the restored parameters and state."""
    tx, dtype = program.OPTIMIZERS[name]
    params = program.initial(dtype)
    tx = jadam.sharding.zero1(tx, params, MESH, "data")
    wanted = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=WHOLE), params)
    with program.checkpoints(folder) as manager:
        assert manager.latest_step() == program.SAVED
        items = {"params": ocp.args.StandardRestore(wanted), "state": ocp.args.StandardRestore(tx.layout.state)}
        restored = manager.restore(program.SAVED, args=ocp.args.Composite(**items))
    return tx, restored["params"], restored["state"]


def load_recorded(folder, steps, params):
    """Loss and gradients that the processes recorded after ``steps`` steps."""
    with np.load(folder / f"gradients-{steps}.npz") as saved:
        names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
        return float(saved["loss"]), jax.tree.map(lambda name: saved[name], names)


def assert_recorded_bits(params, state, folder, steps):
    """Each device holds the bytes that the device at its place held in the two processes."""
    expected = {}
    for process in range(program.PROCESSES):
        with np.load(folder / f"view-{steps}-{process}.npz") as saved:
            assert not expected.keys() & saved.keys()
            expected |= saved
    got = program.view((params, state), MESH)
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=f"{name} after {steps} steps")


@pytest.mark.parametrize("divided", [True, False], ids=["on eight devices", "on one"])
def test_same_bits_from_the_same_gradients(killed, divided):
    """Given the recorded gradients, all arrays keep the processes' bits, when restored and after every later step."""
    name, folder = killed
    tx, params, state = resume(name, folder)
    where = WHOLE, tx.shardings
    assert_recorded_bits(params, state, folder, program.SAVED)
    if not divided:
        tx, _ = program.OPTIMIZERS[name]
        params, state = jax.device_put((params, state), jax.devices()[0])
    checksums = {(folder / f"checksum-{process}").read_text() for process in range(program.PROCESSES)}
    assert checksums == {str(jadam.checksum((params, state)))}
    step = None
    for steps in range(program.SAVED, program.LAST):
        gradients = jax.device_put(load_recorded(folder, steps, params)[1], WHOLE if divided else jax.devices()[0])
        step = step or program.compiled_step(tx, gradients, state, params)
        params, state = step(gradients, state, params)
        assert_recorded_bits(*jax.device_put((params, state), where), folder, steps + 1)


def reordering_bounds(params, batch):
    """Bounds of the difference of two float32 sums of the devices' gradients in different orders."""
    parts = zip(*(np.split(np.asarray(x), program.DEVICES) for x in batch), strict=True)
    terms = [program.loss_and_gradients(params, *part)[1] for part in parts]
    return jax.tree.map(lambda *g: REORDERED * sum(map(np.abs, g)) / program.DEVICES, *terms)


def test_the_same_losses(killed):
    """With its own gradients this process has the losses of the two, up to the order of sums."""
    name, folder = killed
    tx, params, state = resume(name, folder)
    step = None
    for j, steps in enumerate(range(program.SAVED, program.LAST + 1)):
        batch = program.batch(MESH, steps)
        expected, theirs = load_recorded(folder, steps, params)
        loss, gradients = program.loss_and_gradients(params, *batch)
        bounds = reordering_bounds(params, batch)
        if j == 0:
            for a, b, bound in zip_leaves(gradients, theirs, bounds):
                assert (np.abs(a - b) <= bound).all()
        # The loss is a sum over eight devices, too. An error d of a gradient moves its coordinate by at most
        # 2 * LR * d / sqrt(v) in that step and each later one, j * (j + 1) / 2 times in all. The loss changes by that
        # times the gradient, which is at most sqrt(steps) * sqrt(v). Times 2, because later gradients are those of
        # moved parameters.
        moved = 2 * program.LR * j * (j + 1) * math.sqrt(steps) * sum(x.sum() for x in jax.tree.leaves(bounds))
        # About one code or bfloat16 value a step may differ, at a rounding threshold. A weight moves by less than LR.
        decided = j * program.LR * max(np.abs(g).max() for g in jax.tree.leaves(theirs))
        tolerance = REORDERED * expected + moved + (0 if name == "float32" else decided)
        assert abs(float(loss) - expected) <= tolerance, (steps, float(loss), expected, tolerance)
        step = step or program.compiled_step(tx, gradients, state, params)
        params, state = step(gradients, state, params)
