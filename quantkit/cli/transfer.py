"""quantkit recipe from-gguf, import and export: recipes from and to the outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .changes import change_options, say_warnings
from .files import MODEL, RECIPE, RECIPE_OUT, RULES, Command
from .options import layout_option, mixture_version_option, only_types, recipe_of, set_option, tokenizer_options

_FORMATS = ("tensor-types", "custom-q", "thireus")
_MAX_BYTES = 1 << 22

_form = click.option("--format", "form", type=click.Choice(_FORMATS), required=True, help="The other tool's format.")
_model = click.option(
    "-m",
    "--model",
    type=MODEL,
    required=True,
    metavar="MODEL",
    help="Any SOURCE of `quantkit plan`; only its headers are read.",
)
_output = click.option(
    "-o", "--output", type=RECIPE_OUT, metavar="FILE", help="Write to a file, not to standard output."
)
_force = click.option("--force", is_flag=True, help="Replace the file if it exists.")


@click.command(cls=Command, name="from-gguf")
@click.argument("source", type=MODEL)
@_output
@click.option("--name", metavar="NAME", help="The recipe's name; else the file's.")
@_force
@click.option("--json", "as_json", is_flag=True, help="Recipe, notes and round trip as JSON on standard output.")
def from_gguf(source: str, output: Path | None, name: str | None, force: bool, as_json: bool) -> None:
    """Write the recipe of a GGUF's own types, and prove that it gives them back.

    SOURCE is a GGUF (the first shard of a split one), or one elsewhere: hf://org/repo/file.gguf[@revision] or
    https://…; of those only the headers are fetched.

    \b
    quantkit recipe from-gguf R1-UD-IQ1_S-00001-of-00003.gguf -o my.yaml
    quantkit recipe from-gguf hf://unsloth/DeepSeek-R1-GGUF/DeepSeek-R1-UD-IQ1_S/DeepSeek-R1-UD-IQ1_S-00001-of-00003.gguf
    """
    from quantkit.authoring.clone import clone
    from quantkit.model.hub import gguf_headers
    from quantkit.model.open import commit_note, from_gguf
    from quantkit.model.sources.gguf_file import open_as_far
    from quantkit.model.sources.remote import is_remote

    file = gguf_headers(source) if is_remote(source) else open_as_far(Path(source))
    made = clone(from_gguf(file), source, file.stem, name)
    proof = {"tensors": made.proof.n_tensors, "bytes": made.proof.nbytes, "equal": True}
    notes = [*made.notes, *commit_note(file)]
    at = {"commit": file.commit} if file.commit else {}
    _give(made.text, output, force, [*(f"note: {n}" for n in notes), str(made.proof)], as_json,
          {"notes": notes, "round_trip": proof, **at})  # fmt: skip


@click.command(cls=Command, name="import")
@click.argument("file", type=RULES)
@_form
@_model
@layout_option
@tokenizer_options
@click.option(
    "--file-type", metavar="NAME", help="What llama-quantize is given as its type, for tensors no rule names."
)
@click.option("--with-imatrix", is_flag=True, help="That type's mixture is the one of a run with an importance matrix.")
@click.option(
    "--map", "maps", multiple=True, metavar="TYPE=TYPE", help="Read a type that ggml does not have as another."
)
@click.option("--name", metavar="NAME", help="The recipe's name; else the file's.")
@_output
@_force
@click.option("--json", "as_json", is_flag=True, help="Recipe, notes and round trip as JSON on standard output.")
def import_(
    file: Path,
    form: str,
    model: str,
    layout: str,
    pre: str | None,
    pad_token: str | None,
    file_type: str | None,
    with_imatrix: bool,
    maps: tuple[str, ...],
    name: str | None,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write another tool's rules as a recipe: the types they give the tensors of a model.

    \b
    quantkit recipe import types.txt --format tensor-types --model deepseek-r1 --file-type Q4_K_M
    quantkit recipe import R1.recipe --format thireus --model deepseek-r1 --map iq4_ks=IQ4_XS -o R1.yaml
    """
    from quantkit.authoring.clone import slug
    from quantkit.authoring.interchange import import_rules
    from quantkit.base.errors import RecipeError, did_you_mean
    from quantkit.base.files import text_within
    from quantkit.gguf.types import FILE_TYPES
    from quantkit.gguf.types import file_type as known_file_type
    from quantkit.model.open import open_model

    if file_type is not None and known_file_type(file_type) is None:
        raise click.BadParameter(f"unknown file type '{file_type}'{did_you_mean(file_type, FILE_TYPES)}")
    renamed = dict(_renaming(text) for text in maps)
    try:
        text = text_within(file, _MAX_BYTES)
    except OSError as e:
        raise RecipeError(f"{file}: cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise RecipeError(f"{file}: is not UTF-8 text: {e.reason} at byte {e.start}") from None
    if text is None:
        raise RecipeError(f"{file}: has more bytes than a list of rules may have ({_MAX_BYTES:,})")
    made = import_rules(
        text, form, open_model(model, only_types(layout, pre, pad_token)), name or slug(file.stem), file.name,
        known_file_type(file_type) if file_type else None, with_imatrix, renamed,
    )  # fmt: skip
    proof = {"tensors": made.proof.n_tensors, "bytes": made.proof.nbytes, "equal": True}
    said = [*(f"warning: {w}" for w in made.warnings), *(f"note: {n}" for n in made.notes), str(made.proof)]
    facts = {"warnings": made.warnings, "notes": made.notes, "round_trip": proof}
    _give(made.text, output, force, said, as_json, facts)


@click.command(cls=Command)
@click.argument("recipe", type=RECIPE)
@_form
@_model
@set_option
@change_options
@mixture_version_option
@layout_option
@tokenizer_options
@_output
@_force
def export(
    recipe: str,
    form: str,
    model: str,
    sets: tuple[str, ...],
    mixture_version: str,
    layout: str,
    pre: str | None,
    pad_token: str | None,
    output: Path | None,
    force: bool,
) -> None:
    """Write a recipe's types for one model in another tool's format: every tensor, by anchored rules.

    What the format cannot say goes to standard error.

    \b
    quantkit recipe export UD-IQ1_S --format tensor-types --model deepseek-r1 -o types.txt
    quantkit recipe export UD-IQ1_S --format custom-q --model deepseek-r1
    """
    from quantkit.authoring import interchange
    from quantkit.model.open import open_model
    from quantkit.planning.plan import make_plan

    model_ = open_model(model, only_types(layout, pre, pad_token))
    plan = make_plan(model_, recipe_of(recipe, sets), None, mixture_version)
    say_warnings(plan)
    made = interchange.export(plan, form)
    _give(made.text, output, force, [f"note: {n}" for n in made.notes], False, {})


def _renaming(text: str) -> tuple[str, str]:
    from quantkit.gguf.types import qtype

    before, _, after = text.partition("=")
    if not before or not after:
        raise click.BadParameter(f"'{text}' is not TYPE=TYPE, such as iq4_ks=IQ4_XS", param_hint="--map")
    return before, qtype(after).name


def _give(text: str, output: Path | None, force: bool, said: list[str], as_json: bool, facts: dict[str, Any]) -> None:
    """Print or write the text; what is said with it goes to standard error, unless it is part of the JSON."""
    from quantkit.base.outputs import write_text

    if output is not None:
        write_text(output, text, force)
    if as_json:
        click.echo(
            json.dumps({"recipe": text, "output": output and str(output), **facts}, indent=1, ensure_ascii=False)
        )
        return
    for line in said:
        click.echo(line, err=True)
    if output is None:
        click.echo(text, nl=False)
