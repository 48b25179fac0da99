"""quantkit imatrix: make; info, merge, convert, which are in imatrix_files.py; check, in imatrix_check.py."""

from __future__ import annotations

import click

from . import imatrix_check, imatrix_files, imatrix_make
from .files import Group


@click.group(cls=Group)
def imatrix() -> None:
    """Make, inspect, check, merge and convert importance matrices.

    \b
    quantkit imatrix make DeepSeek-R1/ --text calibration.txt -o imatrix.gguf
    quantkit imatrix info imatrix.gguf --figure coverage.svg
    quantkit imatrix check imatrix.gguf --recipe UD-IQ1_S --model deepseek-r1
    quantkit imatrix merge english.gguf code.gguf -o both.gguf
    quantkit imatrix convert imatrix.dat -o imatrix.gguf
    """


for _command in (
    imatrix_make.make,
    imatrix_files.info,
    imatrix_check.check,
    imatrix_files.merge,
    imatrix_files.convert,
):
    imatrix.add_command(_command)
