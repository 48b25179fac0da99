// The tables of quantkit's own quantizers, one for each instruction set; see dispatch.cpp.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quantkit {

// Rows of float32 to ggml blocks: x [n_rows, n_cols], y [n_rows, row bytes], w [n_cols] (the importance of each
// column) or null. n_cols is a multiple of the type's block.
using Quantizer = void (*)(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w);

struct Kernel {
    const char* type;  // ggml's name of the type, as in Python: "Q4_K"
    size_t block, block_bytes;
    Quantizer quantize;
};

struct RowKernels;  // rows.h

struct KernelSet {
    const char* name;  // "avx2", …: the value of QUANTKIT_KERNELS
    bool (*supported)();
    const Kernel* kernels;
    size_t n_kernels;
    const RowKernels* rows;
};

// Returns all sets compiled into this build, best first.
const KernelSet* kernel_sets(size_t* n);

// Returns the set with this name if the processor can run it, else null.
const KernelSet* find_set(const char* name);
const Kernel* find_kernel(const KernelSet& set, const char* type);

// Returns the best row kernels that this processor can run; plain C++ if there are none.
const RowKernels& best_rows();

}  // namespace quantkit
