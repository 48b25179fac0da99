"""A study: a base recipe, axes along which it varies, and the resulting variants, priced before any work.

    base: UD-IQ1_S
    design: one at a time            # or: grid
    axes:
      early_down:                    # what the first layers' down_proj is worth
        match: "blk.*.ffn_down_exps.weight"
        layers: "moe[:6]"
        types: [IQ1_S, Q2_K]
      how_many:                      # how many layers of it
        match: "blk.*.ffn_down_exps.weight"
        type: Q2_K
        layers: ["moe[:2]", "moe[:4]"]
      imatrix:
        imatrices: [ours.gguf, theirs.gguf]
      rounding:
        roundings: [feedback]

Every variant is an ordinary recipe with the base below it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ...base.errors import ImatrixError, QuantkitError, RecipeError
from ...base.files import file_sha256, text_within
from ...imatrix.matrix import Imatrix, open_imatrix
from ...imatrix.policies import Policy, parse_policy
from ...model.catalogue import Catalogue
from ...planning.file_layout import lay_out, output_kvs
from ...planning.plan import Plan, make_plan, with_values
from ...planning.rounding import check_covariance, with_covariance
from ...recipe.load import Recipe, Rounding, parse
from ...recipe.schema import good_layers, good_pattern, known_rounding, messages, type_or_variable
from ...recipe.yaml_lines import read, scalar
from ...rounding.covariance import CovarianceSource

#: limits: characters of a study's file, and variants of a study
_MOST_TEXT, _MOST_VARIANTS = 1 << 20, 4096


def _one_or_more(value: Any) -> Any:
    several = value if isinstance(value, list) else [value]
    if not several or not all(isinstance(each, str) for each in several):
        raise ValueError('should be layers, such as "moe[:6]", or a list of such')
    found = tuple(map(good_layers, several))
    return found if isinstance(value, list) else found[0]


_Type = Annotated[str, AfterValidator(type_or_variable)]


class Axis(BaseModel):
    """One thing that varies: types of some tensors, the layers that get a type, or the importance matrix."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: Annotated[str, AfterValidator(good_pattern)] | None = Field(None, description="Glob over tensor names.")
    layers: Annotated[str | tuple[str, ...] | None, BeforeValidator(_one_or_more)] = Field(
        None, description="Layers of them; a list is what varies."
    )
    type: _Type | None = Field(None, description="The type of those layers.")
    types: tuple[_Type, ...] = Field((), description="What varies: the type.")
    imatrices: tuple[str, ...] = Field((), description="What varies: the importance matrix.")
    roundings: tuple[Annotated[str, AfterValidator(known_rounding)], ...] = Field(
        (), description="What varies: how everything is rounded."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Axis:
        kinds = [bool(self.types), isinstance(self.layers, tuple), bool(self.imatrices), bool(self.roundings)]
        if sum(kinds) != 1:
            raise ValueError("an axis varies one thing: types, a list of layers with a type, imatrices, or roundings")
        alone = "imatrices" if self.imatrices else "roundings" if self.roundings else ""
        if alone and (self.match or self.layers or self.type):
            raise ValueError(f"{alone} stand alone: no match, layers or type beside them")
        if not alone and self.match is None:
            raise ValueError("match is missing: which tensors vary")
        if isinstance(self.layers, tuple) != (self.type is not None):
            raise ValueError("a list of layers needs a type, and a type a list of layers")
        return self

    @property
    def levels(self) -> tuple[str, ...]:
        """Its settings, in words."""
        return self.types or self.imatrices or self.roundings or tuple(self.layers or ())


class StudyFile(BaseModel):
    """A study as its file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = Field(description="The recipe that is varied: a shipped one's name, or a path.")
    design: Literal["one at a time", "grid"] = Field("one at a time", description="Which variants there are.")
    imatrix: str | None = Field(None, description="The importance matrix, where no axis varies it.")
    imatrix_policy: str | None = Field(None, description="What stands in for what an importance matrix lacks.")
    axes: dict[str, Axis] = Field(min_length=1, description="What varies.")

    @field_validator("imatrix_policy")
    @classmethod
    def _is_a_policy(cls, value: str | None) -> str | None:
        if value is not None:
            parse_policy(value)
        return value


@dataclass(frozen=True)
class Study:
    """A study that was read. Its paths are relative to `folder`."""

    name: str
    given: StudyFile
    folder: Path

    def levels(self) -> Iterator[dict[str, str]]:
        """The settings of each variant, axis -> level; first the base, which has none."""
        axes = self.given.axes
        if self.given.design == "grid":
            every = itertools.product(*([None, *axis.levels] for axis in axes.values()))
            for chosen in every:
                yield {name: level for name, level in zip(axes, chosen, strict=True) if level is not None}
            return
        yield {}
        for name, axis in axes.items():
            for level in axis.levels:
                yield {name: level}


class Variant(NamedTuple):
    """A recipe of a study, planned: its exact bytes, or why it cannot be planned."""

    name: str
    levels: Mapping[str, str]
    recipe_text: str
    plan: Plan | None
    file_bytes: int
    imatrix: str | None
    trouble: str = ""
    imatrix_sha256: str = ""
    error: QuantkitError | None = None
    """the error that `trouble` describes"""


def load_study(path: Path) -> Study:
    """Read a study. Raises RecipeError with file, line and place."""
    try:
        text = text_within(path, _MOST_TEXT)
    except (OSError, UnicodeDecodeError) as e:
        why = "it is not UTF-8 text" if isinstance(e, UnicodeDecodeError) else e.strerror or e
        raise RecipeError(f"{path}: cannot be read: {why}") from None
    if text is None:
        raise RecipeError(f"{path}: has more than {_MOST_TEXT:,} bytes; it is not a study")
    if not text.strip():
        raise RecipeError(f"{path}: is empty; a study has a base and axes")
    return parse_study(text, path.stem, path.parent, str(path))


def parse_study(text: str, name: str, folder: Path, where: str) -> Study:
    """Parse the text of a study. Its paths are relative to `folder`; messages call it `where`. Raises RecipeError."""
    marked = read(text, where)
    try:
        given = StudyFile.model_validate(marked.value)
    except ValidationError as e:
        raise RecipeError("\n".join(messages(e, marked, _fields))) from None
    study = Study(name, given, folder)
    n = sum(1 for _ in itertools.islice(study.levels(), _MOST_VARIANTS + 1))
    if n > _MOST_VARIANTS:
        raise RecipeError(
            f"{marked.place('axes')}: makes more than {_MOST_VARIANTS:,} variants; give fewer levels, or design: one "
            "at a time"
        )
    return study


def _fields(path: Sequence[str | int]) -> Mapping[str, Any]:
    """The keys that are valid at a place of a study."""
    return Axis.model_fields if len(path) > 2 else StudyFile.model_fields


def variants(
    study: Study,
    catalogue: Catalogue,
    imatrix: str | None = None,
    policy: Policy | None = None,
    covariance: CovarianceSource | None = None,
    rounded: Callable[[Recipe], Recipe] = lambda recipe: recipe,
    *,
    values: bool = True,
) -> Iterator[Variant]:
    """Plan every variant on a model. A variant that cannot be planned carries its error and does not stop the others. A
    variant with the types, importance matrix and rounding of an earlier one is left out. `policy` fills gaps in an
    importance matrix; by default the study's, else the recipe's. `rounded` gives recipes another rounding, which an
    axis of the study overrides; any but ggml's needs the `covariance`. Without `values` only sizes are computed: no
    values of an importance matrix or covariance are read, and they may be missing."""
    if policy is None and study.given.imatrix_policy is not None:
        policy = parse_policy(study.given.imatrix_policy)
    opened: dict[str, tuple[Imatrix, str]] = {}
    met: set[object] = set()
    for levels in study.levels():
        text = recipe_text(study, levels)
        matrix = _matrix_of(study, levels) or imatrix
        name = ", ".join(f"{a}={b}" for a, b in levels.items()) or "base"
        try:
            weights, digest = None, ""
            if matrix is not None:
                if matrix not in opened:
                    opened[matrix] = open_imatrix(matrix), _sha256(matrix)
                weights, digest = opened[matrix]
            recipe = _rounded(study, levels, rounded(parse(text, f"{study.name}: {name}", folder=study.folder)))
            plan = with_covariance(make_plan(catalogue, recipe, weights, policy=policy), covariance)
            if values:
                plan = with_values(plan, weights)
                check_covariance(plan)
            (layout,) = lay_out(plan, output_kvs(plan, weights))
            same = (digest, tuple(t.type for t in plan.tensors), rounding_digest(plan))
            if same in met:
                continue
            met.add(same)
            yield Variant(name, levels, text, plan, layout.nbytes, matrix, imatrix_sha256=digest)
        except QuantkitError as e:
            yield Variant(name, levels, text, None, 0, matrix, str(e), error=e)


def _rounded(study: Study, levels: Mapping[str, str], recipe: Recipe) -> Recipe:
    for name, level in levels.items():
        if study.given.axes[name].roundings:
            recipe = recipe.with_rounding(Rounding(level, said_by=f"{study.name}: axes.{name}"))
    return recipe


def rounding_digest(plan: Plan) -> str:
    """A digest of everything a plan's rounding depends on; '' if it is ggml's."""
    if plan.rounding is None:
        return ""
    said = [plan.rounding.identity(t.tensor.name) for t in plan.tensors]
    return hashlib.sha256(repr(said).encode()).hexdigest() if any(said) else ""


def require_one(every: Sequence[Variant]) -> None:
    """Raise the first variant's error if no variant can be planned."""
    if every and every[0].error is not None and all(v.plan is None for v in every):
        raise every[0].error


def _sha256(path: str) -> str:
    """The SHA-256 of a file. Raises ImatrixError."""
    try:
        return file_sha256(path)
    except OSError as e:
        raise ImatrixError(f"{path}: cannot be read: {e.strerror or e}") from None


def recipe_text(study: Study, levels: Mapping[str, str]) -> str:
    """The YAML of a variant."""
    rules = []
    for name, level in levels.items():
        axis = study.given.axes[name]
        if axis.imatrices or axis.roundings:
            continue
        rule: dict[str, Any] = {
            "match": axis.match,
            "type": axis.type or level,
            "why": f"{study.name}: {name} = {level}",
        }
        layers = level if axis.type else axis.layers
        if layers:
            rule["layers"] = layers
        rules.append(rule)
    about = {"name": f"{study.name}-variant", "base": study.given.base}
    lines = [f"{key}: {scalar(value)}" for key, value in about.items()]
    return "\n".join(lines) + "\n" + (yaml.safe_dump({"rules": rules}, sort_keys=False) if rules else "")


def _matrix_of(study: Study, levels: Mapping[str, str]) -> str | None:
    for name, level in levels.items():
        if study.given.axes[name].imatrices:
            return str(study.folder / level)
    given = study.given.imatrix
    return None if given is None else str(study.folder / given)
