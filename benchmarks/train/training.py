"""Trains and measures every side, one after the other."""

import functools
import hashlib
import json
import math
import re
import shutil
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import jadam
from benchmarks.running import TimedRun, card_name, describe_machine
from benchmarks.train import model, report, text
from benchmarks.train.checkpoint import Checkpoint, checksum_of_sources, remove_others
from benchmarks.train.programs import Programs, evaluation
from benchmarks.train.sides import INT8, LEAN, REFERENCE, Side, sides

BENCHMARKS = Path(__file__).resolve().parent.parent
SEVERAL_SEEDS = (REFERENCE, LEAN, INT8)
SAVE_SECONDS = 30.0  # between checkpoints
SPARE = 0.85  # of the time left, what trainings are planned for
TIMED_STEPS, ROUNDS = 20, 5  # of the optimizer alone


class Prepared(NamedTuple):
    """A side, ready to be trained."""

    side: Side
    programs: Programs
    seconds: float  # for a chunk of steps


class Training(TimedRun):
    """Settings and results of the whole benchmark."""

    def __init__(self, options, device):
        self.device, self.size, self.options = device, model.SIZES[options.size], options
        default = self.size.quick_minutes if options.quick else self.size.minutes
        name = f"train-{options.size}-{'quick-' * options.quick}{card_name(device)}.json"
        minutes = default if options.minutes is None else options.minutes
        super().__init__("train", Path(options.out or BENCHMARKS / "results" / name), minutes)
        self.wanted = self.size.quick_steps if options.quick else self.size.steps
        self.began = time.monotonic()

    def load(self) -> None:
        """Load the text, and the results of a run with the same settings that did not end."""
        if self.size.vocabulary > text.BYTES:
            print("train: reads the text; the first time it trains the tokeniser, about a minute", flush=True)
        loaded = text.load(self.size.vocabulary)
        self.train_text, self.test_text = jnp.asarray(loaded.train), jnp.asarray(loaded.test)
        settings = {
            "command": f"python -m benchmarks train --size {self.options.size}" + " --quick" * self.options.quick,
            **describe_machine(self.device),
            "size": {**self.size._asdict(), "dtype": jnp.dtype(self.size.dtype).name},
            "text": loaded.facts,
            "tokens": [len(loaded.train), len(loaded.test)],
            report.ENTROPY: loaded.entropy,
            "sources": checksum_of_sources(Path(jadam.__file__).parent, BENCHMARKS),
        }
        for key in ("text", "tokens", report.ENTROPY):
            print(f"train: {key}: {settings[key]}", flush=True)
        identity = json.dumps({key: value for key, value in settings.items() if key != "date"} | {"steps": self.wanted})
        identity = hashlib.sha256(identity.encode()).hexdigest()
        of_out = hashlib.sha256(str(self.out.resolve()).encode()).hexdigest()[:8]
        self.folder = text.cache() / f"{self.out.stem}-{of_out}" / identity[:16]
        remove_others(self.folder)
        self.result = {**settings, "identity": identity, "complete": False, "steps": None, "sides": {}}
        try:
            old = json.loads(self.out.read_text())
        except (OSError, ValueError):
            return
        if old.get("identity") == identity and not old["complete"]:
            print(f"train: resumes {self.out}, {old['steps']} steps a training", flush=True)
            self.result |= {"sides": old["sides"], "steps": old["steps"]}

    def todo(self, names) -> list[tuple[str, int]]:
        """Return ``(side, seed)`` of the trainings to run: first seeds first."""
        seeds = 1 if self.options.quick else self.size.seeds
        every = [(name, seed) for seed in range(seeds) for name in names if seed == 0 or name in SEVERAL_SEEDS]
        return [(name, seed) for name, seed in every if str(seed) not in self.runs_of(name)]

    def runs_of(self, name) -> dict:
        """Return the results of the side's trainings by seed."""
        return self.result["sides"].get(name, {}).get("runs", {})

    def starts(self, seed: int) -> np.ndarray:
        """Return where the sequences of all batches start, [chunks, steps of a chunk, batch]."""
        size, steps = self.size, self.result["steps"]
        starts = np.random.default_rng([seed, 0]).integers(
            len(self.train_text) - size.context, size=(steps, size.batch)
        )
        return starts.astype(np.int32).reshape(-1, size.chunk, size.batch)

    @functools.cached_property
    def evaluated(self) -> np.ndarray:
        """Where the sequences start that cover the test text, [batches, batch]."""
        size = self.size
        starts = np.arange(0, len(self.test_text) - size.context, size.context, dtype=np.int32)
        return starts[: len(starts) // size.batch * size.batch].reshape(-1, size.batch)


def run(options) -> dict:
    """Train every side. Writes its results itself, after every training."""
    device = jax.devices()[0]
    training = Training(options, device)
    if reason := why_not(options.size, device):
        print(f"train: skipped, {reason}. --size tiny trains on any device, --aot compiles for an H100")
        return {}
    training.watchdog.start()
    try:
        training.load()
        train_all(training)
    except KeyboardInterrupt:
        raise SystemExit("train: interrupted; the same command goes on") from None
    finally:
        training.watchdog.cancel()
    report.show(training.result, training.out.with_suffix(".png"))
    if training.left_out:
        print(f"train: left out, out of time: {'; '.join(training.left_out)}. The same command goes on")
    print(f"train: written to {training.out}")
    if training.failed:
        raise SystemExit(f"train: {len(training.failed)} sides failed: {', '.join(training.failed)}")
    return {}


def why_not(size: str, device) -> str | None:
    """Return why a model of this size is not trained on the device."""
    if size == "gpt2" and device.platform == "cpu":
        return "GPT-2 small needs a GPU, and JAX finds none (for NVIDIA's, install jax[cuda12] or jax[cuda13])"
    capability = getattr(device, "compute_capability", "")  # such as 9.0, or gfx942 of an AMD GPU
    if size == "gpt2" and re.fullmatch(r"\d+\.\d+", capability) and float(capability) < 8:
        return f"products of bfloat16 matrices need compute capability 8.0, and this GPU has {capability}"
    return None


def train_all(training: Training) -> None:
    """Train all sides that the time allows."""
    every = sides(training.size, training.device.platform)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("compiling", total=None)
        prepared = prepare(training, {name: every[name] for name, _ in training.todo(every)})
        todo = training.todo(prepared)
        if training.result["steps"] is None and todo:
            training.result["steps"] = choose_steps(training, [prepared[name].seconds for name, _ in todo])
        progress.update(task, total=len(todo) * (training.result["steps"] or 0))
        for name, seed in todo:
            progress.update(task, description=f"{name}, seed {seed}")
            try:
                found = train(training, name, seed, prepared[name], functools.partial(progress.advance, task))
            except Exception as error:
                training.error(f"{name}, seed {seed}", error)
                training.failed.append(name)
                continue
            if found is None:
                training.left_out.append(f"{name}, seed {seed}")
                continue
            training.result["sides"][name]["runs"][str(seed)] = found
            training.result["complete"] = not training.todo(prepared) and not training.failed
            report.summarise(training.result)
            training.write()
            rate = f"{found['tokens a second']:,.0f} tokens/s"
            progress.console.print(f"train: {name}, seed {seed}: loss {found['loss']:.4f}, {rate}", highlight=False)


def prepare(training, every) -> dict[str, Prepared]:
    """Compile all sides, then measure each, that with the least memory first: a device only reports its peak so far."""
    made = {}
    for name, make in every.items():
        try:
            side = make()
            tokens = training.train_text
            made[name] = side, Programs(side, training.size, len(tokens), tokens.dtype)
        except ImportError as error:
            training.missing(name, error)
        except Exception as error:
            training.error(name, error)
            training.failed.append(name)
    seconds, highest = {}, peak(training.device) or 0
    for name in sorted(made, key=lambda name: made[name][1].facts["training, bytes by the compiler"] or 0):
        side, programs = made[name]
        try:
            facts, seconds[name] = measure(training, side, programs)
        except Exception as error:
            training.error(name, error)
            training.failed.append(name)
            continue
        now = peak(training.device)
        facts["peak on the device, bytes"] = now if now and now > highest else None  # else that of an earlier side
        highest = max(highest, now or 0)
        training.result["sides"].setdefault(name, {**programs.facts, **facts, "runs": {}})
    return {name: Prepared(*made[name], seconds[name]) for name in every if name in seconds}


def peak(device) -> int | None:
    """Return the largest number of bytes in use until now, if the device reports it."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def measure(training, side, programs) -> tuple[dict, float]:
    """Return what is measured before training, and the seconds of a chunk."""
    size = training.size
    starts = np.zeros((size.chunk, size.batch), np.int32)
    held = begin(training, side, 0)
    for _ in range(2):  # the first allocates
        start = time.perf_counter()
        *held, loss = programs.train(*held, training.train_text, starts, jnp.float32(1))
        loss.block_until_ready()
        seconds = time.perf_counter() - start
    grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), held[0])
    times = []
    for i in range(ROUNDS + 1):  # the first allocates
        start = time.perf_counter()
        for _ in range(TIMED_STEPS if i else 1):
            held = programs.step(*held, grads)
        jax.block_until_ready(held)
        times.append((time.perf_counter() - start) / TIMED_STEPS)
    return {"step alone, ms": 1e3 * statistics.median(times[1:])}, seconds


def choose_steps(training, seconds) -> int:
    """Return the number of steps of each training; ``seconds`` has those of a chunk, for every training."""
    size = training.size
    chunks = int(SPARE * training.left() / sum(seconds))
    if chunks < 2:
        needed = (time.monotonic() - training.began + 2 * sum(seconds) / SPARE) / 60
        minutes = math.ceil(10 * needed) / 10
        raise SystemExit(f"train: {training.minutes:g} minutes are too short on this device; try --minutes {minutes:g}")
    steps = min(training.wanted, chunks * size.chunk)
    if steps < training.wanted:
        print(f"train: {steps} steps instead of {training.wanted}, to end in time", flush=True)
    return steps


@functools.cache
def initial_weights(size, seed):
    """Return the float32 parameters, in host memory."""
    return jax.device_get(jax.jit(lambda: model.create(size, seed)[1])())


def begin(training, side, seed):
    """Return the parameters and the state before the first step."""
    return jax.jit(side.init)(initial_weights(training.size, seed))


def train(training, name, seed, prepared, advance) -> dict | None:
    """Return the results of one training; None if the time ends before, and a checkpoint is kept."""
    size, steps, starts = training.size, training.result["steps"], training.starts(seed)
    folder = training.folder / hashlib.sha256(f"{name} {seed} {steps}".encode()).hexdigest()[:16]
    stretch = jnp.float32(size.steps / steps)
    save_seconds, saved = 0.0, time.monotonic()
    curve, seconds = np.full(len(starts), np.nan, np.float32), []
    if training.left() < prepared.seconds:
        return None
    with Checkpoint(folder) as checkpoint:
        done, (params, state, curve) = checkpoint.restore((*begin(training, prepared.side, seed), curve))
        curve = np.array(curve)
        if done:
            print(f"train: {name}, seed {seed}: goes on after step {done * size.chunk}", flush=True)
        advance(done * size.chunk)
        for chunk in range(done, len(starts)):
            over = training.left() < prepared.seconds + save_seconds
            if chunk > done and (over or time.monotonic() - saved > SAVE_SECONDS):
                start = time.monotonic()
                checkpoint.save(chunk, (params, state, curve))
                saved = time.monotonic()
                save_seconds = saved - start
            if over:
                return None
            start = time.perf_counter()
            params, state, loss = prepared.programs.train(params, state, training.train_text, starts[chunk], stretch)
            curve[chunk] = float(loss)
            seconds.append(time.perf_counter() - start)
            advance(size.chunk)
    final = float(evaluation(size)(params, training.test_text, training.evaluated))
    shutil.rmtree(folder, ignore_errors=True)
    rate = size.chunk * size.batch * size.context / statistics.median(seconds or [prepared.seconds])
    return {"loss": final, "curve": [float(f"{x:.5g}") for x in curve], "tokens a second": round(rate, 1)}
