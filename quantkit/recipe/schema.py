"""What a recipe file may hold: models that check it, and from which its schema and documentation are generated.

Values are as yaml_lines reads them: text, true, false, null, lists, mappings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from ..base.errors import KernelError, did_you_mean
from ..gguf.pre_tokenizers import PRE_KEY, unknown_pre
from ..gguf.types import FILE_TYPE_ALIASES, FILE_TYPES, INTEGER_TYPES, QTYPES, file_type, qtype
from ..imatrix.policies import parse_policy
from .foreign import not_a_glob
from .selectors import LAYER_GROUPS, expand_braces, glob_regex, matcher, parse_layers
from .yaml_lines import Marked, Path

_MAX_OVERRIDE = 127
_VARIABLE = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,64}")
#: keys that the build itself determines
_FIXED_KEYS = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")
_FIXED_PREFIXES = (
    "split.", "quantize.imatrix.", "quantkit.imatrix.", "quantkit.rounding.", "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
)  # fmt: skip
#: how a tensor may be rounded: as ggml does it, or with later columns making up for the errors of earlier ones
GGML = "ggml"
ROUNDINGS = (GGML, "coarse", "feedback", "feedback+gain")


def known_type(value: str) -> str:
    try:
        name = qtype(value).name
    except KernelError as e:
        raise ValueError(str(e)) from None
    if name in INTEGER_TYPES:
        raise ValueError(f"{name} is not a type to quantize to")
    return name


def type_or_variable(value: str) -> str:
    """Return ggml's name of a type, or $NAME of a variable. Raises ValueError."""
    if value.startswith("$"):
        if not _VARIABLE.fullmatch(value[1:]):
            raise ValueError(f"'{value:.60}' is not a variable's name, such as $down")
        return value
    return known_type(value)


def _known_file_type(value: str) -> str:
    known = file_type(value)
    if known is None:
        raise ValueError(f"unknown file type '{value}'{did_you_mean(value, FILE_TYPES)}")
    return known


def _good_otherwise(value: str) -> str:
    word, _, name = value.partition(" ")
    if word != "mixture" or not name:
        raise ValueError(f"'{value:.60}' is not 'mixture NAME', such as mixture Q2_K")
    known = file_type(name)
    if known is None:
        raise ValueError(f"unknown mixture '{name:.60}'{did_you_mean(name, FILE_TYPES)}")
    return f"mixture {known}"


def good_pattern(value: str) -> str:
    """Return a glob over tensor names unchanged. Raises ValueError, with the right form, for anything else."""
    if says := not_a_glob(value):
        raise ValueError(says)
    for alternative in expand_braces(value):
        glob_regex(alternative)
    return value


def good_layers(value: str) -> str:
    """Return layers such as moe[:6] or 3-12 unchanged. Raises ValueError."""
    parse_layers(value)
    return value


def _listed_layers(value: Any) -> Any:
    """Return [3, 5] or [3-5, 9] as text. Raises ValueError."""
    if not isinstance(value, list):
        return value
    if not value or not all(isinstance(each, str) and each.strip()[:1].isdecimal() for each in value):
        raise ValueError("a list of layers is of numbers, such as [3, 5] or [3-5, 9]; a slice stands alone: moe[:6]")
    return ", ".join(value)


def _good_variable(value: str) -> str:
    if not _VARIABLE.fullmatch(value):
        raise ValueError(f"'{value:.60}' is not a variable's name: small letters, digits and _, such as down")
    return value


def _good_key(value: str) -> str:
    if not _KEY.fullmatch(value):
        raise ValueError(f"'{value:.60}' is not a metadata key, such as general.name")
    if value in _FIXED_KEYS or value.startswith(_FIXED_PREFIXES):
        raise ValueError(f"{value} follows from the build and cannot be set")
    return value


class Override(NamedTuple):
    """A metadata key set by a recipe, like llama-quantize's --override-kv KEY=TYPE:VALUE."""

    key: str
    type: str
    """str | int | float | bool; int is written as u32, float as f32"""
    value: str | int | float | bool

    @property
    def text(self) -> str:
        value = str(self.value).lower() if self.type == "bool" else self.value
        return f"{self.key}={self.type}:{value}"


