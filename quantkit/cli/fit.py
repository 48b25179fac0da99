"""quantkit fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .changes import change_options, changes, say_partial, say_warnings
from .files import MODEL, RECIPE, Command
from .memory_options import memory_options
from .options import Size, layout_option, mixture_version_option, only_types, recipe_of, set_option, tokenizer_options

if TYPE_CHECKING:
    from quantkit.planning.gpus import Gpus

    _GpusParam = click.ParamType[tuple[Gpus, ...]]
else:
    _GpusParam = click.ParamType  # generic in newer releases only


class GpuList(_GpusParam):
    """24,80,2x80,4x3090,24+80: several answers, each for one GPU, for so many alike, or for some together."""

    name = "gpus"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Gpus, ...]:
        from quantkit.planning.gpus import parse_gpus

        try:
            return tuple(parse_gpus(item) for item in str(value).split(","))
        except ValueError as e:
            self.fail(str(e), param, ctx)


@click.command(cls=Command)
@click.argument("model", type=MODEL)
@click.option(
    "-r", "--recipe", type=RECIPE, help="Shipped recipe, or path of a YAML file. A quantized GGUF needs none."
)
@click.option(
    "--vram",
    type=GpuList(),
    required=True,
    metavar="LIST",
    help="GiB of each GPU, or its name, such as 24,80,2x80,4x3090; an answer for each. 24+80 are two together.",
)
@click.option("--ram", type=Size(bare=2**30, least=0), metavar="GIB", help="RAM for the rest: 256, 256GB or 256GiB.")
@memory_options
@set_option
@change_options
@mixture_version_option
@layout_option
@tokenizer_options
@click.option("--json", "as_json", is_flag=True, help="The answers as JSON.")
def fit(
    model: str,
    recipe: str | None,
    vram: tuple[Gpus, ...],
    ram: int | None,
    context: int,
    cache_type: str,
    reserve: int,
    sets: tuple[str, ...],
    mixture_version: str,
    layout: str,
    pre: str | None,
    pad_token: str | None,
    as_json: bool,
) -> None:
    """Show how many layers fit on GPUs, and the llama.cpp flags for it.

    Three answers for each VRAM: the published rule (VRAM / size x layers - 4), whole layers by their real bytes
    and their KV cache, and all layers but the routed experts, with the experts of as many layers as fit.

    \b
    quantkit fit deepseek-r1 --recipe UD-IQ1_S --vram 24,80,2x80
    quantkit fit deepseek-r1 --recipe UD-Q2_K_XL --vram 24 --ram 256 --ctx 32768 --cache-type q8_0
    """
    import json

    from quantkit.model.open import open_model
    from quantkit.planning import fit
    from quantkit.planning.fit_report import fit_text
    from quantkit.planning.plan import make_plan

    from .terminal import width

    if recipe is None and (sets or changes()):
        raise click.UsageError("--set, --type and the like need --recipe: they change one")
    catalogue = open_model(model, only_types(layout, pre, pad_token))
    say_partial(catalogue)
    if recipe is None and not all(t.parts and t.parts[0].source == t.name for t in catalogue.tensors):
        raise click.UsageError(f"{model} is not a GGUF, so --recipe must say which types it gets")
    plan = None if recipe is None else make_plan(catalogue, recipe_of(recipe, sets), None, mixture_version)
    if plan is not None:
        say_warnings(plan)
    weights = fit.weigh(catalogue, plan, context, cache_type)
    common = ["-c", str(context)]
    if cache_type != "f16":
        common += ["-ctk", cache_type, "-ctv", cache_type]
    answers = [fit.answer(weights, gpus, reserve, common) for gpus in vram]
    if as_json:
        click.echo(json.dumps(fit.to_json(weights, answers, ram), indent=1, ensure_ascii=False))
    else:
        about = f"KV cache of {context:,} tokens in {cache_type}"
        click.echo(fit_text(weights, answers, about, ram, width()))
