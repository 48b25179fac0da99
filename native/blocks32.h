// What the types with blocks of 32 values share: packing the levels of LANES blocks into bytes.
#pragma once
#include "lanes.h"

namespace quantkit::QK_ISA {

// Blocks that end with qs[16] (low four bits of level j, and of level j + 16 above them), preceded for
// five-bit levels by qh (bit j: the fifth bit of level j), and before that by the half-precision `head`: HEAD bytes.
template <int HEAD, bool FIVE_BITS>
QK_INLINE void store_blocks32(const I* level, I head, uint8_t* const* y) {
    constexpr int WORDS = FIVE_BITS ? 6 : 5, SKIP = 4 - HEAD, BYTES = 4 * WORDS - SKIP;
    I words[8] = {};
    words[0] = HEAD == 2 ? I(head << 16) : head;
    for (int t = 0; t < 4; ++t) {
        I word{};
        for (int i = 0; i < 4; ++i) {
            const I a = level[4 * t + i], b = level[4 * t + i + 16];
            word |= ((a & 15) | ((b & 15) << 4)) << (8 * i);
        }
        words[WORDS - 4 + t] = word;
    }
    if constexpr (FIVE_BITS) {
        I high{};
        for (int j = 0; j < 32; ++j) high |= I(reinterpret_cast<U>(level[j]) >> 4) << j;
        words[1] = high;
    }
    alignas(64) uint8_t scratch[LANES][32];
    uint8_t* to[LANES];
    for (int lane = 0; lane < LANES; ++lane) to[lane] = scratch[lane];
    store_lanes<8>(words, to, 0);
    for (int lane = 0; lane < LANES; ++lane) std::memcpy(y[lane], scratch[lane] + SKIP, BYTES);
}

}  // namespace quantkit::QK_ISA
