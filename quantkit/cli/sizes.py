"""quantkit sizes: update, check, table."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from .changes import change_options, changes, say_partial
from .files import LOCK, LOCK_OUT, MODEL, RECIPES, REPORT, Group, will_write
from .options import layout_option, mixture_version_option, only_types, recipe_of, set_option, tokenizer_options

if TYPE_CHECKING:
    from fractions import Fraction
    from pathlib import Path

    from quantkit.authoring.sizes.lock import Lock

    _FractionParam = click.ParamType[Fraction]
else:
    _FractionParam = click.ParamType  # generic in newer releases only


class Percent(_FractionParam):
    """0.1% (or 0.1) as a share."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        import re
        from fractions import Fraction

        if isinstance(value, Fraction):
            return value
        m = re.fullmatch(r"(\d{1,3}(?:\.\d{1,12})?)\s*%?", str(value).strip())
        if m is None or Fraction(m[1]) > 100:
            self.fail(f"{value!r} is not a percentage from 0 to 100, such as 0.1%", param, ctx)
        return Fraction(m[1]) / 100


_LAYOUTS = click.Choice(["k_b+v_b", "kv_b"])


@click.group(cls=Group)
def sizes() -> None:
    """Lock the sizes of recipes, find what moved them, and print a model's size table.

    \b
    quantkit sizes table deepseek-r1
    quantkit sizes update -r all -m deepseek-r1
    quantkit sizes check --tolerance 0.1%
    """


@sizes.command()
@click.argument("file", required=False, type=LOCK_OUT)
@click.option(
    "-r",
    "--recipe",
    "recipes",
    type=RECIPES,
    multiple=True,
    help="Shipped recipe, glob of them, `all`, or path of a YAML file.",
)
@click.option(
    "-m", "--model", "models", type=MODEL, multiple=True, help="Known model, `all`, config.json, checkpoint or GGUF."
)
@click.option("--layout", "layouts", multiple=True, type=_LAYOUTS, help="MLA layouts.  [default: both]")
@click.option("--force", is_flag=True, help="Replace FILE even if it is no sizes lock.")
def update(
    file: Path | None, recipes: tuple[str, ...], models: tuple[str, ...], layouts: tuple[str, ...], force: bool
) -> None:
    """Write the lock: the sizes of every recipe on every model it is for.

    FILE is quantkit-sizes.yaml unless given (JSON, when its name ends in .json). What -r, -m or --layout do not
    say is as in the file, or, where there is none, all shipped recipes on deepseek-r1 in both layouts. The file
    keeps the names as given, so a new recipe that `all` or a glob takes in is a drift until the next update.

    \b
    quantkit sizes update
    quantkit sizes update quantkit-sizes.yaml -r 'UD-*' -r recipes/mine.yaml -m deepseek-r1 -m deepseek-v2
    """
    from quantkit.authoring.sizes import compare, lock, report

    path = file if file is not None else compare.default_lock()
    old = _old_lock(path, needed=not (recipes and models))
    was = old.matrix if old is not None else lock.Matrix(recipes=["all"], models=["deepseek-r1"])
    matrix = lock.Matrix(
        recipes=[compare.relative_recipe(r, path.parent) for r in recipes] or was.recipes,
        models=[compare.relative_model(m, path.parent) for m in models] or was.models,
        layouts=list(layouts) or was.layouts,
    )
    new = compare.make_lock(matrix, path.parent)
    lock.write(new, path)
    for cell in new.cells:
        if cell.error is not None:
            click.echo(f"warning: {cell.cell} cannot be planned, and is locked so: {cell.error}", err=True)
    before = None if old is None else {c.cell: c for c in old.cells}
    click.echo(report.updated(path, before, {c.cell: c for c in new.cells}))


def _old_lock(path: Path, needed: bool) -> Lock | None:
    """The lock that is there; a damaged one is an error only where its matrix is needed."""
    from quantkit.authoring.sizes.lock import read_lock
    from quantkit.base.errors import SourceError

    if not path.exists():
        return None
    try:
        return read_lock(path)
    except SourceError:
        if needed:
            raise
        return None


