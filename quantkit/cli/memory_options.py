"""Options of commands that ask what fits into memory: --ctx, --cache-type, --reserve."""

from __future__ import annotations

import click

from .options import Size, together

CACHE_TYPES = click.Choice(["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"])
#: as `context`
context_option = click.option(
    "--ctx", "context", type=click.IntRange(1, 1 << 24), default=8192, show_default=True, help="Context, in tokens."
)
#: as `reserve`
reserve_option = click.option(
    "--reserve",
    type=Size(bare=2**30, least=0),
    default="1",
    show_default=True,
    metavar="GIB",
    help="Kept free on each GPU, for compute buffers.",
)
#: as `context`, `cache_type` and `reserve`
memory_options = together(
    context_option,
    click.option("--cache-type", type=CACHE_TYPES, default="f16", show_default=True, help="Type of the KV cache."),
    reserve_option,
)
