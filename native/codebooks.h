// The tables of levels for ggml's non-linear and grid types (kvalues_iq4nl, the iq1/iq2/iq3 grids).
// They come once from Python's gguf package, through `_native.set_codebook`; kernels ask for them by name.
// Only plain types: sources compiled for one instruction set include this header.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quantkit {

// `n` entries of `k` values each, one after another, in ggml's order. Never changes and is never freed.
struct Codebook {
    size_t n, k;
    const int8_t* values;
};

// Keeps a copy under this name. The first copy stays: setting the same again does nothing, other values under its
// name throw std::invalid_argument. Thread-safe.
void set_codebook(const char* name, const int8_t* values, size_t n, size_t k);

// Returns the codebook of this name. Throws std::logic_error if it is not set, or not with n entries of k values.
// Thread-safe, but takes a lock: ask once per call, not once per block.
const Codebook& codebook(const char* name, size_t n, size_t k);

}  // namespace quantkit
