"""Files on the command line: types for what a command reads and for what it writes, checked before it runs.

Every argument and option that names a file or a folder has one of these types, and every command is a `Command`, which
looks at all of them before its function is called: what is read must be no pipe or device, and nothing that is written
may be something that is read, or another output (quantkit.base.outputs). So a new option cannot forget it. Names that a
command only knows later, such as those of shards, it gives to `will_write`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from . import behind
from .completing import Items, models, or_files, recipes

if TYPE_CHECKING:
    from quantkit.base.outputs import Output

    _Type = click.ParamType[Any]
else:
    _Type = click.ParamType  # generic in newer releases only

_KEY = "quantkit.files"
T = TypeVar("T")


class Read(_Type):
    """Something that is read. `files` lists the files behind a value; the value stays as it was given."""

    name = "file"

    def __init__(
        self,
        files: Callable[[str], Iterable[Path]] | None = None,
        as_path: bool = False,
        error: str = "SourceError",
        unless_given: Path | None = None,
        name: str = "file",
    ) -> None:
        """`error` is the class of quantkit.base.errors for a pipe or device; `unless_given` stands for no value."""
        self._files, self._as_path = files, as_path
        self.error, self.unless_given, self.name = error, unless_given, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        _check_text(value, param, self.error)
        value = _at_home(value)
        if self._as_path:
            _refuse_address(value)
        return Path(value) if self._as_path else value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        names = {"source": models, "recipe": recipes}.get(self.name)
        return or_files(() if names is None else names(), incomplete)

    def files(self, value: Any) -> Iterable[Path]:
        return [Path(value)] if self._files is None else self._files(str(value))


class Written(_Type):
    """A file, or with `outputs` more, that is written. Its value is a Path."""

    name = "file"

    def __init__(
        self,
        example: str = "model.gguf",
        wanted: str = "the name of the file to make",
        outputs: Callable[[Path, Output], Iterable[Output]] | None = None,
        is_file: bool = True,
        files: Callable[[Path], Iterable[Path]] | None = None,
        unless_given: Path | None = None,
    ) -> None:
        """`wanted` and `example` say what to give in place of a directory; `files` are what the value says that is
        read besides."""
        self._wanted = wanted
        self._example, self._outputs, self._is_file, self._files = example, outputs, is_file, files
        self.unless_given = unless_given

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from quantkit.base.outputs import check_file_name

        _check_text(value, param, "OutputError")
        if self._is_file and isinstance(value, str):
            check_file_name(value, self._wanted, self._example)
        return Path(_at_home(value))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        return [CompletionItem(incomplete, type="file" if self._is_file else "dir")]

    def files(self, value: Path) -> Iterable[Path]:
        return () if self._files is None else self._files(value)

    def outputs(self, value: Path, option: str, replace: bool) -> Iterable[Output]:
        from quantkit.base.outputs import Output, check_folder_link, check_name

        one = Output(value, option, replace, example=self._example)
        if not self._is_file and value.name:  # before anything is looked for there
            check_name(one)
            check_folder_link(value)
        return [one] if self._outputs is None else self._outputs(value, one)


class Command(click.Command):
    """A command whose files are checked before it runs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as e:
            from .unknown import too_many

            if says := too_many(e.message):
                raise click.UsageError(e.message + says, e.ctx) from None
            raise

    def invoke(self, ctx: click.Context) -> Any:
        reads: list[Path] = []
        outputs: list[Output] = []
        replace = bool(ctx.params.get("force"))
        writes = any(isinstance(p.type, Written) and ctx.params.get(p.name or "") is not None for p in self.params)
        for param in self.params:
            value = ctx.params.get(param.name or "")
            if value is None:
                value = getattr(param.type, "unless_given", None)
            for one in value if isinstance(value, tuple) else () if value is None else (value,):
                if isinstance(param.type, Read | Written):
                    # a recipe's base, say, is only looked for where it could be written over
                    all_files = writes or os.path.isdir(one) or one == param.type.unless_given
                    files = list(param.type.files(one)) if all_files else [Path(one)]
                    _refuse_special(files, getattr(param.type, "error", "SourceError"))
                    reads += files
                if isinstance(param.type, Written):
                    outputs += param.type.outputs(one, _shown(param), replace)
        ctx.meta[_KEY] = (reads, outputs)
        if outputs:
            from quantkit.base.outputs import check

            check(reads, outputs)
        return super().invoke(ctx)


class Group(click.Group):
    """A group whose commands are `Command`s, and which says what was meant by one that it does not have."""

    command_class = Command
    default: str | None = None
    """the command that words belong to which name none"""

    @classmethod
    def of(cls, default: str) -> type[Group]:
        """A group in which words that name no command are that one's."""
        return type("DefaultGroup", (cls,), {"default": default})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        names = {*self.commands, *self.get_help_option_names(ctx)}
        if self.default is not None and args and args[0] not in names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from .unknown import no_such

        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(no_such(args[0], self, ctx.find_root().command))
        return super().resolve_command(ctx, args)


def will_write(*more: Output) -> None:
    """Check further outputs of the command at work, and all again beside these. Raises OutputError."""
    from quantkit.base.outputs import check

    reads, outputs = click.get_current_context().meta[_KEY]
    outputs += more
    check(reads, outputs)