def parse_override(key: str, text: str) -> Override:
    """Parse TYPE:VALUE as llama-quantize does. Raises ValueError."""
    kind, colon, value = text.partition(":")
    if not colon or kind not in ("str", "int", "float", "bool"):
        raise ValueError(
            f"'{text:.60}' is not TYPE:VALUE with the type str, int, float or bool, such as str:{text:.20}"
        )
    if kind == "str":
        if len(value.encode()) > _MAX_OVERRIDE:
            raise ValueError(f"'{value:.60}…' is {len(value.encode())} bytes; llama-quantize takes {_MAX_OVERRIDE}")
        return Override(key, kind, value)
    if kind == "int":
        if not (value.isascii() and value.isdecimal() and len(value) < 11 and int(value) < 1 << 32):
            raise ValueError(f"'{value:.60}' is not an integer from 0 to {(1 << 32) - 1}")
        return Override(key, kind, int(value))
    if kind == "bool":
        if value not in ("true", "false"):
            raise ValueError(f"'{value:.60}' is not true or false")
        return Override(key, kind, value == "true")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not abs(number) <= 3.4e38:
        raise ValueError(f"'{value:.60}' is not a number that float32 holds")
    return Override(key, kind, number)


def _good_metadata(value: dict[str, str]) -> dict[str, str]:
    if PRE_KEY in value:
        checked_override(PRE_KEY, value[PRE_KEY])
    return value


def checked_override(key: str, text: str) -> Override:
    """Parse a key and its TYPE:VALUE, checking both. Raises ValueError."""
    override = parse_override(_good_key(key), text)
    if key == PRE_KEY:
        says = unknown_pre(str(override.value))
        if override.type != "str":
            says = f"is {override.type}, not str"
        if says:
            raise ValueError(f"{PRE_KEY}: {says}")
    return override


def _good_policy(value: str) -> str:
    return parse_policy(value).text


def known_rounding(value: str) -> str:
    """Return the name of a rounding unchanged. Raises ValueError."""
    if value not in ROUNDINGS:
        raise ValueError(
            f"unknown rounding '{value:.40}'{did_you_mean(value, ROUNDINGS)}; there are {', '.join(ROUNDINGS)}"
        )
    return value


def _good_rounding(value: Any) -> str | dict[str, str]:
    if isinstance(value, dict):
        if list(value) != ["policy"] or not isinstance(value["policy"], str) or not value["policy"]:
            raise ValueError("should be a name or {policy: NAME or FILE}, such as {policy: deepseek-v3}")
        return value
    if not isinstance(value, str):
        raise ValueError(f"should be one of {', '.join(ROUNDINGS)}, or {{policy: NAME or FILE}}, not {value!r:.60}")
    return known_rounding(value)


def _good_override(value: str) -> str:
    parse_override("", value)
    return value


_TYPES = [t for t in QTYPES if t not in INTEGER_TYPES]
_A_TYPE = {"type": "string", "enum": _TYPES}
_A_ROUNDING = {"type": "string", "enum": list(ROUNDINGS)}
_A_POLICY = {
    "type": "object", "properties": {"policy": {"type": "string", "minLength": 1}}, "required": ["policy"],
    "additionalProperties": False,
}  # fmt: skip
_TypeName = Annotated[str, AfterValidator(known_type), WithJsonSchema(_A_TYPE)]
_RANGES_PATTERN = r"^\d+(\s*-\s*\d+)?(\s*,\s*\d+(\s*-\s*\d+)?)*$"
_LAYERS_SCHEMA = {
    "anyOf": [
        {"type": "string", "pattern": rf"^({'|'.join(LAYER_GROUPS)})\s*(\[.*\])?$"},
        {"type": "string", "pattern": _RANGES_PATTERN},
        {"type": "integer", "minimum": 0},
        {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": _RANGES_PATTERN}]},
        },
    ]
}


