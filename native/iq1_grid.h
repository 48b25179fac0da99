// The grid of IQ1_S and IQ1_M with the neighbour lists that ggml's iq2xs_init_impl makes of it (nwant = 3).
// Plain types only: this header is included by sources compiled for one instruction set.
#pragma once
#include <cstdint>

namespace quantkit {

// Eight levels 0, 1, 2 are a pattern (two bits each, the first lowest) or its ternary number (the first lowest).
//
// A point that is no grid entry has two lists of neighbours, as patterns: `all` are ggml's, in its order; `near` are
// those of them that have no other between the point and them (each level equal to the point's, to theirs or to one
// between), in the same order. Where leaving the point's level costs more the further it goes, only a near one can be
// the first cheapest of all: one that is not near comes after, and costs no less than, the one between.
struct Iq1Grid {
    static constexpr int N = 2048, N_TERNARY = 6561;
    static constexpr int STEP = 16;  // lists begin at multiples of it, and repeat their first up to one

    struct List {
        uint32_t begin;  // in `neighbours`
        uint32_t n;
    };

    int16_t index[N_TERNARY];     // of the grid entry with these levels, or -1
    uint8_t ternary_of_byte[256];  // four levels as two-bit fields -> 0..80
    List near[N_TERNARY], all[N_TERNARY];
    const uint16_t* neighbours;  // 64 bytes aligned

    int ternary(uint32_t pattern) const { return ternary_of_byte[pattern & 255] + 81 * ternary_of_byte[pattern >> 8]; }
};

// This thread's own, kept until it ends: made at the first call of any, from the codebook "IQ1_S", copied at the first
// of another. Throws std::logic_error if the codebook has not been set. Thread-safe.
const Iq1Grid& iq1_grid();

}  // namespace quantkit
