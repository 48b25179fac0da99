// Q2_K, Q3_K, Q4_K, Q5_K, Q6_K: super-blocks of 256 values in groups of 16 or 32, each group with a small scale
// (and minimum) of its own, and one half-precision scale (and minimum) for all.
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
#include "k_search.h"
#include "tables.h"

namespace quantkit::QK_ISA {

namespace {

constexpr int QK_K = 256;
constexpr int SIDE = 4;  // groups searched side by side

// Four levels as the bytes of a word.
QK_INLINE I bytes(I a, I b, I c, I d) { return a | (b << 8) | (c << 16) | (d << 24); }

// Weights of N values in place of the importance: w = w * sqrt(sigma2 + x*x). Returns their sum.
template <int N>
QK_INLINE F weigh(const F* x, F* w, F sigma2) {
    F sum{};
    for (int k = 0; k < N; ++k) {
        w[k] = w[k] * sqrt_of(sigma2 + x[k] * x[k]);
        sum += w[k];
    }
    return sum;
}

// The importance of a tile to w; returns the sum of squares of x, a long chain of additions that goes on meanwhile.
QK_INLINE F load_importance(const float* const* ws, F* w, const F* x) {
    F sum{};
    for (int j = 0; j < QK_K; j += 16) {
        load_lanes<16>(ws, w + j, j);
        for (int k = j; k < j + 16; ++k) sum += x[k] * x[k];
    }
    return sum;
}

QK_INLINE F sum_of_squares(const F* x, int n) {
    F sum{};
    for (int k = 0; k < n; ++k) sum += x[k] * x[k];
    return sum;
}

// Final levels of a group: clamp(nearest_int((x + dm) / d), 0, NMAX); where d is 0 those of the search stay.
template <int N, int NMAX>
QK_INLINE void affine_levels(const F* x, F d, F dm, const Affine& found, I* level) {
    const I none = I(d == 0.0f);
    for (int i = 0; i < N; ++i)
        level[i] = max_of(I{}, min_of(splat(NMAX), nearest_int((x[i] + dm) / d)));
    if (any(none))
        for (int i = 0; i < N; ++i) level[i] = select(none, levels_of<NMAX>(found, x[i]), level[i]);
}

// Levels around 0, NMAX added: clamp(nearest_int(x / d), -NMAX, NMAX - 1) + NMAX; where d is 0, found(x, i).
template <int N, int NMAX, typename Found>
QK_INLINE void symmetric_levels(const F* x, F d, Found found, I* level) {
    constexpr int ZERO = 0x00400000;  // of nearest_int before it subtracts
    for (int i = 0; i < N; ++i) {
        const I l = bits_of(x[i] / d + 12582912.0f) & 0x007fffff;
        level[i] = max_of(splat(ZERO - NMAX), min_of(splat(ZERO + NMAX - 1), l)) - (ZERO - NMAX);
    }
    const I none = I(d == 0.0f);
    if (any(none))
        for (int i = 0; i < N; ++i) level[i] = select(none, found(x[i], i), level[i]);
}

// The same levels as bytes, four a word.
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

// Two-bit fields of 256 levels: byte l of half h has levels 128h + l, +32, +64, +96.
QK_INLINE void store_two_bits(const I* level, uint8_t* const* y, int offset) {
    I words[16];
    for (int half = 0; half < 2; ++half)
        for (int t = 0; t < 8; ++t) {
            I b[4];
            for (int i = 0; i < 4; ++i) {
                const I* l = level + 128 * half + 4 * t + i;
                b[i] = l[0] | (l[32] << 2) | (l[64] << 4) | (l[96] << 6);
            }
            words[8 * half + t] = bytes(b[0], b[1], b[2], b[3]);
        }
    store_lanes<16>(words, y, offset);
}

// ---------------------------------------------------------------- Q4_K, Q5_K

// With importance: make_qkx3 searches, then make_qp of scales and minima.
template <int NMAX>
QK_INLINE void search_k45_weighted(const F* x, F* w, F sum_x2, Affine* found, I* ls, I* lm, F* d, F* dm) {
    F sw[8], scales[8], mins[8];
    for (int j = 0; j < 8; ++j) sw[j] = weigh<32>(x + 32 * j, w + 32 * j, 2.0f * sum_x2 / 256.0f);
    for (int j = 0; j < 8; j += SIDE)
        search_affine<32, NMAX, true, false, SIDE>(x + 32 * j, w + 32 * j, -0.9f, 0.05f, 36, found + j);
    for (int j = 0; j < 8; ++j) scales[j] = found[j].scale, mins[j] = found[j].minimum;
    *d = search_positive<8, 63>(scales, ls, sw);
    *dm = search_positive<8, 63>(mins, lm, sw);
}

// Without: make_qkx2 searches, scales and minima in 63 steps of the largest.
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

// The 12 bytes of eight 6-bit scales and minima; then they are read back from the bytes, as ggml does.
QK_INLINE void pack_scales(I* ls, I* lm, I* words) {
    I q[12];
    for (int j = 0; j < 4; ++j) {
        q[j] = (ls[j] | ((ls[j + 4] >> 4) << 6)) & 0xff;
        q[j + 4] = (lm[j] | ((lm[j + 4] >> 4) << 6)) & 0xff;
        q[j + 8] = (ls[j + 4] & 0xf) | ((lm[j + 4] & 0xf) << 4);
    }
    for (int j = 0; j < 4; ++j) {
        ls[j] = q[j] & 63;
        lm[j] = q[j + 4] & 63;
        ls[j + 4] = (q[j + 8] & 0xf) | ((q[j] >> 6) << 4);
        lm[j + 4] = (q[j + 8] >> 4) | ((q[j + 4] >> 6) << 4);
    }
    for (int i = 0; i < 3; ++i) words[i] = bytes(q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]);
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
        if constexpr (NMAX == 31)
            for (int j = 0; j < 8; ++j) ls[j] = min_of(splat(63), ls[j]), lm[j] = min_of(splat(63), lm[j]);
    } else if constexpr (NMAX == 15) {
        search_k45_plain<NMAX>(x, w, -1.0f, 20, found, ls, lm, &d, &dm);
    } else {
        search_k45_plain<NMAX>(x, w, -0.5f, 15, found, ls, lm, &d, &dm);
    }
    I head[3];
    pack_scales(ls, lm, head);
    const I hd = to_half(d), hdm = to_half(dm);
    const F fd = from_half(hd), fdm = from_half(hdm);
    I words[32], high[32] = {};
    for (int pair = 0; pair < 4; ++pair) {
        I level[64];
        for (int k = 0; k < 2; ++k) {
            const int j = 2 * pair + k;
            affine_levels<32, NMAX>(x + 32 * j, fd * to_float(ls[j]), fdm * to_float(lm[j]), found[j], level + 32 * k);
        }
        for (int t = 0; t < 8; ++t) {
            I b[4];
            for (int i = 0; i < 4; ++i) {
                const I l1 = level[4 * t + i], l2 = level[4 * t + i + 32];
                b[i] = (l1 & 15) | ((l2 & 15) << 4);
                if constexpr (NMAX == 31) high[4 * t + i] |= ((l1 >> 4) | ((l2 >> 4) << 1)) << (2 * pair);
            }
            words[8 * pair + t] = bytes(b[0], b[1], b[2], b[3]);
        }
    }
    store_word(hd | (hdm << 16), y, 0);
    for (int i = 0; i < 3; ++i) store_word(head[i], y, 4 + 4 * i);
    if constexpr (NMAX == 31) {
        I qh[8];
        for (int t = 0; t < 8; ++t) qh[t] = bytes(high[4 * t], high[4 * t + 1], high[4 * t + 2], high[4 * t + 3]);
        store_lanes<8>(qh, y, 16);
    }
    store_lanes<32>(words, y, NMAX == 31 ? 48 : 16);
}

