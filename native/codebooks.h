// The tables that ggml's non-linear and grid types take their levels from (kvalues_iq4nl, the iq1/iq2/iq3 grids).
// They come from Python's gguf package, once, through `_native.set_codebook`; a kernel asks for them by name.
// Plain types only: this header is included by sources compiled for one instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quantkit {

// `n` entries of `k` values each, entry after entry, in ggml's order. Never changes and never goes away.
struct Codebook {
    size_t n, k;
    const int8_t* values;
};

// Keeps a copy under this name. The first stays: the same again is nothing, others under its name throw
// std::invalid_argument. Thread-safe.
void set_codebook(const char* name, const int8_t* values, size_t n, size_t k);

// The codebook of that name. Throws std::logic_error if it has not been set, or not with n entries of k values.
// Thread-safe; takes a lock: ask once a call, not once a block.
const Codebook& codebook(const char* name, size_t n, size_t k);

}  // namespace quantkit
