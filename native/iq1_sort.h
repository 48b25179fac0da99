// IQ1: what its searches share, and sorting the groups of a tile by value, LANES groups at once.
#pragma once
#include <cfloat>
#include <climits>
#include <type_traits>
#include <utility>

#include "lanes.h"

namespace quantkit::QK_ISA {

namespace {

constexpr int QK_K = 256;
constexpr float DELTA = 0.125f;

// Levels -1, 0, 1 shifted up and shifted down.
constexpr float UP[3] = {-1 + DELTA, DELTA, 1 + DELTA};
constexpr float DOWN[3] = {-1 - DELTA, -DELTA, 1 - DELTA};

// A mask's lanes as bits.
QK_INLINE uint32_t bits_set(I mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#else
    uint32_t out = 0;
    for (int i = 0; i < LANES; ++i) out |= static_cast<uint32_t>(mask[i] & 1) << i;
    return out;
#endif
}

QK_INLINE I lane_numbers() {
    I out;
    for (int i = 0; i < LANES; ++i) out[i] = i;
    return out;
}

QK_INLINE I mask_of_bits(uint32_t bits) {
#if defined(__AVX512F__)
    return reinterpret_cast<I>(_mm512_movm_epi32(static_cast<__mmask16>(bits)));
#else
    return -((splat(static_cast<int32_t>(bits)) >> lane_numbers()) & 1);
#endif
}

// out[lane] = table[index[lane]][lane].
QK_INLINE F gather(const F* table, I index) {
#if defined(__AVX512F__)
    return reinterpret_cast<F>(_mm512_i32gather_ps(reinterpret_cast<__m512i>((index << 4) + lane_numbers()), table, 4));
#elif defined(__AVX2__)
    return reinterpret_cast<F>(_mm256_i32gather_ps(reinterpret_cast<const float*>(table),
                                                   reinterpret_cast<__m256i>((index << 3) + lane_numbers()), 4));
#else
    F out;
    const float* flat = reinterpret_cast<const float*>(table);
    for (int i = 0; i < LANES; ++i) out[i] = flat[index[i] * LANES + i];
    return out;
#endif
}

// a * b + c, where the rounding does not matter.
QK_INLINE F about_fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return reinterpret_cast<F>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#else
    return a * b + c;
#endif
}

typedef std::conditional<LANES == 16, uint16_t, uint8_t>::type Bits;  // a mask's lanes

// Where x * x - a > b, up to rounding.
QK_INLINE Bits square_exceeds(F x, F a, F b) {
#if defined(__AVX512F__)
    const __m512 v = reinterpret_cast<__m512>(x), square = _mm512_fmsub_ps(v, v, reinterpret_cast<__m512>(a));
    return _mm512_cmp_ps_mask(square, reinterpret_cast<__m512>(b), _CMP_GT_OQ);
#else
    return static_cast<Bits>(bits_set(I(x * x - a > b)));
#endif
}

// Which of 16 pairs of masks have a lane set.
QK_INLINE uint32_t pairs_set(const Bits* pairs) {
#if defined(__AVX512F__)
    const __m512i v = _mm512_loadu_si512(pairs);
    return _mm512_test_epi32_mask(v, v);
#elif defined(__AVX2__)
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
    const __m256i v = _mm256_cmpeq_epi16(all, _mm256_setzero_si256());
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return 0xffffu & ~static_cast<uint32_t>(_mm_movemask_epi8(bytes));
#else
    uint32_t out = 0;
    for (int i = 0; i < 16; ++i) out |= static_cast<uint32_t>((pairs[2 * i] | pairs[2 * i + 1]) != 0) << i;
    return out;
#endif
}

// ---------------------------------------------------------------- sorting

// Batcher's odd-even merge sort as a list of pairs, made at compile time.
template <int N>
struct Network {
    int n = 0;
    int a[N * 8] = {}, b[N * 8] = {};
    constexpr void merge(int lo, int size, int step) {
        const int twice = step * 2;
        if (twice < size) {
            merge(lo, size, twice);
            merge(lo + step, size, twice);
            for (int i = lo + step; i + step < lo + size; i += twice) a[n] = i, b[n++] = i + step;
        } else {
            a[n] = lo, b[n++] = lo + step;
        }
    }
    constexpr void sort(int lo, int size) {
        if (size < 2) return;
        sort(lo, size / 2);
        sort(lo + size / 2, size / 2);
        merge(lo, size, 1);
    }
    constexpr Network() { sort(0, N); }
};

template <int N>
constexpr Network<N> NETWORK{};

template <int A, int B>
QK_INLINE void order(I* key) {
    const I a = key[A], b = key[B];
    key[A] = min_of(a, b);
    key[B] = max_of(a, b);
}

template <int N, size_t... P>
QK_INLINE void sort_keys(I* key, std::index_sequence<P...>) {
    (order<NETWORK<N>.a[P], NETWORK<N>.b[P]>(key), ...);
}

// A group of N values in each lane, also sorted.
template <int N>
struct Group {
    F x[N], w[N];
    I key[N];         // ordered like (x, position)
    I sorted[N + 1];  // the keys in order, then the largest integer; the low bits are the position
    F sorted_x[N], sorted_w[N];
};

// The general case of `sort`, for values that differ only in low bits. The keys lack these bits, so values that share
// the upper bits may be out of order. Such lanes are sorted again, stably, and their keys replaced by ranks.
template <int N>
__attribute__((noinline)) void sort_fine(Group<N>& g) {
    for (int round = 0;; ++round) {
        for (int j = 0; j < N; ++j) g.sorted_x[j] = gather(g.x, g.sorted[j] & (N - 1));
        I bad{};
        for (int j = 0; j + 1 < N; ++j) bad |= I(g.sorted_x[j] > g.sorted_x[j + 1]);
        if (round == 1 || !any(bad)) return;
        for (int lane = 0; lane < LANES; ++lane) {
            if (!bad[lane]) continue;
            int position[N];
            for (int j = 0; j < N; ++j) {
                int at = j;
                for (; at > 0 && g.x[position[at - 1]][lane] > g.x[j][lane]; --at) position[at] = position[at - 1];
                position[at] = j;
            }
            for (int j = 0; j < N; ++j) {
                const int32_t key = j * N + position[j];
                g.sorted[j][lane] = key;
                g.key[position[j]][lane] = key;
            }
        }
    }
}

// Sorts by value, and equal values by position, like ggml's qsort (glibc's merges). Fills everything but x and w.
template <int N>
QK_INLINE void sort(Group<N>& g) {
    I low{};
    for (int j = 0; j < N; ++j) {
        const I b = bits_of(g.x[j] + 0.0f);  // -0 is equal to 0
        low |= b;
        g.key[j] = ((b ^ ((b >> 31) & 0x7fffffff)) & -N) | j;
    }
    I key[N];
    for (int j = 0; j < N; ++j) key[j] = g.key[j];
    sort_keys<N>(key, std::make_index_sequence<static_cast<size_t>(NETWORK<N>.n)>());
    for (int j = 0; j < N; ++j) g.sorted[j] = key[j];
    g.sorted[N] = splat(INT_MAX);
    if (any((low & (N - 1)) != 0)) {
        sort_fine(g);
    } else {
        for (int j = 0; j < N; ++j) {
            const I k = g.sorted[j] & -N;
            g.sorted_x[j] = float_of(k ^ ((k >> 31) & (0x7fffffff & -N)));
        }
    }
    for (int j = 0; j < N; ++j) g.sorted_w[j] = gather(g.w, g.sorted[j] & (N - 1));
}

}  // namespace

}  // namespace quantkit::QK_ISA