// ---------------------------------------------------------------- Q2_K

template <bool WEIGHTS>
QK_INLINE void tile_q2_k(const float* const* xs, const float* const* ws, uint8_t* const* y) {
    alignas(64) F x[QK_K], w[QK_K];
    load_lanes<QK_K>(xs, x);
    Affine found[16];
    I ls[16], lm[16];
    F d, dm, scales[16], mins[16];
    if constexpr (WEIGHTS) {
        const F sum_x2 = load_importance(ws, w, x);
        F sw[16];
        for (int j = 0; j < 16; ++j) sw[j] = weigh<16>(x + 16 * j, w + 16 * j, sum_x2 / 256.0f);
        for (int j = 0; j < 16; j += SIDE)
            search_affine<16, 3, true, false, SIDE>(x + 16 * j, w + 16 * j, -0.9f, 0.05f, 36, found + j);
        for (int j = 0; j < 16; ++j) scales[j] = found[j].scale, mins[j] = found[j].minimum;
        d = search_positive<16, 15>(scales, ls, sw);
        dm = search_positive<16, 15>(mins, lm, sw);
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
    for (int i = 0; i < 4; ++i) store_word(bytes(q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]), y, 4 * i);
    store_two_bits(level, y, 16);
    store_word(hd | (hdm << 16), y, 80);
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
        F sw[16];
        for (int j = 0; j < 16; ++j) {
            sw[j] = weigh<16>(x + 16 * j, w + 16 * j, 2.0f * sum_x2 / 256.0f);
            found[j] = search_symmetric<16, 4, true>(x + 16 * j, w + 16 * j);
            scales[j] = found[j].scale;
        }
        const Symmetric block = all_finite<16>(scales) ? search_symmetric<16, 32, true>(scales, sw)
                                                       : search_symmetric<16, 32, true, false>(scales, sw);
        for (int j = 0; j < 16; ++j) ls[j] = levels_of<32>(block, scales[j]);
        d = block.scale;
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
            // ggml keeps the rounded scale as int8 before it clamps
            const I l = (nearest_int(iscale * scales[j]) << 24) >> 24;
            ls[j] = select(some, max_of(splat(-32), min_of(splat(31), l)) + 32, I{});
        }
        d = select(some, 1.0f / iscale, F{});
    }
    const I hd = to_half(d);
    const F fd = from_half(hd);
    I q[12] = {};
    for (int j = 0; j < 16; ++j) {
        if (j < 8)
            q[j] = ls[j] & 0xf;
        else
            q[j - 8] |= (ls[j] & 0xf) << 4;
        q[8 + j % 4] |= ((ls[j] >> 4) & 3) << (2 * (j / 4));
    }
    I hmask[8] = {}, qs[16] = {};
    for (int j = 0; j < 16; ++j) {
        const auto kept = [&](F at, int i) QK_LAMBDA {
            if constexpr (WEIGHTS)
                return levels_of<4>(found[j], at);
            else
                return select(found_zero[j], I{}, nearest_int(found_level[16 * j + i]) + 4);
        };
        I words[4];
        symmetric_words<16, 4>(x + 16 * j, fd * to_float((ls[j] & 63) - 32), kept, words);
        for (int t = 0; t < 4; ++t) {
            const int at = 4 * (j % 2) + t;  // of the 8 words that 32 values make
            hmask[at] |= (words[t] >> 2 & 0x01010101) << (j / 2);
            qs[8 * (j / 8) + at] |= (words[t] & 0x03030303) << (2 * (j / 2 % 4));
        }
    }
    store_lanes<8>(hmask, y, 0);
    store_lanes<16>(qs, y, 32);
    for (int i = 0; i < 3; ++i) store_word(bytes(q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]), y, 96 + 4 * i);
    store_word(hd, y, 108, 2);
}

