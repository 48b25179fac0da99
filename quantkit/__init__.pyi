from quantkit.api import (
    BuildOptions as BuildOptions,
)
from quantkit.api import (
    BuildResult as BuildResult,
)
from quantkit.api import (
    build as build,
)
from quantkit.api import (
    dequantize as dequantize,
)
from quantkit.api import (
    load_recipe as load_recipe,
)
from quantkit.api import (
    open_imatrix as open_imatrix,
)
from quantkit.api import (
    open_model as open_model,
)
from quantkit.api import (
    plan as plan,
)
from quantkit.api import (
    quantize as quantize,
)
from quantkit.api import (
    verify as verify,
)
from quantkit.base.errors import (
    DamageError as DamageError,
)
from quantkit.base.errors import (
    ImatrixError as ImatrixError,
)
from quantkit.base.errors import (
    InternalCheckError as InternalCheckError,
)
from quantkit.base.errors import (
    KernelError as KernelError,
)
from quantkit.base.errors import (
    OutputError as OutputError,
)
from quantkit.base.errors import (
    QuantkitError as QuantkitError,
)
from quantkit.base.errors import (
    RecipeError as RecipeError,
)
from quantkit.base.errors import (
    ResumeError as ResumeError,
)
from quantkit.base.errors import (
    SourceError as SourceError,
)
from quantkit.base.errors import (
    ToolError as ToolError,
)
from quantkit.base.errors import (
    UnsupportedError as UnsupportedError,
)
from quantkit.base.errors import (
    WeightError as WeightError,
)
from quantkit.base.version import __version__ as __version__
from quantkit.model.catalogue import Catalogue as Catalogue
from quantkit.model.catalogue import Tensor as Tensor
from quantkit.model.imatrix import Imatrix as Imatrix
from quantkit.planning.plan import Plan as Plan
from quantkit.planning.plan import Planned as Planned
from quantkit.recipe.load import Recipe as Recipe
from quantkit.verifying.verdict import Finding as Finding
from quantkit.verifying.verdict import Verdict as Verdict
