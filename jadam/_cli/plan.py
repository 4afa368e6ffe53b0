"""``jadam plan``: memory per device for training a well-known model on a mesh."""

from collections.abc import Mapping
from pathlib import Path

from jadam._cli.output import CommandError, check_picture, save_picture
from jadam._diagnostics.describe import table
from jadam._diagnostics.plan import CONFIGURATIONS, PARTS, draw, plan, shapes_of, unit_of

DEFAULT_OUT = Path("jadam-plan.png")


def run(
    model: str, mesh: Mapping[str, int], axis: str, out: Path | None = None, params_axis: str | None = None
) -> None:
    """Plan a model in every format; print a table and save a plot, the latter if there is matplotlib or an ``out``."""
    missing = None
    try:
        check_picture(out or DEFAULT_OUT)
    except ModuleNotFoundError as error:
        missing = f"{str(error.name).partition('.')[0]} is not installed; run: pip install matplotlib"
        if out is not None:
            raise CommandError(f"--out: {missing}") from None
    for flag, name in (("--axis", axis), ("--params-axis", params_axis)):
        if name not in (None, *mesh):
            raise CommandError(f"{flag} must be an axis of --mesh ({', '.join(mesh)}), got {name!r}")
    try:
        plans = {
            name: plan(tx, shapes_of(model, dtype), mesh, axis, params_axis)
            for name, (dtype, tx) in CONFIGURATIONS.items()
        }
    except ValueError as error:
        raise CommandError(f"--mesh: {error}") from None
    first = next(iter(plans.values()))
    unit, size = unit_of(max(x.total for x in plans.values()))
    axes = ", ".join(f"{name}={n}" for name, n in mesh.items())
    title = f"{model} with AdamW: {first.num_parameters:,} parameters on {first.devices} devices ({axes})"
    rows = [["format", "weights", *PARTS[1:-1], "total", "bytes/param"]]
    for name, x in plans.items():
        cells = [f"{getattr(x, part) / size:.2f}" for part in (*PARTS[:-1], "total")]
        rows.append([name, *cells, f"{x.state * first.devices / x.num_parameters:.2f}"])
    notes = [f"{name}: {path}: {note}" for name, x in plans.items() for path, note in x.notes.items()]
    units = f"{unit} per device; bytes/param is of the optimizer's state"
    print(title, units, "", table(rows), "", *notes, sep="\n", flush=True)
    if missing is None:
        save_picture(draw(plans, title), out or DEFAULT_OUT)
        print(f"Plot saved to {out or DEFAULT_OUT}", flush=True)
    else:
        print(f"No plot written: {missing}", flush=True)
