"""quantkit recipe: list, show, lint, explain, diff, new, schema; from-gguf, import and export are in transfer.py."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import transfer
from .changes import change_options, changes, own_change_options, say_partial, say_warnings
from .files import IMATRIX, MODEL, PAGE, RECIPE, RECIPE_OUT, Group
from .ggufs import gguf_of, title
from .options import (
    imatrix_of,
    imatrix_policy_option,
    json_option,
    layout_option,
    mixture_version_option,
    only_types,
    recipe_of,
    set_option,
    tokenizer_options,
)

if TYPE_CHECKING:
    from quantkit.imatrix.policies import Policy
    from quantkit.model.catalogue import Catalogue
    from quantkit.model.families.options import Options
    from quantkit.planning.plan import Plan
    from quantkit.recipe.load import Recipe

_MODEL_HELP = "The model to plan it for: a name, config.json, checkpoint or GGUF.  [default: one of the recipe's arch]"
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
    from quantkit.recipe.load import load
    from quantkit.recipe.named import shipped

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
@own_change_options
def show(name: str, resolved: bool, sets: tuple[str, ...]) -> None:
    """Print a recipe, by name or path.

    \b
    quantkit recipe show UD-IQ1_S
    quantkit recipe show mine.yaml --resolved --set down=Q2_K
    quantkit recipe show UD-IQ1_S --type output.weight=Q8_0 --name mine > mine.yaml
    """
    from quantkit.recipe import docs
    from quantkit.recipe.named import text_of

    made = recipe_of(name, sets)
    click.echo(docs.resolved(made) if resolved or sets or changes() else text_of(name), nl=False)


@recipe.command()
@click.argument("names", metavar="RECIPE...", type=RECIPE, nargs=-1, required=True)
@click.option("-m", "--model", "models", type=MODEL, metavar="SOURCE", multiple=True, help=_MODEL_HELP)
@layout_option
@tokenizer_options
@mixture_version_option
@set_option
@click.option("--strict", is_flag=True, help="Exit with 1 when there are only warnings.")
@click.option(
    "--only-recipes",
    is_flag=True,
    help="Skip files that are not recipes, for example among all YAML files of a project.",
)
@json_option
def lint(
    names: tuple[str, ...],
    models: tuple[str, ...],
    layout: str,
    pre: str | None,
    pad_token: str | None,
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
    from quantkit.recipe.load import parse_sets
    from quantkit.recipe.named import is_recipe

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
                opened[model] = _open(model, only_types(layout, pre, pad_token), named=bool(models))
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
@tokenizer_options
@mixture_version_option
@set_option
@change_options
@click.option("--imatrix", type=IMATRIX, metavar="FILE", help="Importance matrix, to say whether it has an entry.")
@imatrix_policy_option
@json_option
def explain(
    name: str,
    tensor: str,
    model: str | None,
    layout: str,
    pre: str | None,
    pad_token: str | None,
    mixture_version: str,
    sets: tuple[str, ...],
    imatrix: str | None,
    policy: Policy | None,
    as_json: bool,
) -> None:
    """Walk the rules for one tensor: which fired, which did not and why, and what the shape made of it.

    \b
    quantkit recipe explain UD-IQ1_S blk.3.ffn_down_exps.weight
    quantkit recipe explain Q4_K_M blk.0.attn_k_b.weight --model deepseek-v2-lite
    """
    from quantkit.authoring import report, review
    from quantkit.planning.plan import make_plan, with_values

    rules, weights = recipe_of(name, sets), imatrix_of(imatrix, policy)
    options = only_types(layout, pre, pad_token)
    described = _open(model or _references(rules)[0], options, named=model is not None)
    plan = make_plan(described, rules, weights, mixture_version, policy)
    made = review.explain(plan, tensor)
    click.echo(json.dumps(made.to_json(), indent=1, ensure_ascii=False) if as_json else report.explanation_text(made))
    if weights is not None:  # a build would be refused for another tensor, perhaps
        with_values(plan, weights)


@recipe.command()
@click.argument("before", metavar="A", type=RECIPE)
@click.argument("after", metavar="[B]", type=RECIPE, required=False)
@_model_option
@layout_option
@tokenizer_options
@mixture_version_option
@set_option
@change_options
@click.option("--all", "every_tensor", is_flag=True, help="A line for each tensor instead of each kind.")
@click.option("--report", "page", type=PAGE, metavar="FILE", help="Draw both side by side, as a page of HTML.")
@click.option("--force", is_flag=True, help="Replace the page if it exists.")
@json_option
def diff(
    before: str,
    after: str | None,
    model: str | None,
    layout: str,
    pre: str | None,
    pad_token: str | None,
    mixture_version: str,
    sets: tuple[str, ...],
    every_tensor: bool,
    page: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compare two recipes, or the types of GGUFs: tensors that differ, bytes, BPW, by role.

    A and B are recipes or GGUFs (of a split one the first shard; elsewhere: hf://org/repo/file.gguf). --set, --type and
    the like change B; without a B they change A, and the two are compared. A recipe is planned on the GGUF beside it.

    \b
    quantkit recipe diff UD-IQ1_S UD-IQ1_M
    quantkit recipe diff UD-IQ1_S --type 'blk.*.attn_output.weight=Q5_K'
    quantkit recipe diff UD-IQ1_S R1-UD-IQ1_S-00001-of-00003.gguf
    quantkit recipe diff UD-IQ1_S UD-IQ1_M --report two.html
    quantkit recipe diff Q4_K_M mine.yaml --model deepseek-v2-lite --json | jq .bytes
    """
    from quantkit.authoring import report, review
    from quantkit.authoring.stored import require_same_tensors, stored_plan
    from quantkit.planning.plan import make_plan

    from .terminal import width

    if after is None and not (sets or changes()):
        raise click.UsageError("what A is compared with is missing: give a second recipe or GGUF, or a change of A")
    options = only_types(layout, pre, pad_token)
    given = [before, before if after is None else after]
    files = [gguf_of(name) for name in given]
    if files[1] is not None and (sets or changes()):
        raise click.UsageError(f"--set, --type and the like change a recipe, and {given[1]} is a GGUF")
    recipes = [None if f else recipe_of(g, sets * i, i > 0) for i, (g, f) in enumerate(zip(given, files, strict=True))]
    stored = [None if f is None else _open(f, options, named=True) for f in files]
    models = [c for c in stored if c is not None]
    if model is not None or not models:
        named = model if model is not None else _references(next(r for r in recipes if r is not None))[0]
        models.insert(0, _open(named, options, named=model is not None))
    for other in models[1:]:
        require_same_tensors(models[0], other)
    titles = [title(f or "") for f in files]
    if titles[0] == titles[1]:
        titles = [f or "" for f in files]
    plans = []
    for name, rules, own in zip(titles, recipes, stored, strict=True):
        if own is not None:
            plans.append(stored_plan(own, name))
        elif rules is not None:
            plans.append(make_plan(models[0], rules, None, mixture_version))
    say_warnings(plans[1])
    made = review.diff(*plans)
    if page is not None:
        _draw(plans, page, force)
    if as_json:
        click.echo(json.dumps(made.to_json(), indent=1, ensure_ascii=False))
    else:
        click.echo(report.difference_text(made, every_tensor, width()))


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


def _draw(plans: Sequence[Plan], page: Path, force: bool) -> None:
    """The page of `quantkit report` with two recipes."""
    from quantkit.reporting import documents
    from quantkit.reporting.sections import sections_of
    from quantkit.reporting.write import check_drawable, write

    check_drawable()
    found = [documents.of_difference(*plans), *(documents.of_plan(p, p.recipe.name) for p in plans)]
    write(documents.names(found), sections_of(found), page, None, force)


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


def _open(model: str, options: Options, named: bool) -> Catalogue:
    """The model that was named, or one that stands for its arch, whose layout nobody asked for."""
    from quantkit.model.open import open_model

    opened = open_model(model, options if named else options._replace(layout_given=False))
    say_partial(opened)
    return opened
