"""``jadam plan``: what training a known model takes on each device of a mesh."""

from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jadam._cli.output import CommandError, check_picture, save_picture
from jadam._diagnostics.plan import FORMATS, GIB, PARTS, draw, plan, shapes_of


def run(model: str, mesh: Mapping[str, int], axis, params_axis, out: Path) -> None:
    """The plans of a model in every format, as a table on standard output and as a picture."""
    check_picture(out)
    progress = Console(stderr=True)
    formats = FORMATS.items()
    if progress.is_terminal:
        formats = track(formats, "planning", console=progress, transient=True)
    try:
        plans = {how: plan(tx, shapes_of(model, dtype), mesh, axis, params_axis) for how, (dtype, tx) in formats}
    except ValueError as error:  # axes that do not fit the mesh
        raise CommandError(error) from None
    first = next(iter(plans.values()))
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.items())
    title = f"{model}: {first.count:,} parameters on {first.devices} devices ({sizes})"
    title += "\nmoments' format; GiB on each; the state's bytes per parameter"
    rows = Table("AdamW", title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in ("weights", *PARTS[1:-1], "total", "state"):
        rows.add_column(name, justify="right")
    for how, x in plans.items():
        numbers = [f"{getattr(x, part) / GIB:.2f}" for part in (*PARTS[:-1], "total")]
        rows.add_row(how, *numbers, f"{x.state * first.devices / x.count:.2f}")
    console = Console()
    console.print(rows)
    for how, x in plans.items():
        for name, note in x.notes.items():
            console.print(f"{how}: {name}: {note}", markup=False, highlight=False)
    save_picture(draw(plans, title), out)
    console.print(f"drawn into {out}", markup=False)
