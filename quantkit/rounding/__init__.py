"""Better bytes in ggml's own formats: rounding with error feedback under the covariance of a tensor's inputs.

May import kernels, recipe, model, gguf and base. Offers `factor` of a covariance, `quantize` of rows under that factor,
`supported` (by which method a type can be rounded), the `Options` of the method, and its VERSION. Of its modules,
`covariance` reads second moments and says which matrix has which, `policy` says what rounds which tensors, and
`rounder` does it for a build, with ggml's bytes beside. The room `on_torch` does it on a GPU; nothing else here imports
torch, and `covariance` and `policy` import no kernels.

The bytes are valid blocks of the type that any ggml loads, of the same size as ggml's; they are not ggml's bytes. A
row's bytes depend on the row, the factor, the type and the options: not on the rows beside it, on threads, or on the
instruction set.
"""

from .factor import Factor, factor
from .options import VERSION, Method, Options
from .rows import quantize, supported

__all__ = ["VERSION", "Factor", "Method", "Options", "factor", "quantize", "supported"]
