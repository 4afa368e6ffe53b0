"""``jadam plan``: memory per device for training a well-known model on a mesh."""

from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jadam._cli.output import CommandError, check_picture, save_picture
from jadam._diagnostics.plan import CONFIGURATIONS, PARTS, draw, plan, shapes_of, unit_of


def run(model: str, mesh: Mapping[str, int], axis: str, out: Path, params_axis: str | None = None) -> None:
    """Plan a model in every format; print a table and save a plot."""
    check_picture(out)
    for flag, name in (("--axis", axis), ("--params-axis", params_axis)):
        if name not in (None, *mesh):
            raise CommandError(f"{flag} must be an axis of --mesh ({', '.join(mesh)}), got {name!r}")
    progress = Console(stderr=True)
    formats = CONFIGURATIONS.items()
    if progress.is_terminal:  # rich before 14 prints an empty line even if it is disabled
        formats = track(formats, "planning", console=progress, transient=True)
    try:
        plans = {name: plan(tx, shapes_of(model, dtype), mesh, axis, params_axis) for name, (dtype, tx) in formats}
    except ValueError as error:
        raise CommandError(f"--mesh: {error}") from None
    first = next(iter(plans.values()))
    unit, size = unit_of(max(x.total for x in plans.values()))
    axes = ", ".join(f"{name}={n}" for name, n in mesh.items())
    title = f"{model} with AdamW: {first.num_parameters:,} parameters on {first.devices} devices ({axes})"
    units = f"{unit} per device; bytes/param is of the optimizer's state"
    table = Table("format", title=f"{title}\n{units}", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for heading in ("weights", *PARTS[1:-1], "total", "bytes/param"):
        table.add_column(heading, justify="right")
    for name, x in plans.items():
        cells = [f"{getattr(x, part) / size:.2f}" for part in (*PARTS[:-1], "total")]
        table.add_row(name, *cells, f"{x.state * first.devices / x.num_parameters:.2f}")
    console = Console()
    console.print(table)
    for name, x in plans.items():
        for path, note in x.notes.items():
            console.print(f"{name}: {path}: {note}", markup=False, highlight=False)
    save_picture(draw(plans, title), out)
    console.print(f"Plot saved to {out}", markup=False)
