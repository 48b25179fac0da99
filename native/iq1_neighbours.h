// IQ1: the best neighbour of eight values whose levels are not in the grid (ggml's iq1_find_best_neighbour2).
#pragma once
#include "iq1_grid.h"
#include "iq1_sort.h"

namespace quantkit::QK_ISA {

namespace {

// The costs of three levels for each of eight values, as tables that repeat every 128 bits.
QK_INLINE void cost_tables(const float* x, const float* w, float scale, const float* levels, F* table) {
#if defined(__AVX2__)
    const __m256 xv = _mm256_loadu_ps(x), wv = _mm256_loadu_ps(w);
    __m256 cost[3];
    for (int l = 0; l < 3; ++l) {
        const __m256 diff = _mm256_sub_ps(_mm256_set1_ps(scale * levels[l]), xv);
        cost[l] = _mm256_mul_ps(_mm256_mul_ps(wv, diff), diff);
    }
    const __m256 low = _mm256_unpacklo_ps(cost[0], cost[1]), high = _mm256_unpackhi_ps(cost[0], cost[1]);
    const __m256 both[4] = {_mm256_shuffle_ps(low, cost[2], 0x44), _mm256_shuffle_ps(low, cost[2], 0x5e),
                            _mm256_shuffle_ps(high, cost[2], 0xa4), _mm256_shuffle_ps(high, cost[2], 0xfe)};
    for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
        const __m512 t = _mm512_castps256_ps512(both[i]);
        table[i] = reinterpret_cast<F>(_mm512_shuffle_f32x4(t, t, 0x00));
        table[i + 4] = reinterpret_cast<F>(_mm512_shuffle_f32x4(t, t, 0x55));
#else
        table[i] = reinterpret_cast<F>(_mm256_permute2f128_ps(both[i], both[i], 0x00));
        table[i + 4] = reinterpret_cast<F>(_mm256_permute2f128_ps(both[i], both[i], 0x11));
#endif
    }
#else
    for (int i = 0; i < 8; ++i)
        for (int l = 0; l < LANES; ++l) {
            const float diff = scale * levels[l % 4 % 3] - x[i];
            table[i][l] = w[i] * diff * diff;
        }
#endif
}

// out[i] = table[i with its two low bits replaced by those of index[i]].
QK_INLINE F lookup(F table, I index) {
#if defined(__AVX512F__)
    return reinterpret_cast<F>(_mm512_permutevar_ps(reinterpret_cast<__m512>(table), reinterpret_cast<__m512i>(index)));
#elif defined(__AVX2__)
    return reinterpret_cast<F>(_mm256_permutevar_ps(reinterpret_cast<__m256>(table), reinterpret_cast<__m256i>(index)));
#else
    F out;
    for (int i = 0; i < LANES; ++i) out[i] = table[(i & ~3) | (index[i] & 3)];
    return out;
#endif
}

QK_INLINE I widen(const uint16_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<I>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    return reinterpret_cast<I>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    I out;
    for (int i = 0; i < LANES; ++i) out[i] = p[i];
    return out;
#endif
}

// The lowest of the lanes, in every lane.
QK_INLINE F least_of(F x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m512 v = reinterpret_cast<__m512>(x);
    __m256 m = _mm256_min_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
    __m256 m = reinterpret_cast<__m256>(x);
#endif
    __m128 n = _mm_min_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    n = _mm_min_ps(n, _mm_movehl_ps(n, n));
    n = _mm_min_ss(n, _mm_shuffle_ps(n, n, 1));
    return splat(_mm_cvtss_f32(n));
#else
    float least = x[0];
    for (int i = 1; i < LANES; ++i) least = x[i] < least ? x[i] : least;
    return splat(least);
#endif
}

// iq1_find_best_neighbour2: the pattern of the neighbour nearest to x, the first of equals. x and w are a lane's
// eight values in a row.
//
// The list `near` suffices if each value has the level nearest to it: then |scale * q - x| in floats grows with
// each step away from that level (rounding is monotone, and there is room at the cuts between two levels), so neither
// the cost of a value nor the sum ever falls.
QK_INLINE uint32_t best_neighbour(const uint16_t* list, int n, const float* x, const float* w, float scale,
                                  const float* levels) {
    constexpr int PART = 64;
    F table[8];
    cost_tables(x, w, scale, levels, table);
    float best = FLT_MAX;
    int found = 0;
    for (int start = 0; start < n; start += PART) {
        F sums[PART / LANES], low = splat(FLT_MAX);
        const int steps = ((n - start < PART ? n - start : PART) + LANES - 1) / LANES;
        for (int step = 0; step < steps; ++step) {
            const I p = widen(list + start + LANES * step);
            F sum = lookup(table[0], p);
#pragma GCC unroll 8
            for (int i = 1; i < 8; ++i) sum += lookup(table[i], p >> (2 * i));
            sums[step] = sum;
            low = min_of(sum, low);
        }
        low = least_of(low);
        uint64_t equal = 0;
        for (int step = 0; step < steps; ++step)
            equal |= static_cast<uint64_t>(bits_set(I(sums[step] == low))) << (LANES * step);
        if (low[0] < best) {
            best = low[0];
            found = start + __builtin_ctzll(equal);
        }
    }
    return list[found];
}

}  // namespace

}  // namespace quantkit::QK_ISA