def _check_text(value: Any, param: click.Parameter | None, error: str) -> None:
    """Raise an error of that class for what is no name at all: '', which would be the current folder and mostly is a
    variable that was not set, or one with a NUL."""
    from quantkit.base import errors

    named = "the name" if param is None else _shown(param)
    if value == "":
        raise getattr(errors, error)(f"{named}: is empty; give a name")
    if isinstance(value, str) and "\0" in value:
        raise getattr(errors, error)(f"{named}: has a NUL in it, which no file's name has; give another")


def _refuse_address(value: Any) -> None:
    """Raise SourceError for the address of a file elsewhere, where only one here can be read."""
    from quantkit.base.errors import SourceError

    if re.match("(hf|https?)://", str(value), re.IGNORECASE) and not os.path.lexists(value):
        m = re.match("hf://([^/@]+/[^/@]+)", str(value), re.IGNORECASE)
        how = f" (`quantkit download {m[1]}`)" if m else ""
        raise SourceError(
            f"{value}: this is read from a file or folder here; download it first{how}, and give its path"
        )


def _at_home(value: Any) -> Any:
    """A name with its ~ replaced, which a shell leaves alone in --option=~/name; unless it is there as it is."""
    return os.path.expanduser(value) if str(value).startswith("~") and not os.path.lexists(value) else value


def _shown(param: click.Parameter) -> str:
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return (param.metavar or param.name or "").upper().rstrip(".")


def _refuse_special(paths: Iterable[Path], error: str) -> None:
    """Raise an error of that class for a pipe, socket or device, whose reading may never end, and for a name that no
    file can have."""
    from quantkit.base import errors
    from quantkit.base.files import special

    for path in paths:
        try:
            what = special(os.stat(path).st_mode)
        except OSError as e:
            if e.errno == errno.ENAMETOOLONG:
                raise getattr(errors, error)(f"{path}: cannot be read: {e.strerror}") from None
            continue  # what is not there the command says
        if what is not None:
            raise getattr(errors, error)(f"{path}: is {what}, not a regular file; write it to a file first")


# ---------------------------------------------------------------- what is read


FILE = Read()
PATH = Read(as_path=True)
GGUF = Read(behind.of_gguf, as_path=True)
MODEL = Read(behind.of_model, name="source")
CHECKPOINT = Read(behind.of_dequant, as_path=True)
RECIPE = Read(behind.of_recipe, error="RecipeError", name="recipe")
RECIPES = Read(behind.of_recipes, error="RecipeError", name="recipe")
IMATRIX = Read(error="ImatrixError")
SENSITIVITY = Read(as_path=True)
RULES = Read(as_path=True, error="RecipeError")
TOOL = Read(error="ToolError")
#: the folder that `imatrix make --covariance` made
COVARIANCE_IN = Read(behind.of_covariance_in, as_path=True, name="folder")
#: these may be the names of shipped ones
ROUNDING_POLICY = Read(error="RecipeError", name="policy")
RUBRIC = Read(error="RecipeError", name="rubric")
TEXT = Read(behind.of_text, error="TextError", name="text")
LOCK = Read(behind.of_lock, unless_given=behind.DEFAULT_LOCK)
#: a folder to put temporary files in
PLACE = Read(as_path=True, error="OutputError")
#: a folder that a command only mentions
FOLDER = Read(behind.nothing, as_path=True)


# ---------------------------------------------------------------- what is written


BUILT = Written(outputs=behind.of_build)
MERGED = Written(outputs=lambda _, one: [one._replace(suffix=".part")])
MENDED = Written()
REPORT = Written("report.txt")
#: grows with every run
RESULTS = Written("results.db", outputs=lambda _, one: [one._replace(replace=True)])
MANIFEST = Written("manifest.json")
MODELFILE = Written("Modelfile")
ATTESTATION = Written("build.json")
RECIPE_OUT = Written("recipe.yaml")
POLICY_OUT = Written("policy.yaml")
IMATRIX_OUT = Written("imatrix.gguf")
IMATRIX_MADE = Written("imatrix.gguf", outputs=behind.of_unfinished)
COVARIANCE = Written(outputs=behind.of_covariance, is_file=False)
FIGURE = Written("coverage.svg")
PAGE = Written("report.html")
#: files are added to it, whose names are checked when they are known
FIGURES = Written(outputs=lambda _path, _one: (), is_file=False)
LOCK_OUT = Written(
    "quantkit-sizes.yaml", outputs=behind.of_update, files=behind.named_by_lock, unless_given=behind.DEFAULT_LOCK
)
SENSITIVITY_OUT = Written("sensitivity.json", outputs=behind.of_sensitivity)
PREFIX = Written("model", "a prefix for the names", outputs=behind.as_prefix)
STUDY_FILES = Written(outputs=behind.of_study, is_file=False)
CACHE = Written(outputs=behind.of_cache, is_file=False)
DEMO = Written(outputs=behind.of_demo, is_file=False)
MADE_FOLDER = Written(outputs=behind.as_folder, is_file=False)
