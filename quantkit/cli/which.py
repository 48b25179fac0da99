"""quantkit which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .files import MODEL, PATH, RECIPES, Command
from .memory_options import memory_options
from .options import Size, json_option, layout_option, mixture_version_option, only_types

if TYPE_CHECKING:
    from quantkit.authoring.which.candidates import Candidate, Memory
    from quantkit.authoring.which.choice import Machine
    from quantkit.authoring.which.quality import Measured, Quality
    from quantkit.gguf.quant_names import Published
    from quantkit.model.catalogue import Catalogue
    from quantkit.planning.gpus import Gpus

    _GpusParam = click.ParamType[Gpus]
else:
    _GpusParam = click.ParamType  # generic in newer releases only


class GpusOfOneMachine(_GpusParam):
    """24, 2x80, 4x3090 or 24+80."""

    name = "gpus"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Gpus:
        from quantkit.planning.gpus import Gpus, parse_gpus

        if isinstance(value, Gpus):
            return value
        if "," in str(value):
            self.fail(f"{value!r}: the answer is for one machine; GPUs of one are joined with +: 24+80", param, ctx)
        try:
            return parse_gpus(str(value))
        except ValueError as e:
            self.fail(str(e), param, ctx)


@click.command(cls=Command)
@click.argument("model", type=MODEL)
@click.option(
    "--vram", type=GpusOfOneMachine(), metavar="GPUS", help="GiB of the GPUs, or their name: 24, 2x80, 4x3090, 24+80."
)
@click.option("--ram", type=Size(bare=2**30, least=0), metavar="GIB", help="RAM for the model: 64, 64GB or 64GiB.")
@click.option(
    "--unified", type=Size(bare=2**30), metavar="GIB", help="Memory that CPU and GPU share, in place of these two."
)
@click.option(
    "-r", "--recipe", "recipes", multiple=True, type=RECIPES,
    help="Shipped recipe, glob of them, `all`, or path of a YAML file.  [default: shipped recipes that are a file]",
)  # fmt: skip
@click.option("--repo", metavar="ORG/REPO", help="The GGUFs that this repository of the Hub has, in place of recipes.")
@click.option(
    "--eval", "results", type=PATH, metavar="FILE", help="What `quantkit eval --json` measured, to be shown and used."
)
@memory_options
@mixture_version_option
@layout_option
@json_option
def which(
    model: str,
    vram: Gpus | None,
    ram: int | None,
    unified: int | None,
    recipes: tuple[str, ...],
    repo: str | None,
    results: Path | None,
    context: int,
    cache_type: str,
    reserve: int,
    mixture_version: str,
    layout: str,
    as_json: bool,
) -> None:
    """Say which quantization suits a machine: what fits, how much of it on the GPU, what quality is known, best first.

    MODEL is a known name, a config.json, a checkpoint or a GGUF, which is one of the answers itself. With --repo, the
    files that a repository of the Hub has are the answers; only its list of files is fetched. `quantkit fit` has all
    figures of one answer.

    \b
    quantkit which deepseek-r1 --vram 24 --ram 256
    quantkit which deepseek-r1 --vram 2x80 --ctx 32768 --cache-type q8_0
    quantkit which deepseek-r1 --unified 192 --json | jq .best
    quantkit which deepseek-r1 --vram 24+80 --ram 128 --repo unsloth/DeepSeek-R1-GGUF
    """
    import json

    from quantkit.authoring.which import candidates, choice, quality, report
    from quantkit.model.open import open_model

    from .terminal import width

    machine = _machine(vram, ram, unified, reserve)
    measured = None if results is None else quality.read_measured(results)
    listing = None if repo is None else _listing(repo)
    catalogue = open_model(model, only_types(layout, None, None))
    memory = candidates.Memory(context, cache_type)
    found, notes = _candidates(catalogue, model, _recipes(recipes, catalogue), mixture_version, memory)
    if listing is not None:
        name, files = listing
        found, more = candidates.of_repository(catalogue, name, files, found)
        notes += more
        if not found:
            raise _no_files(name, catalogue.model, more)
    if catalogue.commit:
        notes.append(f"{model} was read on the Hub at commit {catalogue.commit}")
    common = ["-c", str(context), *(() if cache_type == "f16" else ("-ctk", cache_type, "-ctv", cache_type))]
    placed = [choice.place(c, machine, common)._replace(quality=_quality(catalogue.model, c, measured)) for c in found]
    choices, rule = choice.ordered(placed, machine)
    made = report.Answer(
        catalogue.model, machine, memory, tuple(choices), rule, tuple(notes), "" if listing is None else listing[0]
    )
    if as_json:
        at = {"commit": catalogue.commit} if catalogue.commit else {}
        click.echo(json.dumps(report.which_json(made) | at, indent=1, ensure_ascii=False))
    else:
        click.echo(report.which_text(made, width()))


def _machine(vram: Gpus | None, ram: int | None, unified: int | None, reserve: int) -> Machine:
    from quantkit.authoring.which.choice import NO_GPUS, Machine

    if unified is not None and (vram is not None or ram is not None):
        raise click.UsageError("--unified is memory that CPU and GPU share: give it, or --vram and --ram")
    if vram is None and ram is None and unified is None:
        raise click.UsageError("say what there is: --vram 24, --ram 64, both, or --unified 128")
    return Machine(vram or NO_GPUS, ram, unified, reserve)


def _recipes(given: Sequence[str], catalogue: Catalogue) -> list[Any]:
    from quantkit.authoring.sizes.compare import expand_recipes
    from quantkit.authoring.which.candidates import usable
    from quantkit.recipe.load import load
    from quantkit.recipe.named import shipped_files

    names = expand_recipes(given, Path()) if given else usable(list(shipped_files()))
    return [load(name) for name in names]


def _candidates(
    catalogue: Catalogue, model: str, recipes: Sequence[Any], version: str, memory: Memory
) -> tuple[list[Candidate], list[str]]:
    """The recipes on the model; and the model itself, if it is a GGUF."""
    from quantkit.authoring.which import candidates

    from .ggufs import title

    found, notes = candidates.of_recipes(catalogue, recipes, version, memory)
    if all(t.parts and t.parts[0].source == t.name for t in catalogue.tensors):
        found.append(candidates.of_file(catalogue, title(model), memory))
    return found, notes


def _listing(repo: str) -> tuple[str, list[Published]]:
    """The repository's name, and its GGUFs. Raises SourceError."""
    from quantkit.gguf.quant_names import published
    from quantkit.hub.address import is_hub, parse
    from quantkit.hub.repo import open_repo

    found = open_repo(parse(repo if is_hub(repo) else f"hf://{repo}"))
    at = f"@{found.revision}" if found.revision else ""
    return f"{found.name}{at}", published({path: file.size for path, file in found.files.items()})


def _no_files(name: str, model: str, notes: Sequence[str]) -> Exception:
    from quantkit.base.errors import SourceError

    why = "; ".join(notes) or "it has no .gguf"
    return SourceError(f"hf://{name}: has no GGUF of {model}: {why}; give another --repo")


def _quality(model: str, candidate: Candidate, measured: Measured | None) -> Quality:
    from quantkit.authoring.which import quality

    found = None if measured is None else measured.find(candidate.name)
    return found or quality.published(model, candidate.name)
