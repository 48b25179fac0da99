// The grid of IQ1_S and IQ1_M, with the neighbour lists that ggml's iq2xs_init_impl makes for it (nwant = 3).
// Only plain types: sources compiled for one instruction set include this header.
#pragma once
#include <cstdint>

namespace quantkit {

// Eight levels 0, 1, 2 form a pattern (two bits each, the first lowest) or a ternary number (the first lowest).
//
// A point outside the grid has two lists of neighbours, as patterns: `all` are ggml's, in its order; `near` are
// those that have no other neighbour between the point and themselves (one with each level equal to the point's, to
// theirs, or between), in the same order. Where moving further from the point's level always costs more, only a near
// one can be the first cheapest of all: any other comes after, and costs no less than, the one between.
struct Iq1Grid {
    static constexpr int N = 2048, N_TERNARY = 6561;
    static constexpr int STEP = 16;  // lists begin at multiples of it, and are padded to one with their first entry

    struct List {
        uint32_t begin;  // in `neighbours`
        uint32_t n;
    };

    int16_t index[N_TERNARY];     // of the grid entry with these levels, or -1
    uint8_t ternary_of_byte[256];  // four levels as two-bit fields -> 0..80
    List near[N_TERNARY], all[N_TERNARY];
    const uint16_t* neighbours;  // aligned to 64 bytes

    int ternary(uint32_t pattern) const { return ternary_of_byte[pattern & 255] + 81 * ternary_of_byte[pattern >> 8]; }
};

// Returns this thread's own grid, kept until the thread ends. The first thread makes it from the codebook "IQ1_S",
// others copy it at first use. Throws std::logic_error if the codebook is not set. Thread-safe.
const Iq1Grid& iq1_grid();

}  // namespace quantkit