class Rule(BaseModel):
    """One rule: which tensors, which type, why."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    match: Annotated[str, Field(min_length=1), AfterValidator(good_pattern)] = Field(
        description="A glob over whole GGUF tensor names: * any characters, ? one, [ab] [a-z] [!a] one of a set, "
        "{a,b} alternatives.",
        examples=["blk.*.ffn_{gate,up}_exps.weight"],
    )
    layers: (
        Annotated[str, BeforeValidator(_listed_layers), AfterValidator(good_layers), WithJsonSchema(_LAYERS_SCHEMA)]
        | None
    ) = Field(
        default=None,
        description="Only in these layers: numbers, such as 3-12 or [3, 5]; or all, dense, moe or more_bits (those "
        "that the _M mixtures favour), with an optional Python slice or index.",
        examples=["moe[:6]", "3-12", "all[-1]"],
    )
    type: Annotated[
        str,
        AfterValidator(type_or_variable),
        WithJsonSchema({"anyOf": [_A_TYPE, {"type": "string", "pattern": r"^\$[a-z_][a-z0-9_]*$"}]}),
    ] = Field(description="The ggml type, or $NAME of a variable.", examples=["IQ2_XXS", "$down"])
    why: Annotated[str, Field(min_length=1)] = Field(description="The reason, for readers of the plan.")
    rounding: Annotated[str, AfterValidator(known_rounding), WithJsonSchema(_A_ROUNDING)] | None = Field(
        default=None, description="How its tensors are rounded, where that is not as the file says.",
        examples=["ggml"],
    )  # fmt: skip
    optional: bool = Field(default=False, description="No error when it matches nothing in a model.")

    def matcher(self) -> re.Pattern[str]:
        return matcher(self.match)


class RecipeFile(BaseModel):
    """A recipe of quantkit: which tensor of a model gets which ggml type, and why. First match wins."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, title="quantkit recipe")

    name: Annotated[str, Field(min_length=1)] = Field(description="What the recipe is called.", examples=["UD-IQ1_S"])
    title: str = Field(default="", description="One line for tables.")
    description: str = Field(default="", description="What it is for, in some sentences.")
    base: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Another recipe, by name or path: its rules are appended to this one's, and what this one leaves "
        "out (arch, file_type, imatrix, imatrix_policy, rounding, otherwise, vars, metadata) is taken from it. One "
        "level.",
        examples=["UD-IQ1_S"],
    )
    arch: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None,
        description="The archs (general.architecture) it is for, or any.",
        examples=[["deepseek2"], ["any"]],
    )
    file_type: (
        Annotated[
            str,
            AfterValidator(_known_file_type),
            WithJsonSchema({"type": "string", "enum": [*FILE_TYPES, *FILE_TYPE_ALIASES]}),
        ]
        | None
    ) = Field(default=None, description="general.file_type, and the base type given to llama-quantize.")
    imatrix: Literal["required", "optional"] | None = Field(
        default=None, description="Whether a build needs an importance matrix. Default: optional."
    )
    imatrix_policy: Annotated[str, AfterValidator(_good_policy)] | None = Field(
        default=None,
        description="What stands in for data that the importance matrix lacks: fail (the default), ones, sibling, "
        "prior, shrink:K, raise:TYPE, kv_b, or several in a row. --imatrix-policy on the command line comes before it.",
        examples=["sibling,prior"],
    )
    rounding: Annotated[
        Any, AfterValidator(_good_rounding), WithJsonSchema({"anyOf": [_A_ROUNDING, _A_POLICY]})
    ] = Field(
        default=None,
        description="How tensors are rounded: ggml (the default), coarse, feedback or feedback+gain; or {policy: NAME "
        "or FILE}, which chooses for each. All but ggml need a covariance of the inputs (docs/rounding.md). --rounding "
        "and --rounding-policy on the command line come before it and before its rules'.",
        examples=["feedback"],
    )  # fmt: skip
    vars: dict[Annotated[str, AfterValidator(_good_variable)], _TypeName] = Field(
        default={},
        description="Types by name, used as type: $NAME, and set from the command line with --set NAME=TYPE.",
        examples=[{"down": "IQ2_XXS"}],
    )
    metadata: Annotated[
        dict[
            Annotated[str, AfterValidator(_good_key)],
            Annotated[
                str,
                AfterValidator(_good_override),
                WithJsonSchema({"type": "string", "pattern": "^(str|int|float|bool):"}),
            ],
        ],
        AfterValidator(_good_metadata),
    ] = Field(
        default={},
        description="Metadata keys to set, as KEY: TYPE:VALUE, as llama-quantize's --override-kv: "
        "str of at most 127 bytes, int (written as u32), float (f32) or bool.",
        examples=[{"general.author": "str:me"}],
    )
    otherwise: (
        Annotated[
            str,
            AfterValidator(_good_otherwise),
            WithJsonSchema(
                {"type": "string", "enum": [f"mixture {name}" for name in (*FILE_TYPES, *FILE_TYPE_ALIASES)]}
            ),
        ]
        | None
    ) = Field(
        default=None,
        description="mixture NAME: what llama-quantize itself would choose, for tensors that no rule matches. As "
        "there, Q3_K, Q4_K and Q5_K mean Q3_K_M, Q4_K_M and Q5_K_M.",
        examples=["mixture Q2_K"],
    )
    rules: list[Rule] = Field(default=[], description="In order; the first that matches a tensor decides.")


