from quantkit import forward as forward
from quantkit import (
    imatrix as imatrix,
)
from quantkit import text as text
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
    check_imatrix as check_imatrix,
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
    optimize as optimize,
)
from quantkit.api import (
    plan as plan,
)
from quantkit.api import (
    quantize as quantize,
)
from quantkit.api import (
    sensitivity as sensitivity,
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
    TextError as TextError,
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
from quantkit.imatrix.matrix import Imatrix as Imatrix
from quantkit.lab.allocation.damage import Sensitivity as Sensitivity
from quantkit.lab.allocation.optimized import Optimized as Optimized
from quantkit.lab.evaluation.scores import (
    Evaluation as Evaluation,
)
from quantkit.lab.rounding_policy.tuning import (
    Tuned as Tuned,
)
from quantkit.lab.rounding_policy.tuning import (
    TuneOptions as TuneOptions,
)
from quantkit.lab.scripting import (
    Study as Study,
)
from quantkit.lab.scripting import (
    StudyOptions as StudyOptions,
)
from quantkit.lab.scripting import (
    StudyResults as StudyResults,
)
from quantkit.lab.scripting import (
    evaluate as evaluate,
)
from quantkit.lab.scripting import (
    fetched_weights as fetched_weights,
)
from quantkit.lab.scripting import (
    run_study as run_study,
)
from quantkit.lab.scripting import (
    second_moments as second_moments,
)
from quantkit.lab.scripting import (
    tune_rounding as tune_rounding,
)
from quantkit.model.catalogue import Catalogue as Catalogue
from quantkit.model.catalogue import Tensor as Tensor
from quantkit.planning.imatrix_check import Check as Check
from quantkit.planning.plan import Plan as Plan
from quantkit.planning.plan import Planned as Planned
from quantkit.recipe.load import Recipe as Recipe
from quantkit.verifying.verdict import Finding as Finding
from quantkit.verifying.verdict import Verdict as Verdict
