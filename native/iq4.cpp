// IQ4_NL, IQ4_XS: four-bit indices into 16 levels that lie closer together near zero (ggml's kvalues_iq4nl).
//
//   IQ4_NL   18 bytes for 32 values: d, qs[16]                                    x = d*level[q]
//   IQ4_XS  136 bytes for 256: d, scales_h (8 times 2 bits), scales_l[4], qs[128]  x = d*(scale-32)*level[q]
//
// Reproduces quantize_row_iq4_nl_impl of ggml/src/ggml-quants.c with ntry = 7, for super-blocks of 32 and of 256,
// with and without importance, LANES super-blocks at once.
#include "blocks.h"
#include "blocks32.h"
#include "iq4_levels.h"
#include "tables.h"

namespace quantkit::QK_ISA {

namespace {

constexpr int QK_K = 256;

template <bool WEIGHTS>
QK_INLINE void tile_iq4_nl(const Levels& levels, const float* const* xs, const float* const* ws, uint8_t* const* y) {
    F x[32], w[32];
    load_lanes<32>(xs, x);
    if constexpr (WEIGHTS) load_lanes<32>(ws, w);
    weigh<32, WEIGHTS>(x, w);
    const F scale = scale_of(levels, x, w), id = inverse_of(scale);
    I level[32];
    for (int j = 0; j < 32; ++j) level[j] = index_of(levels, id * x[j]).value();
    store_blocks32<2, false>(level, to_half(scale), y);
}

template <bool WEIGHTS>
QK_INLINE void tile_iq4_xs(const Levels& levels, const float* const* xs, const float* const* ws, uint8_t* const* y) {
    F x[QK_K], w[QK_K];
    load_lanes<QK_K>(xs, x);
    if constexpr (WEIGHTS) load_lanes<QK_K>(ws, w);
    weigh<QK_K, WEIGHTS>(x, w);
    F scales[8];
    const F d = scale_iq4_xs(levels, x, w, scales), id = inverse_of(d);
    I words[32], scales_h{}, scales_l{};
    for (int b = 0; b < 8; ++b) {
        const I l = max_of(splat(-32), min_of(splat(31), nearest_int(id * scales[b])));
        const F idl = inverse_of(d * to_float(l));
        scales_l |= ((l + 32) & 15) << (4 * b);
        scales_h |= ((l + 32) >> 4) << (2 * b);
        for (int t = 0; t < 4; ++t) {
            I word{};
            for (int i = 0; i < 4; ++i) {
                const F* xj = x + 32 * b + 4 * t + i;
                const I low = index_of(levels, idl * xj[0]).value(), high = index_of(levels, idl * xj[16]).value();
                word |= (low | (high << 4)) << (8 * i);
            }
            words[4 * b + t] = word;
        }
    }
    store_word(to_half(d) | (scales_h << 16), y, 0);
    store_word(scales_l, y, 4);
    store_lanes<32>(words, y, 8);
}

}  // namespace

void quantize_iq4_nl(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    const Levels levels(codebook("IQ4_NL", 1, 16));
    if (w)
        for_each_tile<32, 18>(x, y, n_rows, n_cols, w,
                              [&](auto xs, auto ws, auto ys) { tile_iq4_nl<true>(levels, xs, ws, ys); });
    else
        for_each_tile<32, 18>(x, y, n_rows, n_cols, w,
                              [&](auto xs, auto ws, auto ys) { tile_iq4_nl<false>(levels, xs, ws, ys); });
}

void quantize_iq4_xs(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    const Levels levels(codebook("IQ4_NL", 1, 16));
    if (w)
        for_each_tile<QK_K, 136>(x, y, n_rows, n_cols, w,
                                 [&](auto xs, auto ws, auto ys) { tile_iq4_xs<true>(levels, xs, ws, ys); });
    else
        for_each_tile<QK_K, 136>(x, y, n_rows, n_cols, w,
                                 [&](auto xs, auto ws, auto ys) { tile_iq4_xs<false>(levels, xs, ws, ys); });
}

}  // namespace quantkit::QK_ISA
