// Q2_K, Q3_K, Q4_K, Q5_K, Q6_K: super-blocks of 256 values in groups of 16 or 32. Each group has its own small scale
// (and minimum); all share one half-precision scale (and minimum).
//
//   Q2_K   84 bytes: scales[16] (scale | min << 4), qs[64], d, dmin        x = d*scale*q - dmin*min
//   Q3_K  110 bytes: hmask[32], qs[64], scales[12] (6 bits each), d        x = d*(scale-32)*(q-4)
//   Q4_K  144 bytes: d, dmin, scales[12] (6 bits each), qs[128]            x = d*scale*q - dmin*min
//   Q5_K  176 bytes: d, dmin, scales[12], qh[32], qs[128]
//   Q6_K  210 bytes: ql[128], qh[64], scales[16] (int8), d                 x = d*scale*(q-32)
//
// Reproduces quantize_row_q{2..6}_K_ref (without importance) and quantize_row_q{2..6}_K_impl (with) of
// ggml/src/ggml-quants.c, bit for bit, LANES super-blocks at once.
#include "blocks.h"
#include "k_blocks.h"
#include "k_scales.h"
#include "tables.h"

namespace quantkit::QK_ISA {

namespace {

QK_INLINE F sum_of_squares(const F* x, int n) {
    F sum{};
    for (int k = 0; k < n; ++k) sum += x[k] * x[k];
    return sum;
}

// Final levels of a group: clamp(nearest_int((x + dm) / d), 0, NMAX); if d is 0, the search's levels stay.
template <int N, int NMAX>
QK_INLINE void affine_levels(const F* x, F d, F dm, const Affine& found, I* level) {
    const I none = I(d == 0.0f);
    for (int i = 0; i < N; ++i)
        level[i] = max_of(I{}, min_of(splat(NMAX), nearest_int((x[i] + dm) / d)));
    if (any(none))
        for (int i = 0; i < N; ++i) level[i] = select(none, levels_of<NMAX>(found, x[i]), level[i]);
}

// Levels around 0 plus NMAX: clamp(nearest_int(x / d), -NMAX, NMAX - 1) + NMAX; if d is 0, found(x, i).
template <int N, int NMAX, typename Found>
QK_INLINE void symmetric_levels(const F* x, F d, Found found, I* level) {
    constexpr int ZERO = 0x00400000;  // what nearest_int subtracts
    for (int i = 0; i < N; ++i) {
        const I l = bits_of(x[i] / d + 12582912.0f) & 0x007fffff;
        level[i] = max_of(splat(ZERO - NMAX), min_of(splat(ZERO + NMAX - 1), l)) - (ZERO - NMAX);
    }
    const I none = I(d == 0.0f);
    if (any(none))
        for (int i = 0; i < N; ++i) level[i] = select(none, found(x[i], i), level[i]);
}

// The same levels as bytes, four in a word.
template <int N, int NMAX, typename Found>
QK_INLINE void symmetric_words(const F* x, F d, Found found, I* words) {
    constexpr int ZERO = 0x00400000;
    const I none = I(d == 0.0f);
    const bool some = any(none);
    for (int i = 0; i < N; i += 4) {
        I l[4];
        for (int k = 0; k < 4; ++k) l[k] = (bits_of(x[i + k] / d + 12582912.0f) & 0x007fffff) - (ZERO - NMAX);
        if (some)
            for (int k = 0; k < 4; ++k) l[k] = select(none, found(x[i + k], i + k), l[k]);
        words[i / 4] = clamped_bytes<2 * NMAX - 1>(l[0], l[1], l[2], l[3]);
    }
}

// ---------------------------------------------------------------- Q4_K, Q5_K

// Without importance: make_qkx2 searches, scales and minima in 63 steps of the largest.
template <int NMAX>
QK_INLINE void search_k45_plain(const F* x, F* w, float rmin, int nstep, Affine* found, I* ls, I* lm, F* d, F* dm) {
    for (int j = 0; j < 8; ++j) {
        const F av_x = sqrt_of(sum_of_squares(x + 32 * j, 32) / 32.0f);
        for (int l = 0; l < 32; ++l) w[32 * j + l] = av_x + abs_of(x[32 * j + l]);
    }
    F max_scale{}, max_min{};
    for (int j = 0; j < 8; j += SIDE)
        search_affine<32, NMAX, false, false, SIDE>(x + 32 * j, w + 32 * j, rmin, 0.1f, nstep, found + j);
    for (int j = 0; j < 8; ++j) {
        max_scale = max_of(found[j].scale, max_scale);
        max_min = max_of(found[j].minimum, max_min);
    }
    const F inv_scale = select(I(max_scale > 0.0f), 63.0f / max_scale, F{});
    const F inv_min = select(I(max_min > 0.0f), 63.0f / max_min, F{});
    for (int j = 0; j < 8; ++j) {
        ls[j] = min_of(splat(63), nearest_int(inv_scale * found[j].scale) & 0xff);
        lm[j] = min_of(splat(63), nearest_int(inv_min * found[j].minimum) & 0xff);
    }
    *d = max_scale / 63.0f;
    *dm = max_min / 63.0f;
}

template <int NMAX, bool WEIGHTS>
QK_INLINE void tile_k45(const float* const* xs, const float* const* ws, uint8_t* const* y) {
    alignas(64) F x[QK_K], w[QK_K];
    load_lanes<QK_K>(xs, x);
    Affine found[8];
    I ls[8], lm[8];
    F d, dm;
    if constexpr (WEIGHTS) {
        const F sum_x2 = load_importance(ws, w, x);
        search_k45_weighted<NMAX>(x, w, sum_x2, found, ls, lm, &d, &dm);
    } else if constexpr (NMAX == 15) {
        search_k45_plain<NMAX>(x, w, -1.0f, 20, found, ls, lm, &d, &dm);
    } else {
        search_k45_plain<NMAX>(x, w, -0.5f, 15, found, ls, lm, &d, &dm);
    }
    I head[3];
    pack_scales(ls, lm, head);
    const I hd = to_half(d), hdm = to_half(dm);
    const F fd = from_half(hd), fdm = from_half(hdm);
    const auto levels = [&](int j, I* level) QK_LAMBDA {
        affine_levels<32, NMAX>(x + 32 * j, fd * to_float(ls[j]), fdm * to_float(lm[j]), found[j], level);
    };
    store_k45<NMAX>(hd, hdm, head, levels, y);
}

// ---------------------------------------------------------------- Q2_K

template <bool WEIGHTS>
QK_INLINE void tile_q2_k(const float* const* xs, const float* const* ws, uint8_t* const* y) {
    alignas(64) F x[QK_K], w[QK_K];
    load_lanes<QK_K>(xs, x);
    Affine found[16];
    I ls[16], lm[16];
    F d, dm;
    if constexpr (WEIGHTS) {
        const F sum_x2 = load_importance(ws, w, x);
        search_q2_k_weighted(x, w, sum_x2, found, ls, lm, &d, &dm);
    } else {
        for (int k = 0; k < QK_K; ++k) w[k] = abs_of(x[k]);
        for (int j = 0; j < 16; j += SIDE)
            search_affine<16, 3, false, true, SIDE>(x + 16 * j, w + 16 * j, -0.5f, 0.1f, 15, found + j);
        F max_scale{}, max_min{};
        for (int j = 0; j < 16; ++j) {
            max_scale = max_of(found[j].scale, max_scale);
            max_min = max_of(found[j].minimum, max_min);
        }
        const I some_scale = I(max_scale > 0.0f), some_min = I(max_min > 0.0f);
        const F inv_scale = 15.0f / max_scale, inv_min = 15.0f / max_min;
        for (int j = 0; j < 16; ++j) {
            ls[j] = select(some_scale, nearest_int(inv_scale * found[j].scale) & 0xff, I{});
            lm[j] = select(some_min, nearest_int(inv_min * found[j].minimum), I{});
        }
        d = select(some_scale, max_scale / 15.0f, F{});
        dm = select(some_min, max_min / 15.0f, F{});
    }
    const I hd = to_half(d), hdm = to_half(dm);
    const F fd = from_half(hd), fdm = from_half(hdm);
    I level[QK_K], q[16];
    for (int j = 0; j < 16; ++j) {
        q[j] = (ls[j] | (lm[j] << 4)) & 0xff;
        affine_levels<16, 3>(x + 16 * j, fd * to_float(q[j] & 15), fdm * to_float(q[j] >> 4), found[j], level + 16 * j);
    }
    store_q2_k(hd, hdm, q, level, y);
}

// ---------------------------------------------------------------- Q3_K

template <bool WEIGHTS>
QK_INLINE void tile_q3_k(const float* const* xs, const float* const* ws, uint8_t* const* y) {
    alignas(64) F x[QK_K];
    load_lanes<QK_K>(xs, x);
    I ls[16];
    F scales[16], d;
    Symmetric found[WEIGHTS ? 16 : 1];
    F found_level[WEIGHTS ? 1 : QK_K];
    I found_zero[WEIGHTS ? 1 : 16];
    if constexpr (WEIGHTS) {
        alignas(64) F w[QK_K];
        const F sum_x2 = load_importance(ws, w, x);
        search_q3_k_weighted(x, w, sum_x2, found, scales, ls, &d);
    } else {
        F amax{}, max_scale{};
        for (int j = 0; j < 16; j += 1)
            search_q3<16, 4, 1>(x + 16 * j, found_level + 16 * j, scales + j, found_zero + j);
        for (int j = 0; j < 16; ++j) {
            const F a = abs_of(scales[j]);
            const I more = I(a > amax);
            amax = select(more, a, amax);
            max_scale = select(more, scales[j], max_scale);
        }
        const I some = I(max_scale != 0.0f);
        const F iscale = -32.0f / max_scale;
        for (int j = 0; j < 16; ++j) {
            // ggml stores the rounded scale in an int8 before it clamps
            const I l = (nearest_int(iscale * scales[j]) << 24) >> 24;
            ls[j] = select(some, max_of(splat(-32), min_of(splat(31), l)) + 32, I{});
        }
        d = select(some, 1.0f / iscale, F{});
    }
    const I hd = to_half(d);
    const F fd = from_half(hd);
    const auto words_of = [&](int j, I* words) QK_LAMBDA {
        const auto kept = [&](F at, int i) QK_LAMBDA {
            if constexpr (WEIGHTS)
                return levels_of<4>(found[j], at);
            else
                return select(found_zero[j], I{}, nearest_int(found_level[16 * j + i]) + 4);
        };
        symmetric_words<16, 4>(x + 16 * j, fd * to_float((ls[j] & 63) - 32), kept, words);
    };
    store_q3_k(hd, ls, words_of, y);
}

// ---------------------------------------------------------------- Q6_K

template <bool WEIGHTS>
QK_INLINE void tile_q6_k(const float* const* xs, const float* const* ws, uint8_t* const* y) {
    alignas(64) F x[QK_K], w[WEIGHTS ? QK_K : 1];
    load_lanes<QK_K>(xs, x);
    if constexpr (WEIGHTS) load_lanes<QK_K>(ws, w);
    I level[QK_K];
    Symmetric found[16];
    F scales[16], amax, max_scale;
    search_q6_k<WEIGHTS>(x, w, found, scales, &amax, &max_scale);
    const I zero = I(amax < GROUP_MAX_EPS);  // then the whole block is zero bytes
    const F iscale = -128.0f / max_scale;
    const I hd = select(zero, I{}, to_half(1.0f / iscale));
    const F fd = from_half(hd);
    I sc[16];
    for (int j = 0; j < 16; ++j) {
        const I s = (min_of(splat(127), nearest_int(iscale * scales[j])) << 24) >> 24;
        sc[j] = select(zero, I{}, s);
        const auto kept = [&](F at, int) QK_LAMBDA { return levels_of<32>(found[j], at); };
        symmetric_levels<16, 32>(x + 16 * j, fd * to_float(sc[j]), kept, level + 16 * j);
    }
    for (int k = 0; k < QK_K; ++k) level[k] = select(zero, I{}, level[k]);
    store_q6_k(hd, sc, level, y);
}

}  // namespace

// Makes a quantizer from a tile function with importance and one without.
using Tile = void (*)(const float* const* x, const float* const* w, uint8_t* const* y);

template <int BYTES, Tile WEIGHTED, Tile PLAIN>
QK_INLINE void run(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    if (w)
        for_each_tile<QK_K, BYTES>(x, y, n_rows, n_cols, w, [](auto... at) QK_LAMBDA { WEIGHTED(at...); });
    else
        for_each_tile<QK_K, BYTES>(x, y, n_rows, n_cols, w, [](auto... at) QK_LAMBDA { PLAIN(at...); });
}

void quantize_q2_k(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    run<84, tile_q2_k<true>, tile_q2_k<false>>(x, y, n_rows, n_cols, w);
}

void quantize_q3_k(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    run<110, tile_q3_k<true>, tile_q3_k<false>>(x, y, n_rows, n_cols, w);
}

void quantize_q4_k(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    run<144, tile_k45<15, true>, tile_k45<15, false>>(x, y, n_rows, n_cols, w);
}

void quantize_q5_k(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    run<176, tile_k45<31, true>, tile_k45<31, false>>(x, y, n_rows, n_cols, w);
}

void quantize_q6_k(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    run<210, tile_q6_k<true>, tile_q6_k<false>>(x, y, n_rows, n_cols, w);
}

}  // namespace quantkit::QK_ISA
