// The grid of IQ1_S and IQ1_M with the neighbour lists that ggml's iq2xs_init_impl makes of it (nwant = 3).
// Plain types only: this header is included by sources compiled for one instruction set.
#pragma once
#include <cstdint>

namespace quantkit {

// Eight levels 0, 1, 2 are a pattern (two bits each, the first lowest) or its ternary number (the first lowest).
struct Iq1Grid {
    static constexpr int N = 2048, N_TERNARY = 6561, STEP = 16;

    int16_t index[N_TERNARY];        // of the grid entry with these levels, or -1
    uint8_t ternary_of_byte[256];    // four levels as two-bit fields -> 0..80
    uint32_t begin[N_TERNARY];       // where no entry has these levels: its list of neighbours in `neighbours`,
    uint16_t n_neighbours[N_TERNARY];  // a multiple of STEP: the first is repeated at the end
    const uint16_t* neighbours;      // patterns of grid entries in ggml's order, 64 bytes aligned

    int ternary(uint32_t pattern) const { return ternary_of_byte[pattern & 255] + 81 * ternary_of_byte[pattern >> 8]; }
};

// Made at the first call, from the codebook "IQ1_S"; throws std::logic_error if that has not been set. Thread-safe.
const Iq1Grid& iq1_grid();

}  // namespace quantkit