SCHEMA_FILE = "recipe.schema.json"
#: keys that mark a file as a recipe when it has at least two of them
MARKS = ("arch", "base", "file_type", "imatrix", "otherwise", "rules", "vars")
_TOP_KEY = re.compile(r"""(?m)^\{?["']?([A-Za-z_][\w.-]*)["']?[ \t]*:(?=\s|$)""")
_A_MATCH = re.compile(r"""(?m)^[ \t-]+\{?[ \t]*["']?match["']?[ \t]*:[ \t]""")


def looks_like_recipe(text: str) -> bool:
    """Whether a text is meant as a recipe, even a faulty one, judged by its schema comment or its top-level keys. It
    need not be valid YAML."""
    if re.search(rf"(?m)^#.*\$schema=(\S*/)?{re.escape(SCHEMA_FILE)}\s*$", text):
        return True
    flow = text.lstrip().startswith("{")
    keys = set(re.findall(r"""["']?([A-Za-z_][\w.-]*)["']?[ \t]*:""", text) if flow else _TOP_KEY.findall(text))
    a_match = "rules" in keys and ("match" in keys if flow else _A_MATCH.search(text) is not None)
    if flow:  # the keys found include those of rules
        keys -= Rule.model_fields.keys()
    marks, known = keys.intersection(MARKS), keys.intersection(RecipeFile.model_fields)
    return (len(marks) > 1 or a_match) and 2 * len(known) > len(keys)


#: pydantic's names of mistakes, in a recipe's words
_WANTED = {
    "string_type": "should be text",
    "bool_type": "should be true or false",
    "list_type": "should be a list",
    "tuple_type": "should be a list",
    "model_type": "should be a mapping",
    "dict_type": "should be a mapping",
}


def _fields(path: Path) -> Mapping[str, Any]:
    """Return the keys known at this place of a recipe."""
    return Rule.model_fields if path[:1] == ("rules",) else RecipeFile.model_fields


def messages(
    error: ValidationError, marked: Marked, fields_of: Callable[[Path], Mapping[str, Any]] = _fields
) -> Iterator[str]:
    """Yield the mistakes in a recipe's words, each with its place. For another kind of file, `fields_of` gives the
    known keys."""
    for e in error.errors():
        path = tuple(step for step in e["loc"] if step != "[key]")
        here = marked.place(*path)
        fields = fields_of(path)
        kind, last = e["type"], str(path[-1]) if path else ""
        if kind == "extra_forbidden":
            yield f"{here}: unknown key '{last}'{did_you_mean(last, fields)}; known are {', '.join(fields)}"
        elif kind == "missing":
            yield f"{here}: is missing"
        elif kind == "value_error":
            yield f"{here}: {e['ctx']['error']}"
        elif kind in ("string_too_short", "too_short"):
            yield f"{here}: is empty"
        elif kind == "literal_error":
            yield f"{here}: should be {e['ctx']['expected']}, not {e['input']!r:.60}"
        else:
            yield f"{here}: {_WANTED.get(kind, e['msg'])}, not {e['input']!r:.60}"
