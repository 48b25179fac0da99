"""The command line: parse, call, print. The only room that prints or exits.

Nothing heavy is imported here or at the top of a command's file, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from quantkit.base.errors import QuantkitError
from quantkit.base.version import __version__
from quantkit.hub.watching import watched

from . import (
    ablate,
    build,
    cache,
    demo,
    dequant,
    doctor,
    download,
    eval,
    fit,
    imatrix,
    inspect,
    ollama,
    optimize,
    plan,
    publish,
    recipe,
    report,
    rounding,
    run_card,
    sensitivity,
    shards,
    sizes,
    status,
    tokenize,
    tokenizer,
    toolchain,
    verify,
    which,
)
from .bars import Fetching
from .files import Group
from .shells import VARIABLE, complete
from .terminal import Streams

INTERRUPTED = 130
_TERMINATED = 143


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="quantkit")
def cli() -> None:
    """Make dynamic mixed-precision GGUFs of DeepSeek-V3/R1 and their relatives.

    \b
    quantkit demo                                           a whole run on a small model it makes itself
    quantkit plan deepseek-r1 --recipe UD-IQ1_S             every tensor's type and the exact size
    quantkit build DIR -o R1.gguf --recipe UD-IQ1_S --imatrix imatrix.gguf
    """


for _command in (
    ablate.ablate,
    plan.plan,
    build.build,
    status.status,
    cache.cache,
    dequant.dequant,
    verify.verify,
    inspect.inspect,
    shards.split,
    shards.merge,
    recipe.recipe,
    report.report,
    sizes.sizes,
    imatrix.imatrix,
    fit.fit,
    which.which,
    download.download,
    run_card.run_card,
    ollama.ollama,
    publish.publish,
    sensitivity.sensitivity,
    optimize.optimize,
    rounding.rounding,
    tokenize.tokenize,
    tokenizer.tokenizer,
    demo.demo,
    toolchain.toolchain,
    doctor.doctor,
    eval.group,
):
    cli.add_command(_command)


class _Terminated(BaseException):
    """SIGTERM, raised in the main thread so that temporary files go. Not a KeyboardInterrupt: click
    makes those its own."""


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    """Raise in the main thread, once: a second signal must not interrupt the cleaning up."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _left(e: BaseException) -> str:
    """What an interrupted command leaves; click wraps a KeyboardInterrupt."""
    return getattr(e, "kept", None) or getattr(e.__cause__, "kept", None) or "nothing was left behind"


def main() -> None:
    """Run the command line and exit: with an error's own code, 130 after Ctrl-C, 143 after SIGTERM."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _stop)
    if os.environ.get(VARIABLE):  # a shell asks, and reads every byte itself
        complete(cli)
    with Streams(), watched(Fetching()):
        _run()


def _run() -> NoReturn:
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)  # what a command gives to ctx.exit or Exit is returned
    except QuantkitError as e:
        click.echo(f"error: {e}", err=True)
        if kept := getattr(e, "kept", None):
            click.echo(kept, err=True)
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except _Terminated as e:
        click.echo(f"terminated; {_left(e)}", err=True)
        sys.exit(_TERMINATED)
    except (click.Abort, KeyboardInterrupt) as e:
        click.echo(f"interrupted; {_left(e)}", err=True)
        sys.exit(INTERRUPTED)
    except (MemoryError, RuntimeError) as e:
        # after click.Abort, which is a RuntimeError too
        if not isinstance(e, MemoryError) and "can't start new thread" not in str(e):
            raise
        click.echo("error: not enough memory; end other programs, raise the limit, or give fewer --threads", err=True)
        if kept := getattr(e, "kept", None):
            click.echo(kept, err=True)
        sys.exit(QuantkitError.exit_code)
