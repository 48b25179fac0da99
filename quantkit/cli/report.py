"""quantkit report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .bars import open_bar
from .files import FIGURES, IMATRIX, MODEL, PAGE, RECIPE, Command, will_write
from .options import conversion, imatrix_of, layout_option, recipe_of, set_option

if TYPE_CHECKING:
    from quantkit.imatrix.matrix import Imatrix
    from quantkit.model.catalogue import Catalogue
    from quantkit.recipe.load import Recipe
    from quantkit.reporting.documents import Document


@click.command(cls=Command)
@click.argument("sources", metavar="SOURCE...", type=MODEL, nargs=-1, required=True)
@click.option("-o", "--output", type=PAGE, required=True, metavar="FILE", help="The page to make, .html.")
@click.option("--figures", type=FIGURES, metavar="DIR", help="Also write every figure to DIR, as SVG and PNG.")
@click.option(
    "-r", "--recipe", "recipes", multiple=True, type=RECIPE,
    help="Plan a model with it. Can be repeated: two are shown side by side.",
)  # fmt: skip
@set_option
@click.option(
    "--imatrix", type=IMATRIX, metavar="FILE", help="Importance matrix of the plans; it gets a section of its own."
)
@click.option(
    "--fit", metavar="GPUS", help="Mark in the ladder of recipes what fits on these GPUs, such as 24 or 2x80."
)
@click.option("--fit-ctx", type=click.IntRange(1, 1 << 24), default=8192, show_default=True, help="Context of --fit.")
@click.option(
    "--min-tokens", type=click.IntRange(1), default=100, show_default=True, metavar="N",
    help="Count the experts that saw fewer tokens.",
)  # fmt: skip
@layout_option
@click.option("--pre", metavar="NAME", help="tokenizer.ggml.pre, for a tokenizer that is not recognized.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("-q", "--quiet", is_flag=True, help="No progress; errors only.")
def report(
    sources: tuple[str, ...],
    output: Path,
    figures: Path | None,
    recipes: tuple[str, ...],
    sets: tuple[str, ...],
    imatrix: str | None,
    fit: str | None,
    fit_ctx: int,
    min_tokens: int,
    layout: str,
    pre: str | None,
    force: bool,
    quiet: bool,
) -> None:
    """Draw plans, files and measurements as one page of HTML that opens offline.

    SOURCE is a GGUF, an importance matrix, the results of `quantkit ablate`, a sensitivity, what `plan`, `eval`,
    `optimize`, `which`, `recipe diff` and others print with --json, or a model (a name, config.json or checkpoint) with
    --recipe. With a plan, an importance matrix and a sensitivity on one page, each tensor shows its tokens and its
    error too.

    \b
    quantkit report deepseek-r1 --recipe UD-IQ1_S --fit 2x80 -o r1.html
    quantkit report deepseek-r1 --recipe UD-IQ1_S --recipe UD-IQ1_M -o two.html
    quantkit report R1-UD-IQ1_S-00001-of-00003.gguf imatrix.gguf study.db -o all.html --figures figures/
    """
    from quantkit.planning.gpus import parse_gpus
    from quantkit.reporting import documents
    from quantkit.reporting.sections import Asked, sections_of
    from quantkit.reporting.write import check_drawable, write

    check_drawable()
    if fit is not None:
        try:
            parse_gpus(fit)
        except ValueError as e:
            raise click.UsageError(f"--fit {e}") from None
    rules = [recipe_of(name, sets) for name in recipes]
    weights = imatrix_of(imatrix)
    opened: list[tuple[str, Catalogue]] = []
    found: list[Document] = []
    with ExitStack() as stack:
        bars: list[Any] = []

        def progress(n: int) -> None:
            """A bar, once there is something to wait for."""
            bars[:] = bars or [stack.enter_context(open_bar(0, "B", quiet))]
            bars[0].update(n)

        for source in (*sources, *([imatrix] if imatrix is not None and imatrix not in sources else [])):
            document = documents.read(source, min_tokens, progress)
            if document is None:
                opened.append((source, _open(source, layout, pre)))
            else:
                found.append(document)
    found = [*_models(opened, rules, weights), *found]
    sections = sections_of(found, None if fit is None else Asked(fit, fit_ctx))
    made = write(documents.names(found), sections, output, figures, force, will_write)
    if not quiet:
        click.echo(f"{output}: {made.n_figures} figures, {made.nbytes:,} bytes")
        if figures is not None:
            click.echo(f"{figures}: {len(made.files)} files")


def _open(source: str, layout: str, pre: str | None) -> Catalogue:
    """A model, whose tokenizer need not be known: no picture shows it."""
    from quantkit.model.open import open_model

    options = conversion(layout, pre or "(not recognized)", None)._replace(recognize=pre is None, any_kind=True)
    return open_model(source, options)


def _models(
    opened: Sequence[tuple[str, Catalogue]], rules: Sequence[Recipe], weights: Imatrix | None
) -> Iterator[Document]:
    """Plans of the models that are no GGUFs, or else of the only GGUF; GGUFs as they are; the size table of the first
    that is planned. Raises UsageError for a model or a recipe with nothing to go with it."""
    from quantkit.planning.plan import Plan, make_plan, with_values
    from quantkit.reporting import documents

    to_plan = [(name, c) for name, c in opened if not documents.is_stored(c)]
    if to_plan and not rules:
        raise click.UsageError(f"{to_plan[0][0]} is not a GGUF, so --recipe must say which types it gets")
    ggufs = [(name, c) for name, c in opened if documents.is_stored(c)]
    if rules and not to_plan:
        if len(ggufs) != 1:
            raise click.UsageError("--recipe needs a model to plan: its name, config.json, checkpoint, or one GGUF")
        to_plan = ggufs
    for name, catalogue in ggufs:
        yield documents.of_gguf(catalogue, name)
    for i, (name, catalogue) in enumerate(to_plan):
        plans: list[Plan] = []
        for recipe in rules:
            made = make_plan(catalogue, recipe, weights)
            plans.append(made if weights is None else with_values(made, weights))
        if len(plans) == 2:
            yield documents.of_difference(plans[0], plans[1])
        for plan in plans:
            yield documents.of_plan(plan, f"{Path(name).name or name} as {plan.recipe.name}")
        if i == 0:
            yield documents.of_sizes(catalogue)