@sizes.command()
@click.argument("file", required=False, type=LOCK)
@click.option(
    "--tolerance",
    type=Percent(),
    default="0",
    metavar="N%",
    help="Let the tensor bytes of a recipe on a model move by so much.  [default: 0, nothing may change]",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "markdown", "github", "junit"]),
    default="text",
    show_default=True,
    help="github: workflow commands, and the Markdown in $GITHUB_STEP_SUMMARY.",
)
@click.option("-o", "--output", type=REPORT, metavar="REPORT", help="Write the report to a file; print the text.")
@click.option("--force", is_flag=True, help="Replace REPORT if it exists.")
def check(file: str | None, tolerance: Fraction, form: str, output: Path | None, force: bool) -> None:
    """Compare sizes with the lock; exit 1 when any moved, and say by how much and by which rule.

    Where a recipe, a model or the lock cannot be read, the report says so, and the exit status is that error's.

    \b
    quantkit sizes check
    quantkit sizes check quantkit-sizes.yaml --tolerance 0.1% --format junit -o sizes.xml
    """
    import os
    from datetime import datetime, timezone
    from pathlib import Path

    from quantkit.authoring.sizes import compare, lock, report
    from quantkit.base import outputs
    from quantkit.base.errors import QuantkitError

    summary = os.environ.get("GITHUB_STEP_SUMMARY") if form == "github" else None
    if summary:  # which is appended to
        will_write(outputs.Output(Path(summary), "$GITHUB_STEP_SUMMARY", only_compared=True))
    path = Path(file) if file is not None else compare.default_lock()
    unreadable: QuantkitError | None = None
    try:
        found = compare.compare(lock.read_lock(path), path, tolerance)
    except QuantkitError as e:
        if form == "text" and output is None:
            raise
        unreadable, found = e, compare.unreadable(path, tolerance, e)
    when = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    text = report.render(found, form, when)
    if output is not None:
        outputs.write_text(output, text + "\n", force)
        text = report.text(found)
    click.echo(text)
    if summary:
        try:
            with open(summary, "a", encoding="utf-8") as f:
                f.write(report.markdown(found) + "\n")
        except OSError as e:
            click.echo(f"warning: {summary}: the summary cannot be written: {e.strerror or e}", err=True)
    if unreadable is not None:
        raise unreadable
    if found.broken:
        first = found.broken[0]
        more = f" (and {len(found.broken) - 1} more)" if len(found.broken) > 1 else ""
        raise type(first.error)(f"{first.what}{more} cannot be read: see the report")
    if found.drifted:
        sys.exit(1)


@sizes.command(name="table")
@click.argument("model", type=MODEL)
@click.option(
    "-r",
    "--recipe",
    "recipes",
    type=RECIPES,
    multiple=True,
    help="Shipped recipe, glob, or path.  [default: all shipped]",
)
@set_option
@change_options
@mixture_version_option
@layout_option
@tokenizer_options
@click.option(
    "--format", "form", type=click.Choice(["text", "markdown", "json"]), default="text", show_default=True, help="Form."
)
def table_(
    model: str,
    recipes: tuple[str, ...],
    sets: tuple[str, ...],
    mixture_version: str,
    layout: str,
    pre: str | None,
    pad_token: str | None,
    form: str,
) -> None:
    """Print the size table of a model: recipes by size, with bits a weight.

    \b
    quantkit sizes table deepseek-r1 --layout kv_b
    quantkit sizes table deepseek-r1 -r 'UD-*' --format markdown
    """
    from pathlib import Path

    from quantkit.authoring.sizes import compare, report
    from quantkit.model.open import open_model

    if (sets or changes()) and not recipes:
        raise click.UsageError("--set, --type and the like need --recipe: say which recipes they change")
    catalogue = open_model(model, only_types(layout, pre, pad_token))
    say_partial(catalogue)
    names = compare.expand_recipes(recipes or ("all",), Path())
    if changes().name is not None and len(names) > 1:
        raise click.UsageError(f"--name is for one recipe, and these are {len(names)}")
    loaded = [(name, recipe_of(name, sets)) for name in names]
    named = [(recipe.name if changes() else name, recipe) for name, recipe in loaded]
    rows, notes = compare.size_table(catalogue, named, mixture_version)
    click.echo(report.size_table(catalogue.model, catalogue.layout, rows, notes, form))
