"""The texts of recipes: shipped ones by name, others by path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

from ..base.errors import RecipeError, did_you_mean
from ..base.files import text_within
from ..gguf.types import FILE_TYPES, file_type
from .schema import SCHEMA_FILE, looks_like_recipe

_MAX_BYTES = 1 << 20
#: among a recipe's archs: it is for every one
ANY_ARCH = "any"
SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"

#: llama-quantize refuses these without an importance matrix, whatever the model
_MIXTURES_WITH_IMATRIX = frozenset(
    {"Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS"}
)


def mixture_recipe(name: str) -> str:
    """The text of the recipe that is llama.cpp's mixture of that name and nothing else."""
    return (
        f"{SCHEMA_LINE}\n"
        f"# what llama-quantize itself chooses: quantkit plan deepseek-r1 --recipe {name}\n"
        f"name: {name}\n"
        f"title: llama.cpp's {name}\n"
        f"arch: [{ANY_ARCH}]\n"
        f"file_type: {name}\n"
        f"imatrix: {'required' if name in _MIXTURES_WITH_IMATRIX else 'optional'}\n"
        f"otherwise: mixture {name}\n"
    )


@cache
def shipped_files() -> Mapping[str, str]:
    """Names and texts of the recipe files that come with quantkit, which are read once."""
    found = {
        item.name.removesuffix(".yaml"): item.read_text("utf-8")
        for item in files("quantkit.recipes").iterdir()
        if item.name.endswith(".yaml")
    }
    return dict(sorted(found.items()))


def shipped() -> dict[str, str]:
    """Names of the recipes that come with quantkit, and their texts: the files, then every mixture of
    llama.cpp that no file describes."""
    out = dict(shipped_files())
    out.update({name: mixture_recipe(name) for name in FILE_TYPES if name not in out})
    return out


def shipped_name(name: str) -> str | None:
    """The shipped recipe of that name, in any case; as for llama-quantize, Q4_K is Q4_K_M, and so is 15."""
    by_lower = {known.lower(): known for known in shipped()}
    return by_lower.get(name.lower()) or file_type(name)


def text_of(name: str) -> str:
    """The text of a recipe, by name or path, unchecked. Raises RecipeError."""
    return read_text(name, Path())[0]


def looks_like_path(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml") or len(path.parts) > 1


def as_base(name: str, folder: Path, start: Path = Path()) -> str:
    """A recipe's name, or its path from `start`, as a recipe in `folder` names it for its base: no absolute path."""
    path = Path(name)
    if not looks_like_path(path) and shipped_name(name) is not None:
        return name
    target = start / path
    real = os.path.join(os.path.realpath(target.parent), target.name)
    return Path(os.path.relpath(real, os.path.realpath(folder))).as_posix()


def is_recipe(path: Path) -> bool:
    """Whether a file looks like a recipe, a faulty one too; what cannot be read may be one."""
    try:
        text = text_within(path, _MAX_BYTES)
    except OSError:
        return True
    except UnicodeDecodeError:
        return False
    return text is not None and looks_like_recipe(text)


def read_text(name: str, folder: Path | None) -> tuple[str, str]:
    """The text of a recipe by the name of a shipped one, or by its path from `folder`; and its file's name."""
    path = Path(name)
    if not looks_like_path(path) or folder is None:
        known = shipped()
        key = shipped_name(name)
        if key is not None:
            return known[key], f"{key}.yaml"
        if name.upper() == "COPY":
            raise RecipeError(
                f"'{name}' is not a recipe: llama-quantize's COPY quantizes nothing; copy the file itself"
            )
        if name and folder is not None and os.path.isdir(folder / path):
            raise RecipeError(f"{name}: is a directory; give a recipe in it, such as {path / 'recipe.yaml'}")
        if folder is None or not is_file(folder / path):
            raise RecipeError(
                f"no shipped recipe is called '{name:.80}'{did_you_mean(name, known)}; `quantkit recipe list` shows "
                "them; a recipe of your own is given as a path ending in .yaml"
            )
    try:
        text = text_within(folder / path, _MAX_BYTES)
        if text is None:
            raise RecipeError(f"{name}: has more bytes than a recipe may have ({_MAX_BYTES:,})")
        return text, path.name
    except OSError as e:
        raise RecipeError(f"{name}: cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise RecipeError(f"{name}: is not UTF-8 text: {e.reason} at byte {e.start}") from None


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name, say
        return False
