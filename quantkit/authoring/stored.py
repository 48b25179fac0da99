"""A GGUF as a plan with the types of its tensors, so that it can be compared with a recipe or another GGUF."""

from __future__ import annotations

from ..base.errors import SourceError
from ..gguf.types import STORED_TYPES
from ..model.catalogue import Catalogue, MlaLayout
from ..planning.plan import ImatrixStatus, Plan, Planned
from ..recipe.load import parse
from ..recipe.yaml_lines import scalar

_AS_STORED = "name: {name}\narch: [any]\nfile_type: Q8_0\notherwise: mixture Q8_0\n"


def stored_plan(catalogue: Catalogue, name: str) -> Plan:
    """Return the plan that gives a GGUF's tensors the types they have. `name` is the plan's name."""
    tensors = []
    for t in catalogue.tensors:
        nbytes = STORED_TYPES[t.source_type].row_bytes(t.n_cols) * t.n_rows
        status, why = ImatrixStatus.NOT_USED, "as the file has it"
        tensors.append(Planned(t, t.source_type, t.source_type, nbytes, "as stored", why, status))
    return Plan(catalogue, parse(_AS_STORED.format(name=scalar(name)), name), tuple(tensors), ())


def require_same_tensors(a: Catalogue, b: Catalogue) -> None:
    """Raise SourceError unless both have the same tensors with the same shapes; only then can types be compared."""
    of_a, of_b = ({t.name: t.shape for t in c.tensors} for c in (a, b))
    for have, lack, one, other in ((of_a, of_b, a, b), (of_b, of_a, b, a)):
        only = [name for name in have if name not in lack]
        if only:
            more = f" (and {len(only) - 1} more)" if len(only) > 1 else ""
            layouts = (
                f"; their layouts are {a.layout} and {b.layout}"
                if a.layout != b.layout and MlaLayout.AS_IS not in (a.layout, b.layout)
                else ""
            )
            raise SourceError(
                f"{one.model} has '{only[0]}'{more}, which {other.model} lacks{layouts}: only files with the same "
                "tensors can be compared"
            )
    odd = next((name for name, shape in of_a.items() if of_b[name] != shape), None)
    if odd is not None:
        shapes = " and ".join("x".join(map(str, of[odd])) for of in (of_a, of_b))
        raise SourceError(f"'{odd}' has other shapes in {a.model} and {b.model}: {shapes}; they are different models")
