// The frame that all lane kernels share: LANES consecutive blocks at a time, with a tail.
#pragma once
#include "lanes.h"

namespace quantkit::QK_ISA {

// Calls tile(x, w, y) for LANES blocks of BLOCK values and BYTES bytes at a time, with pointers to each lane's block,
// to its columns' importance (null if there is none) and to its place in the output. Past the end, lanes repeat the
// last block and write to a scratch place.
template <int BLOCK, int BYTES, typename Tile>
QK_INLINE void for_each_tile(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w, Tile tile) {
    const size_t per_row = n_cols / BLOCK, total = n_rows * per_row;
    uint8_t spare[BYTES];
    size_t column = 0;  // of the tile's first block, in blocks
    for (size_t b = 0; b < total; b += LANES) {
        const float* xs[LANES];
        const float* ws[LANES];
        uint8_t* ys[LANES];
        size_t c = column;
        for (int lane = 0; lane < LANES; ++lane) {
            const bool real = b + lane < total;
            const size_t at = real ? b + lane : total - 1;
            xs[lane] = x + at * BLOCK;
            ws[lane] = w ? w + (real ? c : per_row - 1) * BLOCK : nullptr;
            ys[lane] = real ? y + at * BYTES : spare;
            if (++c == per_row) c = 0;
        }
        column = c;
        tile(xs, ws, ys);
    }
}

}  // namespace quantkit::QK_ISA
