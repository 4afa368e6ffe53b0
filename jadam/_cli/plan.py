"""``jadam plan``: memory per device for training a model on a mesh."""

from collections.abc import Mapping
from pathlib import Path

from jadam._cli.output import CommandError, check_picture, save_picture
from jadam._cli.shapes import read_shapes
from jadam._diagnostics.describe import table
from jadam._diagnostics.plan import CONFIGURATIONS, PARTS, cast_shapes, count_devices, draw, plan, shapes_of, unit_of

# Temporaries of `jadam.step` over the bytes that it gathers, at most, on a TPU v5e: `python -m benchmarks aot`.
TEMPORARIES_PER_GATHERED_BYTE = 1.6
DEFAULT_OUT = Path("jadam-plan.png")


def run(
    model: str,
    mesh: Mapping[str, int],
    shapes: str | None = None,
    axis: str | None = None,
    params_axis: tuple[str, ...] | None = None,
    memory: float | None = None,
    out: Path | None = None,
) -> None:
    """Plan a model in every format; print a table and save a plot, the latter if there is matplotlib or an ``out``."""
    missing = None
    try:
        check_picture(out or DEFAULT_OUT)
    except ModuleNotFoundError as error:
        missing = f"{str(error.name).partition('.')[0]} is not installed; run: pip install matplotlib"
        if out is not None:
            raise CommandError(f"--out: {missing}") from None
    axis = axis if axis is not None else next((x for x in ("data", "fsdp") if x in mesh), next(iter(mesh)))
    params_axis = params_axis if params_axis is not None else ("fsdp",) if "fsdp" in mesh else None
    for flag, names in (("--axis", [axis]), ("--params-axis", params_axis or [])):
        for name in names:
            if name not in mesh:
                raise CommandError(f"{flag} must be an axis of --mesh ({', '.join(mesh)}), got {name!r}")
    tree, name = (shapes_of(model), model) if shapes is None else (read_shapes(shapes), shapes)
    try:
        plans = {
            name: plan(tx, cast_shapes(tree, dtype), mesh, axis, params_axis)
            for name, (dtype, tx) in CONFIGURATIONS.items()
        }
    except (ValueError, TypeError) as error:
        raise CommandError(f"--mesh: {error}" if shapes is None else f"--shapes, --mesh: {error}") from None
    first = next(iter(plans.values()))
    unit, size = unit_of(max(x.total for x in plans.values()))
    axes = ", ".join(f"{name}={n}" for name, n in mesh.items())
    title = f"{name} with AdamW: {first.num_parameters:,} parameters on {count_devices(first.devices)} ({axes})"
    rows = [["format", "weights", *PARTS[1:-1], "total", "bytes/param"]]
    for name, x in plans.items():
        cells = [f"{getattr(x, part) / size:.2f}" for part in (*PARTS[:-1], "total")]
        rows.append([name, *cells, f"{x.state * first.devices / x.num_parameters:.2f}"])
    notes = [f"{name}: {path}: {note}" for name, x in plans.items() for path, note in x.notes.items()]
    temporaries = {name: TEMPORARIES_PER_GATHERED_BYTE * x.gathered for name, x in plans.items()}
    most = max(temporaries.values()) / size
    more = f"up to {most:.2f} {unit}, as it gathers weights" if most else "none, where it is one pass"
    notes.append(f"Temporaries of jadam.step itself: {more}")
    if memory is not None:
        fits = [name for name, x in plans.items() if x.total + temporaries[name] <= memory * 2**30]
        notes.append(f"Fit into {memory:g} GiB, besides activations: {', '.join(fits) or 'none'}")
    units = f"{unit} per device; bytes/param is of the optimizer's state"
    print(title, units, "", table(rows), "", *notes, sep="\n", flush=True)
    if missing is None:
        save_picture(draw(plans, title), out or DEFAULT_OUT)
        print(f"Plot saved to {out or DEFAULT_OUT}", flush=True)
    else:
        print(f"No plot written: {missing}", flush=True)
