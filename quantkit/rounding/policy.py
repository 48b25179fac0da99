"""What rounds which tensors: the methods by name, and policies, files that choose one by role, name and type.

    # made by: quantkit rounding tune …
    policy: deepseek-v3
    title: by KLD on held-out text
    damp: 0.01                   # of the mean diagonal of the second moment; the default
    search: true                 # scales are searched; the default
    measured: {date: 2026-11-28, model: …, text: …}
    rules:                       # the first that matches a tensor decides; what none matches stays ggml's
      - {match: "blk.*.ffn_{gate,up}_exps.weight", types: [IQ1_S, IQ2_XXS], rounding: feedback, why: "KLD x 0.81",
         figures: {kld: 0.81, se: 0.01}}
      - {role: attention, rounding: ggml, why: "KLD x 1.01"}

No kernels: a plan is made with this alone.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..base.errors import RecipeError, did_you_mean, listed
from ..base.files import text_within
from ..model.catalogue import ROLES, Tensor
from ..recipe.schema import ROUNDINGS, good_pattern, known_rounding, known_type, messages
from ..recipe.selectors import matcher
from ..recipe.yaml_lines import read
from .options import DAMP

#: ggml's own rounding, and what a recipe, a policy and --rounding may say
GGML, METHODS = ROUNDINGS[0], ROUNDINGS
_MAX_BYTES = 1 << 20


class Choice(NamedTuple):
    """How a tensor is rounded, and why."""

    rounding: str
    """one of METHODS"""
    why: str
    damp: float = DAMP
    search: bool = True

    @property
    def is_ggml(self) -> bool:
        return self.rounding == GGML

    @property
    def method(self) -> str:
        """ggml, coarse or feedback"""
        return self.rounding.partition("+")[0]

    @property
    def gain(self) -> bool:
        return self.rounding.endswith("+gain")


#: types that errors can be made good within a block of, column by column or group by group
FEEDBACK_TYPES = frozenset(
    {
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
        "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    }
)  # fmt: skip


def feasible(choice: Choice, type_: str) -> Choice:
    """The choice where the type allows it; for feedback in a type without kernels of its own, coarse."""
    if choice.method != "feedback" or type_ in FEEDBACK_TYPES:
        return choice
    return choice._replace(rounding="coarse", why=f"{choice.why}; {type_} has no {choice.rounding}")


def _known_role(value: str) -> str:
    if value not in ROLES:
        raise ValueError(f"unknown role '{value:.40}'{did_you_mean(value, ROLES)}; there are {', '.join(ROLES)}")
    return value


def _damp(value: str) -> str:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number <= 1:
        raise ValueError(f"'{value:.40}' is not a share of the mean diagonal above 0 and at most 1, such as 0.01")
    return value


class PolicyRule(BaseModel):
    """Which tensors, rounded how, why."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    match: Annotated[str, Field(min_length=1), AfterValidator(good_pattern)] | None = Field(
        default=None, description="A glob over whole tensor names, as in recipes."
    )
    role: Annotated[str, AfterValidator(_known_role)] | None = Field(default=None, description="Or what they do.")
    types: list[Annotated[str, AfterValidator(known_type)]] = Field(
        default=[], description="Only where the recipe gives one of these types."
    )
    rounding: Annotated[str, AfterValidator(known_rounding)] = Field(
        description="ggml, coarse, feedback, feedback+gain."
    )
    why: str = Field(default="", description="The reason, for readers of the plan.")
    figures: dict[str, str] = Field(default={}, description="What was measured.")

    def takes(self, tensor: Tensor, type_: str) -> bool:
        """Whether it is for a tensor of that type."""
        if self.types and type_ not in self.types:
            return False
        if self.role is not None and self.role != tensor.role:
            return False
        return self.match is None or matcher(self.match).match(tensor.name) is not None


class PolicyFile(BaseModel):
    """A policy of quantkit: how which tensors are rounded."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, title="quantkit rounding policy")

    policy: Annotated[str, Field(min_length=1)] = Field(description="What it is called.")
    title: str = Field(default="", description="One line.")
    damp: Annotated[str, AfterValidator(_damp)] = Field(
        default=str(DAMP), description="Added to the diagonal, of its mean."
    )
    search: bool = Field(default=True, description="Whether scales are searched.")
    measured: dict[str, str] = Field(default={}, description="When, on which model and text, by which command.")
    rules: Annotated[list[PolicyRule], Field(min_length=1)] = Field(description="The first that matches decides.")


class Policy(NamedTuple):
    """A policy that has been read."""

    name: str
    text: str
    """as it was read"""
    file: PolicyFile

    @property
    def digest(self) -> str:
        """12 hex digits of the text's SHA-256"""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def options(self) -> dict[str, Any]:
        """Of a Choice: what holds for all tensors."""
        return {"damp": float(self.file.damp), "search": self.file.search}

    def choose(self, tensor: Tensor, type_: str) -> Choice:
        """How a tensor of that type is rounded."""
        for i, rule in enumerate(self.file.rules):
            if rule.takes(tensor, type_):
                why = f": {rule.why}" if rule.why else ""
                return Choice(rule.rounding, f"policy {self.name} rules[{i}]{why}", **self.options())
        return Choice(GGML, f"policy {self.name} has no rule for it", **self.options())


def parse(text: str, name: str) -> Policy:
    """A policy from its text; `name` is of its file, for messages. Raises RecipeError."""
    marked = read(text, name)
    if not isinstance(marked.value, dict):
        raise RecipeError(f"{name}:1 a policy is a mapping with policy and rules")

    def fields(path: Any) -> Any:
        return PolicyRule.model_fields if path[:1] == ("rules",) else PolicyFile.model_fields

    try:
        file = PolicyFile.model_validate(marked.value)
    except ValidationError as e:
        raise RecipeError(listed(list(messages(e, marked, fields)))) from None
    return Policy(file.policy, text, file)


def shipped() -> dict[str, str]:
    """Names and texts of the policies that come with quantkit."""
    folder = resources.files("quantkit.recipes") / "rounding"
    if not folder.is_dir():
        return {}
    found = {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in folder.iterdir() if f.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def text_of(name: str, folder: Path = Path()) -> tuple[str, str]:
    """The text of a policy by the name of a shipped one, or by its path from `folder`; and its file's name. Raises
    RecipeError."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and len(path.parts) < 2:
        known = shipped()
        if name in known:
            return known[name], f"{name}.yaml"
        has = f"; there are {', '.join(known)}" if known else ""
        raise RecipeError(
            f"no policy of rounding is called '{name:.80}'{did_you_mean(name, known)}{has}; one of your own is given "
            "as a path ending in .yaml"
        )
    try:
        text = text_within(folder / path, _MAX_BYTES)
    except OSError as e:
        raise RecipeError(f"{name}: cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise RecipeError(f"{name}: is not UTF-8 text: {e.reason} at byte {e.start}") from None
    if text is None:
        raise RecipeError(f"{name}: has more bytes than a policy may have ({_MAX_BYTES:,})")
    return text, path.name


def load(name: str, folder: Path = Path()) -> Policy:
    """A policy by the name of a shipped one, or by its path from `folder`. Raises RecipeError."""
    return parse(*text_of(name, folder))
