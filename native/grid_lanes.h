// What the kernels of the grid types do in lanes apart from the search: a tile's signs and sums, its block
// scale, and smaller operations for which AVX2 and AVX-512 have instructions.
#pragma once
#include "lanes.h"

namespace quantkit::QK_ISA {

constexpr int QK_K = 256;
constexpr int SLAB = 32;
constexpr int SLABS = QK_K / SLAB;

// The larger (smaller) of two, b if they are equal or one is NaN; the larger of a and |b|.
#if defined(__AVX512F__)
QK_INLINE __m512 reg(F x) { return reinterpret_cast<__m512>(x); }
QK_INLINE F fast_max(F a, F b) { return reinterpret_cast<F>(_mm512_max_ps(reg(a), reg(b))); }
QK_INLINE F fast_min(F a, F b) { return reinterpret_cast<F>(_mm512_min_ps(reg(a), reg(b))); }
QK_INLINE F max_size(F a, F b) { return reinterpret_cast<F>(_mm512_range_ps(reg(a), reg(b), 0x0b)); }
QK_INLINE uint32_t lane_bits(I m) { return _mm512_movepi32_mask(reinterpret_cast<__m512i>(m)); }
#elif defined(__AVX2__)
QK_INLINE __m256 reg(F x) { return reinterpret_cast<__m256>(x); }
QK_INLINE F fast_max(F a, F b) { return reinterpret_cast<F>(_mm256_max_ps(reg(a), reg(b))); }
QK_INLINE F fast_min(F a, F b) { return reinterpret_cast<F>(_mm256_min_ps(reg(a), reg(b))); }
QK_INLINE F max_size(F a, F b) { return fast_max(a, abs_of(b)); }
QK_INLINE uint32_t lane_bits(I m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(m)));
}
// For each set of lanes, their numbers as consecutive bytes.
struct Compress {
    uint64_t lanes[256];
    constexpr Compress() : lanes() {
        for (unsigned m = 0; m < 256; ++m) {
            int n = 0;
            for (unsigned lane = 0; lane < 8; ++lane)
                if ((m >> lane) & 1) lanes[m] |= static_cast<uint64_t>(lane) << (8 * n++);
        }
    }
};
inline constexpr Compress COMPRESS;
#else
QK_INLINE F fast_max(F a, F b) { return max_of(a, b); }
QK_INLINE F fast_min(F a, F b) { return min_of(a, b); }
QK_INLINE F max_size(F a, F b) { return fast_max(a, abs_of(b)); }
QK_INLINE uint32_t lane_bits(I m) {
    uint32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits |= (static_cast<uint32_t>(m[i]) & 1u) << i;
    return bits;
}
#endif

// q = 2*level + 1 of field i in a word.
template <int DIM>
QK_INLINE F level_value(I word, int i) {
#if defined(__AVX512F__)
    if constexpr (DIM == 8)
        return reinterpret_cast<F>(_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_setr_ps(1, 3, 5, 5)),
                                                        reinterpret_cast<__m512i>(word >> (2 * i))));
    else
        return reinterpret_cast<F>(
            _mm512_permutexvar_ps(reinterpret_cast<__m512i>(word >> (4 * i)),
                                  _mm512_setr_ps(1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15)));
#elif defined(__AVX2__)
    if constexpr (DIM == 8)
        return reinterpret_cast<F>(
            _mm256_permutevar_ps(_mm256_setr_ps(1, 3, 5, 5, 1, 3, 5, 5), reinterpret_cast<__m256i>(word >> (2 * i))));
    else
        return reinterpret_cast<F>(_mm256_permutevar8x32_ps(_mm256_setr_ps(1, 3, 5, 7, 9, 11, 13, 15),
                                                            reinterpret_cast<__m256i>(word >> (4 * i))));
#else
    constexpr int FIELD = DIM == 8 ? 2 : 4;
    return to_float((((word >> (FIELD * i)) & ((1 << FIELD) - 1)) << 1) + 1);
#endif
}

// Replaces a tile's values: x without sign, w the weights; `signs`: a byte for every eight values.
template <bool PARITY>
QK_INLINE void take_signs(F* x, const F* w, I* signs) {
    for (int b = 0; b < QK_K / 8; ++b) {
        F* const xb = x + 8 * b;
        I s{}, odd{};
        F least{};
        I at{};
        for (int i = 0; i < 8; ++i) {
            const I negative = ~I(xb[i] >= 0.0f);
            if constexpr (PARITY) {
                const F ax = w[8 * b + i] * xb[i] * xb[i];
                const I less = i ? I(ax < least) : splat(-1);
                least = select(less, ax, least);
                at = select(less, splat(1 << i), at);
                odd ^= negative;
            }
            xb[i] = select(negative, -xb[i], xb[i]);
            s |= negative & (1 << i);
        }
        if constexpr (PARITY) {
            at &= odd;
            for (int i = 0; i < 8; ++i) xb[i] = select(I((at & (1 << i)) != 0), -xb[i], xb[i]);
            s = (s ^ at) & 127;
        }
        signs[b] = s;
    }
}

QK_INLINE F sum_of_squares(const F* x) {
    F sum{};
    for (int k = 0; k < QK_K; ++k) sum += x[k] * x[k];
    return sum;
}

// The block's scale and the groups' four bits: d * fudge as half (0 if all scales are), level = clamp(scale / d).
template <int N>
QK_INLINE I block_scale(const F* scales, float fudge, I* levels, I* empty) {
    F top{};
    for (int i = 0; i < N; ++i) top = max_of(top, scales[i]);
    *empty = I(top == 0.0f);
    const F d = top / 31.0f;
    const F id = 1.0f / d;
    for (int i = 0; i < N; ++i) {
        const I l = max_of(I{}, min_of(splat(15), nearest_int(0.5f * (id * scales[i] - 1.0f))));
        levels[i] = select(*empty, I{}, l);
    }
    return select(*empty, I{}, to_half(d * fudge));
}

}  // namespace quantkit::QK_ISA