// ---------------------------------------------------------------- Q6_K

template <bool WEIGHTS>
QK_INLINE void tile_q6_k(const float* const* xs, const float* const* ws, uint8_t* const* y) {
    alignas(64) F x[QK_K], w[WEIGHTS ? QK_K : 1];
    load_lanes<QK_K>(xs, x);
    if constexpr (WEIGHTS) load_lanes<QK_K>(ws, w);
    I level[QK_K];
    Symmetric found[16];
    F scales[16], amax{}, max_scale{};
    for (int j = 0; j < 16; ++j) {
        found[j] = search_symmetric<16, 32, WEIGHTS>(x + 16 * j, WEIGHTS ? w + 16 * j : nullptr);
        scales[j] = found[j].scale;
        const F a = abs_of(scales[j]);
        const I more = I(a > amax);
        amax = select(more, a, amax);
        max_scale = select(more, scales[j], max_scale);
    }
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
    I ql[32], qh[16];
    for (int half = 0; half < 2; ++half)
        for (int t = 0; t < 8; ++t) {
            I a[4], b[4], h[4];
            for (int i = 0; i < 4; ++i) {
                const I* l = level + 128 * half + 4 * t + i;
                a[i] = (l[0] & 15) | ((l[64] & 15) << 4);
                b[i] = (l[32] & 15) | ((l[96] & 15) << 4);
                h[i] = (l[0] >> 4) | ((l[32] >> 4) << 2) | ((l[64] >> 4) << 4) | ((l[96] >> 4) << 6);
            }
            ql[16 * half + t] = bytes(a[0], a[1], a[2], a[3]);
            ql[16 * half + 8 + t] = bytes(b[0], b[1], b[2], b[3]);
            qh[8 * half + t] = bytes(h[0], h[1], h[2], h[3]);
        }
    store_lanes<32>(ql, y, 0);
    store_lanes<16>(qh, y, 128);
    for (int i = 0; i < 4; ++i)
        store_word(bytes(sc[4 * i] & 255, sc[4 * i + 1] & 255, sc[4 * i + 2] & 255, sc[4 * i + 3] & 255), y,
                   192 + 4 * i);
    store_word(hd, y, 208, 2);
}

}  // namespace

// A quantizer from a tile with importance and one without.
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
