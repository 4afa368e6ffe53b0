"""A benchmark that ends within its time and writes its results as it goes, and the machine that it runs on."""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import threading
import time
from pathlib import Path

import jax
import numpy
import optax

import jadam

PACKAGES = (
    *("jax", "jaxlib", "optax", "numpy", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc", "torch", "bitsandbytes", "flashoptim-jax"),
    *("flax", "orbax-checkpoint", "tokenizers"),
)
MARGIN = 0.04  # of the time, for the plot and for what cannot be interrupted


class TimedRun:
    """The results so far, their file, and the time left.

    Args:
        name: of the benchmark, for messages.
        out: the results file; its folder is created.
        minutes: the watchdog, once started, ends the process after this time.
    """

    def __init__(self, name: str, out: Path, minutes: float):
        if not 0 < minutes < math.inf:
            raise SystemExit(f"{name}: --minutes must be > 0 and finite, got {minutes:g}")
        if out.suffix != ".json" or out.is_dir():
            raise SystemExit(f"{name}: --out must be a .json file, got {out}")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{name}: --out: cannot write {out}: {error.strerror}") from None
        self.name, self.out, self.minutes = name, out, minutes
        self.seconds = 60 * minutes * (1 - MARGIN)
        self.end = time.monotonic() + self.seconds
        self.watchdog = threading.Timer(60 * minutes, self.stop)
        self.watchdog.daemon = True
        self.result: dict = {}
        self.failed: list[str] = []
        self.left_out: list[str] = []
        self.written = False

    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def write(self) -> None:
        """Replaces the results file."""
        new = self.out.with_suffix(".new")
        new.write_text(json.dumps({**self.result, "left out": self.left_out}, indent=1) + "\n")
        new.replace(self.out)
        self.written = True

    def stop(self) -> None:
        """Ends the process: something took longer than expected, and cannot be interrupted."""
        written = f"see {self.out}" if self.written else "nothing was finished; try a larger --minutes"
        print(f"{self.name}: stopped after {self.minutes:g} minutes; {written}", flush=True)
        os._exit(1 if self.failed or not self.written else 0)

    def error(self, what: str, error: BaseException) -> None:
        """Prints and records what failed."""
        print(f"{self.name}: {what} failed: {first_line(error)}", flush=True)
        self.result.setdefault("errors", {})[what] = first_line(error)

    def missing(self, what: str, error: ImportError) -> None:
        """Prints once that a package is not installed."""
        known = self.result.setdefault("not installed", {})
        if what not in known:
            known[what] = first_line(error)
            print(f"{self.name}: {what} left out: {first_line(error)}", flush=True)


def machine() -> dict:
    """Date, machine and versions, for the results file."""
    info = Path("/proc/cpuinfo")
    names = [line for line in (info.read_text() if info.exists() else "").splitlines() if line.startswith("model name")]
    cpu = names[0].split(":")[1].strip() if names else platform.processor()
    packages = {module.__name__: module.__version__ for module in (jax, optax, numpy, jadam)}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {cpu}, {jax.default_backend()}",
        "python": platform.python_version(),
        **packages,
    }


def describe_machine(device) -> dict:
    """Return the facts of `machine`, the device, its driver, and the versions and kernels in use."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        **machine(),
        "card": device.device_kind,
        "driver": driver() if device.platform == "gpu" else None,
        "platform": " ".join(str(getattr(device.client, "platform_version", "")).split()),
        "versions": versions,
        "kernels": {name: backend.kernel or "XLA" for name, backend in jadam.backends().items()},
    }


def driver() -> str:
    """What nvidia-smi says of the driver, clocks and power limit; or why it says nothing."""
    query = "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return "; ".join(done.stdout.split("\n")).strip("; ")
    except (OSError, subprocess.SubprocessError) as error:
        return first_line(error)


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:300]


def card_name(device) -> str:
    """The device's kind, as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()).strip("-") or "unknown"


def print_table(title, header, rows) -> None:
    """Prints a table, by rich if it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        print(f"\n{title}")
        for row in (header, *rows):
            print("  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)))
        return
    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)
