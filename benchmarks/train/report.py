"""Table and picture of `benchmarks.train`."""

import statistics
from pathlib import Path

import numpy as np

from benchmarks.running import print_table
from benchmarks.train.sides import INT8, LEAN, REFERENCE

ENTROPY = "entropy of single tokens, nats"
STYLES = {  # Okabe & Ito's colour-blind-safe palette; the reference is a broad line, because others lie on it
    REFERENCE: ("#999999", "-", 5),
    LEAN: ("#0072b2", "-", 1.2),
    INT8: ("#56b4e9", "--", 1.2),
    "jadam, float32": ("#000000", "-.", 1),
    "Optax, bf16 weights": ("#d55e00", "-", 1.5),
    "jadam, bfloat16": ("#009e73", ":", 1.8),
    "flashoptim-jax, 8-bit": ("#e69f00", "--", 1.2),
}


def summarise(result) -> None:
    """Add to every side its losses relative to the reference, its tokens a second and the share of its optimizer.

    The share is the time of the optimizer's step alone divided by that of a training step.
    """
    reference = {seed: x["loss"] for seed, x in result["sides"].get(REFERENCE, {"runs": {}})["runs"].items()}
    tokens = result["size"]["batch"] * result["size"]["context"]
    for entry in result["sides"].values():
        runs = entry["runs"]
        if not runs:
            continue
        ratios = [x["loss"] / reference[seed] for seed, x in runs.items() if seed in reference]
        entry["over float32"] = [round(x, 5) for x in ratios]
        entry["mean over float32"] = round(statistics.fmean(ratios), 5) if ratios else None
        entry["tokens a second"] = statistics.median(x["tokens a second"] for x in runs.values())
        entry["optimizer's share"] = round(entry["step alone, ms"] * entry["tokens a second"] / tokens / 1e3, 4)
        entry["bytes per parameter"] = round(entry["weights and optimizer, bytes"] / entry["parameters"], 3)


def show(result, picture: Path) -> None:
    """Print the table and draw the picture."""
    trained = {name: result["sides"][name] for name in STYLES if result["sides"].get(name, {}).get("runs")}
    if not trained:
        return
    form = lambda value, text, unit=1: "-" if value is None else text.format(value / unit)
    rows = [
        [
            name,
            ", ".join(f"{x['loss']:.4f}" for x in entry["runs"].values()),
            form(entry["mean over float32"], "{:.4f}"),
            form(entry["bytes per parameter"], "{:.2f}"),
            form(entry["training, bytes by the compiler"], "{:,.0f}", 2**20),
            form(entry["peak on the device, bytes"], "{:,.0f}", 2**20),
            form(entry["tokens a second"], "{:,.0f}"),
            form(entry["optimizer's share"], "{:.1%}"),
        ]
        for name, entry in trained.items()
    ]
    header = ["", "loss", "over float32", "bytes/param", "MiB, compiler", "MiB, device", "tokens/s", "step share"]
    title = f"{result['card']}, {result['steps']} steps; entropy of single tokens {result[ENTROPY]:.4f}"
    print_table(title, header, rows)
    draw(result, trained, picture)


def draw(result, trained, picture: Path) -> None:
    """Draw the loss curves, and the bytes per parameter with the final loss."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    steps = result["size"]["chunk"] * np.arange(1, 1 + result["steps"] // result["size"]["chunk"])
    for name, entry in sorted(trained.items(), key=lambda x: -STYLES[x[0]][2]):
        color, line, width = STYLES[name]
        left.plot(steps, next(iter(entry["runs"].values()))["curve"], line, color=color, lw=width, label=name)
    left.set(xlabel="step", ylabel="training loss, nats a token")
    left.legend(frameon=False)
    names = list(trained)
    sizes = [entry["bytes per parameter"] for entry in trained.values()]
    right.barh(names, sizes, color=[STYLES[name][0] for name in names])
    for y, entry in enumerate(trained.values()):
        ratio = entry["mean over float32"]
        right.text(sizes[y], y, "" if ratio is None else f" loss {ratio:.3f}x", va="center")
    right.set(xlabel="bytes per parameter, weights and optimizer", xlim=(0, 1.25 * max(sizes)))
    right.invert_yaxis()
    what = f"{entry['parameters']:,} parameters, {result['steps']} steps of {result['size']['batch']} sequences"
    figure.suptitle(f"{what}; {result['card']}, {result['date']}, jax {result['jax']}")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
