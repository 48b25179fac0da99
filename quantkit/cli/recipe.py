"""quantkit recipe: list, show, lint, explain, diff, new, schema; from-gguf, import and export are in transfer.py."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import transfer
from .files import IMATRIX, MODEL, RECIPE, RECIPE_OUT, Group
from .options import conversion, imatrix_of, json_option, layout_option, mixture_version_option, recipe_of, set_option

if TYPE_CHECKING:
    from quantkit.model.catalogue import Catalogue
    from quantkit.recipe.load import Recipe

_MODEL_HELP = "The model to try it on: a name, config.json, checkpoint or GGUF.  [default: one of the recipe's arch]"
_model_option = click.option("-m", "--model", type=MODEL, metavar="SOURCE", help=_MODEL_HELP)
_LINT_WARNED = 1


@click.group(cls=Group)
def recipe() -> None:
    """Write recipes: find, check, explain, compare, clone, convert them.

    \b
    quantkit recipe list
    quantkit recipe new mine.yaml --base UD-IQ1_S
    quantkit recipe lint mine.yaml
    quantkit recipe explain UD-IQ1_S blk.3.ffn_down_exps.weight
    """


@recipe.command("list")
@json_option
def list_(as_json: bool) -> None:
    """Show the recipes that come with quantkit.

    \b
    quantkit recipe list
    quantkit recipe list --json | jq -r '.[].name'
    """
    from quantkit.authoring import report
    from quantkit.recipe.load import load, shipped

    every = [load(name) for name in shipped()]
    if as_json:
        rows = [
            {"name": r.name, "title": r.title, "arch": list(r.arch), "imatrix": r.imatrix, "rules": len(r.rules)}
            for r in every
        ]
        click.echo(json.dumps(rows, indent=1))
    else:
        click.echo(report.recipes_text(every))


@recipe.command()
@click.argument("name", metavar="RECIPE", type=RECIPE)
@click.option("--resolved", is_flag=True, help="With the base's rules in place and variables replaced.")
@set_option
def show(name: str, resolved: bool, sets: tuple[str, ...]) -> None:
    """Print a recipe, by name or path.

    \b
    quantkit recipe show UD-IQ1_S
    quantkit recipe show mine.yaml --resolved --set down=Q2_K
    """
    from quantkit.recipe import docs
    from quantkit.recipe.load import text_of

    made = recipe_of(name, sets)
    click.echo(docs.resolved(made) if resolved or sets else text_of(name), nl=False)


@recipe.command()
@click.argument("names", metavar="RECIPE...", type=RECIPE, nargs=-1, required=True)
@click.option("-m", "--model", "models", type=MODEL, metavar="SOURCE", multiple=True, help=_MODEL_HELP)
@layout_option
@mixture_version_option
@set_option
@click.option("--strict", is_flag=True, help="Exit with 1 when there are only warnings.")
@click.option(
    "--only-recipes", is_flag=True, help="Pass over files that are no recipes, as among all YAML of a project."
)
@json_option
def lint(
    names: tuple[str, ...],
    models: tuple[str, ...],
    layout: str,
    mixture_version: str,
    sets: tuple[str, ...],
    strict: bool,
    only_recipes: bool,
    as_json: bool,
) -> None:
    """Check recipes, by themselves and on a model of each arch they are for.

    Exits with 3 if there is an error; a warning alone exits with 0, or 1 with --strict.

    \b
    quantkit recipe lint mine.yaml
    quantkit recipe lint recipes/*.yaml --model deepseek-v2-lite --strict
    quantkit recipe lint --only-recipes $(git ls-files '*.yaml')
    """
    from quantkit.authoring.review import LintMessage
    from quantkit.authoring.review import lint as check
    from quantkit.base.errors import RecipeError
    from quantkit.recipe.load import is_recipe, parse_sets

    if only_recipes:
        given, names = names, tuple(name for name in names if not _is_yaml(name) or is_recipe(Path(name)))
        if len(names) < len(given):
            n = len(given) - len(names)
            click.echo(f"{n} file{'s are no recipes' if n != 1 else ' is no recipe'}, passed over", err=True)
    opened: dict[str, Catalogue] = {}
    values = parse_sets(sets)
    tried: list[str] = []

    def models_of(one: Recipe) -> list[Catalogue]:
        wanted = models or _references(one)
        tried[:] = wanted
        for model in wanted:
            if model not in opened:
                opened[model] = _open(model, layout, named=bool(models))
        return [opened[model] for model in wanted]

    found: list[LintMessage] = []
    for name in names:
        tried.clear()
        some = check(name, values, models_of, mixture_version)
        found += some
        if as_json:
            continue
        for f in some:
            click.echo(f"{f.severity}: {f.message}" + (f" [{f.model}]" if f.model and len(tried) > 1 else ""))
        if not some:
            click.echo(f"{name}: fine on {', '.join(tried)}" if tried else f"{name}: fine; no model to try it on")
    if as_json:
        click.echo(json.dumps([f._asdict() for f in found], indent=1, ensure_ascii=False))
    if any(f.severity == "error" for f in found):
        raise click.exceptions.Exit(RecipeError.exit_code)
    if found and strict:
        raise click.exceptions.Exit(_LINT_WARNED)


@recipe.command()
@click.argument("name", metavar="RECIPE", type=RECIPE)
@click.argument("tensor")
@_model_option
@layout_option
@mixture_version_option
@set_option
@click.option("--imatrix", type=IMATRIX, metavar="FILE", help="Importance matrix, to say whether it has an entry.")
@json_option
def explain(
    name: str,
    tensor: str,
    model: str | None,
    layout: str,
    mixture_version: str,
    sets: tuple[str, ...],
    imatrix: str | None,
    as_json: bool,
) -> None:
    """Walk the rules for one tensor: which fired, which did not and why, and what the shape made of it.

    \b
    quantkit recipe explain UD-IQ1_S blk.3.ffn_down_exps.weight
    quantkit recipe explain Q4_K_M blk.0.attn_k_b.weight --model deepseek-v2-lite
    """
    from quantkit.authoring import report, review
    from quantkit.planning.plan import make_plan, with_values

    rules, weights = recipe_of(name, sets), imatrix_of(imatrix)
    described = _open(model or _references(rules)[0], layout, named=model is not None)
    plan = make_plan(described, rules, weights, mixture_version)
    made = review.explain(plan, tensor)
    click.echo(json.dumps(made.to_json(), indent=1, ensure_ascii=False) if as_json else report.explanation_text(made))
    if weights is not None:  # a build would be refused for another tensor, perhaps
        with_values(plan, weights)


@recipe.command()
@click.argument("before", metavar="RECIPE_A", type=RECIPE)
@click.argument("after", metavar="RECIPE_B", type=RECIPE)
@_model_option
@layout_option
@mixture_version_option
@click.option("--all", "every_tensor", is_flag=True, help="A line for each tensor, not one for alike ones.")
@json_option
def diff(
    before: str,
    after: str,
    model: str | None,
    layout: str,
    mixture_version: str,
    every_tensor: bool,
    as_json: bool,
) -> None:
    """Compare two recipes on a model: which tensors, bytes, BPW, by role.

    \b
    quantkit recipe diff UD-IQ1_S UD-IQ1_M
    quantkit recipe diff Q4_K_M mine.yaml --model deepseek-v2-lite --json | jq .bytes
    """
    from quantkit.authoring import report, review
    from quantkit.planning.plan import make_plan

    a, b = recipe_of(before, ()), recipe_of(after, ())
    catalogue = _open(model or _references(a)[0], layout, named=model is not None)
    made = review.diff(make_plan(catalogue, a, None, mixture_version), make_plan(catalogue, b, None, mixture_version))
    if as_json:
        click.echo(json.dumps(made.to_json(), indent=1, ensure_ascii=False))
    else:
        click.echo(report.difference_text(made, every_tensor))


@recipe.command()
@click.argument("path", type=RECIPE_OUT)
@click.option(
    "--base",
    type=RECIPE,
    default="UD-IQ1_S",
    show_default=True,
    help="The recipe whose rules follow the new one's.",
)
@click.option("--from", "source", type=RECIPE, metavar="RECIPE", help="Copy this recipe's rules instead.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def new(path: Path, base: str, source: str | None, force: bool) -> None:
    """Write a recipe to start from.

    \b
    quantkit recipe new mine.yaml
    quantkit recipe new mine.yaml --from UD-Q2_K_XL
    """
    from quantkit.base.errors import OutputError
    from quantkit.base.outputs import write_text
    from quantkit.recipe import docs
    from quantkit.recipe.load import load, parse

    if path.suffix not in (".yaml", ".yml"):
        raise OutputError(f"{path}: a recipe's file ends in .yaml")
    text = docs.copy_of(source, path) if source is not None else docs.starter(path, base, _references(load(base))[0])
    parse(text, path.name, folder=path.parent)
    write_text(path, text, force)
    typed = f"./{path}" if str(path).startswith("-") else str(path)
    click.echo(f"{path} written; next: quantkit recipe lint {shlex.quote(typed)}")


@recipe.command()
@click.option("--format", "form", type=click.Choice(["json", "markdown"]), default="json", show_default=True)
def schema(form: str) -> None:
    """Print the JSON Schema of recipes, or the page that documents them.

    \b
    quantkit recipe schema > recipe.schema.json
    quantkit recipe schema --format markdown | less
    """
    from quantkit.recipe import docs

    text = json.dumps(docs.schema(), indent=1) + "\n" if form == "json" else docs.page()
    click.echo(text, nl=False)


for _command in (transfer.from_gguf, transfer.import_, transfer.export):
    recipe.add_command(_command)


def _is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _references(rules: Recipe) -> list[str]:
    """A known model of each arch a recipe is for."""
    from quantkit.base.errors import UnsupportedError
    from quantkit.model.families.known import REFERENCES

    known = [model for arch, model in REFERENCES.items() if rules.is_for(arch)]
    if not known:
        raise UnsupportedError(
            f"{rules.place('arch')}: no model of {', '.join(rules.arch)} is known by name; give one with --model"
        )
    return known


def _open(model: str, layout: str, named: bool) -> Catalogue:
    """The model that was named, or one that stands for its arch, whose layout nobody asked for."""
    from quantkit.model.open import open_model

    options = conversion(layout, None, None)._replace(pre="(not recognized)", recognize=True)
    return open_model(model, options if named else options._replace(layout_given=False))
