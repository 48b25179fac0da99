"""quantkit demo."""

from __future__ import annotations

from pathlib import Path

import click

from .build import make_engine, run_with_progress
from .files import DEMO, RECIPE, Command
from .options import ready_kernels, threads_option
from .terminal import width


@click.command(cls=Command)
@click.option(
    "--dir",
    "folder",
    type=DEMO,
    default=Path("quantkit-demo"),
    show_default=True,
    help="Where to put checkpoint, imatrix and GGUF.",
)
@click.option("-r", "--recipe", type=RECIPE, default="UD-IQ1_S", show_default=True, help="The recipe to build.")
@threads_option
def demo(folder: Path, recipe: str, threads: int | None) -> None:
    """Make a small DeepSeek-V3 checkpoint in FP8 and build a dynamic GGUF from it.

    \b
    quantkit demo
    quantkit demo --recipe UD-Q2_K_XL --dir /tmp/demo
    """
    from quantkit.authoring.clone import slug
    from quantkit.base.workers import default_threads
    from quantkit.building import run as builds
    from quantkit.imatrix.matrix import open_imatrix
    from quantkit.model import demo as demos
    from quantkit.model.families.options import Options
    from quantkit.model.open import describe_stored, open_model
    from quantkit.planning import brief
    from quantkit.planning.plan import make_plan
    from quantkit.recipe.load import load

    ready_kernels()
    rules = load(recipe)
    demos.prepare_folder(folder)
    checkpoint, imatrix, out = folder / demos.NAME, folder / "imatrix.gguf", folder / f"demo-{slug(rules.name)}.gguf"
    click.echo(f"1. a checkpoint as DeepSeek publishes them, with seeded random weights: {checkpoint}")
    demos.make_checkpoint(checkpoint)
    model = open_model(str(checkpoint), Options(pre=demos.PRE))
    for kind, (n, nbytes) in describe_stored(model).items():
        click.echo(f"   {kind:16} {n:5} tensors {nbytes:12,} bytes")
    click.echo(f"2. an importance matrix that matches: {imatrix}")
    shapes = {t.name: t.shape for t in model.tensors if t.quantizable and t.layer is not None}
    demos.make_imatrix(imatrix, shapes)
    click.echo(f"3. the plan: {rules.name}, {rules.title}\n")
    weights = open_imatrix(str(imatrix))
    made = make_plan(model, rules, weights)
    ready = builds.prepare(made, out, weights, force=True, resume=False)
    click.echo(brief.brief_text(made, [(path.name, f.nbytes) for path, f in ready.files], width()))
    click.echo("\n4. the build: FP8 -> BF16 -> F32 -> blocks, in one pass\n")
    run_with_progress(ready, make_engine("native", None), threads or default_threads(), quiet=False)
    bf16 = sum(2 * t.n_elements if t.quantizable else 4 * t.n_elements for t in model.tensors)
    stored = sum(nbytes for _, nbytes in describe_stored(model).values())
    click.echo(
        f"\nBF16 would be {bf16 / 2**20:.1f} MiB, the checkpoint is {stored / 2**20:.1f} MiB, "
        f"the GGUF {ready.file_bytes / 2**20:.1f} MiB.\n\n"
        f"Look inside:       quantkit inspect {out}\n"
        f"Price the real R1: quantkit plan deepseek-r1 --recipe {rules.name}\n"
        f"Build the real R1: quantkit build DeepSeek-R1/ -o R1.gguf --recipe {rules.name} --imatrix imatrix.gguf"
    )
