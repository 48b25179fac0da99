// Finds the nearest grid point as ggml's iq2_find_best_neighbour and iq3_find_best_neighbour do, at two scales at once.
//
// A cost is the sum over DIM values of w*(s*q - x)*(s*q - x), where q takes only 3 (DIM 8) or 8 (DIM 4) values. The
// terms are computed once for each value and scale, as in ggml; those of each neighbour are picked out of registers
// and added in ggml's order. So every cost is the same float as in ggml, and so is the choice of the first lowest one.
//
// Ends<DIM> holds the terms at the scales `a` and `b`; Costs holds the costs of W neighbours at both.
#pragma once
#include <type_traits>

#include "grids.h"
#include "lanes.h"

namespace quantkit::QK_ISA {

// Bits for W neighbours, at both scales.
struct Bits {
    uint32_t a, b;
};

template <int DIM>
struct Ends;

#if defined(__AVX512F__)

// Low half of a register: scale a; high half: scale b.
struct HalvesOf16 {
    static constexpr int W = 8;
    typedef __m512 Costs;

    static QK_INLINE Costs load(const float* from) { return _mm512_load_ps(from); }
    static QK_INLINE void store(Costs x, float* to) { _mm512_store_ps(to, x); }
    static QK_INLINE Costs least(Costs x, Costs y) { return _mm512_min_ps(x, y); }
    // each scale's lowest cost, in all of its places
    static QK_INLINE Costs least_of(Costs x) {
        x = _mm512_min_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
        x = _mm512_min_ps(x, _mm512_permute_ps(x, 0x4e));
        return _mm512_min_ps(x, _mm512_permute_ps(x, 0xb1));
    }
    static QK_INLINE Costs plus(Costs x, float y) { return _mm512_add_ps(x, _mm512_set1_ps(y)); }
    static QK_INLINE Bits split(uint32_t m) { return {m & 0xff, m >> 8}; }
    static QK_INLINE Bits equal(Costs x, Costs y) { return split(_mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ)); }
    static QK_INLINE Bits not_above(Costs x, Costs y) { return split(_mm512_cmp_ps_mask(x, y, _CMP_NGT_UQ)); }

    static QK_INLINE __m512 both(float a, float b) {
        return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(a), _mm512_set1_ps(b));
    }
    static QK_INLINE __m512 term(__m512 sq, float x, float w) {
        const __m512 diff = _mm512_sub_ps(sq, _mm512_set1_ps(x));
        return _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(w), diff), diff);
    }
    // eight words as 32-bit numbers, twice
    static QK_INLINE __m512i spread(const uint16_t* words) {
        const __m512i w = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(words)));
        const __m512i to = _mm512_set_epi64(
            static_cast<int64_t>(0x80800f0e80800d0cull), static_cast<int64_t>(0x80800b0a80800908ull),
            static_cast<int64_t>(0x8080070680800504ull), static_cast<int64_t>(0x8080030280800100ull),
            static_cast<int64_t>(0x80800f0e80800d0cull), static_cast<int64_t>(0x80800b0a80800908ull),
            static_cast<int64_t>(0x8080070680800504ull), static_cast<int64_t>(0x8080030280800100ull));
        return _mm512_shuffle_epi8(w, to);
    }
};

template <>
struct Ends<8> : HalvesOf16 {
    __m512 t[8];

    QK_INLINE Ends(const float* x, const float* w, float a, float b) {
        const __m512 q = _mm512_broadcast_f32x4(_mm_setr_ps(1, 3, 5, 5));
        const __m512 sq = _mm512_mul_ps(both(a, b), q);
        for (int i = 0; i < 8; ++i) t[i] = term(sq, x[i], w[i]);
    }
    QK_INLINE Costs costs(const uint16_t* words) const {
        const __m512i idx = spread(words);
        __m512 sum = _mm512_permutevar_ps(t[0], idx);  // uses the two low bits of an index
        for (int i = 1; i < 8; ++i)
            sum = _mm512_add_ps(sum, _mm512_permutevar_ps(t[i], _mm512_srli_epi32(idx, static_cast<unsigned>(2 * i))));
        return sum;
    }
};

template <>
struct Ends<4> : HalvesOf16 {
    __m512 t[4];

    QK_INLINE Ends(const float* x, const float* w, float a, float b) {
        const __m512 q = _mm512_setr_ps(1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
        const __m512 sq = _mm512_mul_ps(both(a, b), q);
        for (int i = 0; i < 4; ++i) t[i] = term(sq, x[i], w[i]);
    }
    QK_INLINE Costs costs(const uint16_t* words) const {
        const __m512i high = _mm512_mask_blend_epi32(0xff00, _mm512_setzero_si512(), _mm512_set1_epi32(0x8888));
        const __m512i idx = _mm512_or_si512(spread(words), high);
        __m512 sum = _mm512_permutexvar_ps(idx, t[0]);  // uses the four low bits of an index
        for (int i = 1; i < 4; ++i)
            sum = _mm512_add_ps(sum, _mm512_permutexvar_ps(_mm512_srli_epi32(idx, static_cast<unsigned>(4 * i)), t[i]));
        return sum;
    }
};

#elif defined(__AVX2__)

template <>
struct Ends<8> {
    static constexpr int W = 4;
    typedef __m256 Costs;
    __m256 t[8];

    QK_INLINE Ends(const float* x, const float* w, float a, float b) {
        const __m256 s = _mm256_blend_ps(_mm256_set1_ps(a), _mm256_set1_ps(b), 0xf0);
        const __m256 sq = _mm256_mul_ps(s, _mm256_setr_ps(1, 3, 5, 5, 1, 3, 5, 5));
        for (int i = 0; i < 8; ++i) {
            const __m256 diff = _mm256_sub_ps(sq, _mm256_set1_ps(x[i]));
            t[i] = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(w[i]), diff), diff);
        }
    }
    QK_INLINE Costs costs(const uint16_t* words) const {
        long long four;
        std::memcpy(&four, words, sizeof four);
        const __m256i to = _mm256_setr_epi8(0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1,  //
                                            0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1);
        const __m256i idx = _mm256_shuffle_epi8(_mm256_set1_epi64x(four), to);
        __m256 sum = _mm256_permutevar_ps(t[0], idx);  // uses the two low bits of an index
        for (int i = 1; i < 8; ++i) sum = _mm256_add_ps(sum, _mm256_permutevar_ps(t[i], _mm256_srli_epi32(idx, 2 * i)));
        return sum;
    }
    static QK_INLINE Costs load(const float* from) { return _mm256_load_ps(from); }
    static QK_INLINE void store(Costs x, float* to) { _mm256_store_ps(to, x); }
    static QK_INLINE Costs least(Costs x, Costs y) { return _mm256_min_ps(x, y); }
    static QK_INLINE Costs least_of(Costs x) {
        x = _mm256_min_ps(x, _mm256_permute_ps(x, 0x4e));
        return _mm256_min_ps(x, _mm256_permute_ps(x, 0xb1));
    }
    static QK_INLINE Costs plus(Costs x, float y) { return _mm256_add_ps(x, _mm256_set1_ps(y)); }
    static QK_INLINE Bits split(__m256 m) {
        const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_ps(m));
        return {bits & 15, bits >> 4};
    }
    static QK_INLINE Bits equal(Costs x, Costs y) { return split(_mm256_cmp_ps(x, y, _CMP_EQ_OQ)); }
    static QK_INLINE Bits not_above(Costs x, Costs y) { return split(_mm256_cmp_ps(x, y, _CMP_NGT_UQ)); }
};

template <>
struct Ends<4> {
    static constexpr int W = 8;
    struct Costs {
        __m256 a, b;
    };
    __m256 ta[4], tb[4];

    QK_INLINE Ends(const float* x, const float* w, float a, float b) {
        const __m256 q = _mm256_setr_ps(1, 3, 5, 7, 9, 11, 13, 15);
        const __m256 sa = _mm256_mul_ps(_mm256_set1_ps(a), q), sb = _mm256_mul_ps(_mm256_set1_ps(b), q);
        for (int i = 0; i < 4; ++i) {
            const __m256 xi = _mm256_set1_ps(x[i]), wi = _mm256_set1_ps(w[i]);
            const __m256 da = _mm256_sub_ps(sa, xi), db = _mm256_sub_ps(sb, xi);
            ta[i] = _mm256_mul_ps(_mm256_mul_ps(wi, da), da);
            tb[i] = _mm256_mul_ps(_mm256_mul_ps(wi, db), db);
        }
    }
    QK_INLINE Costs costs(const uint16_t* words) const {
        __m256i idx = _mm256_cvtepu16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(words)));
        Costs sum{_mm256_permutevar8x32_ps(ta[0], idx), _mm256_permutevar8x32_ps(tb[0], idx)};
        for (int i = 1; i < 4; ++i) {
            idx = _mm256_srli_epi32(idx, 4);
            sum.a = _mm256_add_ps(sum.a, _mm256_permutevar8x32_ps(ta[i], idx));
            sum.b = _mm256_add_ps(sum.b, _mm256_permutevar8x32_ps(tb[i], idx));
        }
        return sum;
    }
    static QK_INLINE Costs load(const float* from) { return {_mm256_load_ps(from), _mm256_load_ps(from + W)}; }
    static QK_INLINE void store(Costs x, float* to) {
        _mm256_store_ps(to, x.a);
        _mm256_store_ps(to + W, x.b);
    }
    static QK_INLINE Costs least(Costs x, Costs y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
    static QK_INLINE Costs least_of(Costs x) {
        // combine the lower halves of both in one register, then separate them again
        __m256 m = _mm256_min_ps(_mm256_permute2f128_ps(x.a, x.b, 0x20), _mm256_permute2f128_ps(x.a, x.b, 0x31));
        m = _mm256_min_ps(m, _mm256_permute_ps(m, 0x4e));
        m = _mm256_min_ps(m, _mm256_permute_ps(m, 0xb1));
        return {_mm256_permute2f128_ps(m, m, 0x00), _mm256_permute2f128_ps(m, m, 0x11)};
    }
    static QK_INLINE Costs plus(Costs x, float y) {
        return {_mm256_add_ps(x.a, _mm256_set1_ps(y)), _mm256_add_ps(x.b, _mm256_set1_ps(y))};
    }
    static QK_INLINE Bits bits(__m256 a, __m256 b) {
        return {static_cast<uint32_t>(_mm256_movemask_ps(a)), static_cast<uint32_t>(_mm256_movemask_ps(b))};
    }
    static QK_INLINE Bits equal(Costs x, Costs y) {
        return bits(_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ));
    }
    static QK_INLINE Bits not_above(Costs x, Costs y) {
        return bits(_mm256_cmp_ps(x.a, y.a, _CMP_NGT_UQ), _mm256_cmp_ps(x.b, y.b, _CMP_NGT_UQ));
    }
};

#else

template <int DIM>
struct Ends {
    static constexpr int W = 4, LEVELS = DIM == 8 ? 3 : 8, FIELD = DIM == 8 ? 2 : 4;
    struct Costs {
        float v[2][W];
    };
    float t[2][DIM][LEVELS];

    QK_INLINE Ends(const float* x, const float* w, float a, float b) {
        for (int end = 0; end < 2; ++end)
            for (int i = 0; i < DIM; ++i)
                for (int l = 0; l < LEVELS; ++l) {
                    const float diff = (end ? b : a) * static_cast<float>(2 * l + 1) - x[i];
                    t[end][i][l] = w[i] * diff * diff;
                }
    }
    QK_INLINE Costs costs(const uint16_t* words) const {
        Costs out;
        for (int end = 0; end < 2; ++end)
            for (int j = 0; j < W; ++j) {
                float sum = t[end][0][words[j] & ((1 << FIELD) - 1)];
                for (int i = 1; i < DIM; ++i) sum += t[end][i][(words[j] >> (FIELD * i)) & ((1 << FIELD) - 1)];
                out.v[end][j] = sum;
            }
        return out;
    }
    static QK_INLINE Costs load(const float* from) {
        Costs out;
        std::memcpy(&out, from, sizeof out);
        return out;
    }
    static QK_INLINE void store(const Costs& x, float* to) { std::memcpy(to, &x, sizeof x); }
    static QK_INLINE Costs least(Costs x, Costs y) {
        for (int end = 0; end < 2; ++end)
            for (int j = 0; j < W; ++j) x.v[end][j] = x.v[end][j] < y.v[end][j] ? x.v[end][j] : y.v[end][j];
        return x;
    }
    static QK_INLINE Costs least_of(Costs x) {
        for (int end = 0; end < 2; ++end) {
            float m = x.v[end][0];
            for (int j = 1; j < W; ++j) m = x.v[end][j] < m ? x.v[end][j] : m;
            for (int j = 0; j < W; ++j) x.v[end][j] = m;
        }
        return x;
    }
    static QK_INLINE Costs plus(Costs x, float y) {
        for (int end = 0; end < 2; ++end)
            for (int j = 0; j < W; ++j) x.v[end][j] += y;
        return x;
    }
    static QK_INLINE Bits equal(Costs x, Costs y) {
        Bits out{0, 0};
        for (int j = 0; j < W; ++j) {
            out.a |= static_cast<uint32_t>(x.v[0][j] == y.v[0][j]) << j;
            out.b |= static_cast<uint32_t>(x.v[1][j] == y.v[1][j]) << j;
        }
        return out;
    }
    static QK_INLINE Bits not_above(Costs x, Costs y) {
        Bits out{0, 0};
        for (int j = 0; j < W; ++j) {
            out.a |= static_cast<uint32_t>(!(x.v[0][j] > y.v[0][j])) << j;
            out.b |= static_cast<uint32_t>(!(x.v[1][j] > y.v[1][j])) << j;
        }
        return out;
    }
};

#endif

// Results for a list of neighbours at both scales: the first of lowest cost; whether each leads all others by more
// than `margin`; and how far the other scale's choice is behind at each scale.
struct Found {
    uint16_t a, b;
    bool clear;
    float behind_a, behind_b;
};

template <typename T>
QK_INLINE bool single(T bits) {
    return (bits & (bits - 1)) == 0;
}

// Where the cost of a list's neighbour is stored: W at scale a and W at scale b, alternating.
template <int W>
QK_INLINE unsigned place(unsigned i) {
    return i + (i & ~static_cast<unsigned>(W - 1));
}

// `cost`: the costs of the list.
template <int W>
QK_INLINE Found found(const float* cost, const uint16_t* list, int a, int b, bool clear) {
    const unsigned in_a = place<W>(static_cast<unsigned>(a)), in_b = place<W>(static_cast<unsigned>(b));
    return {list[a], list[b], clear, cost[in_b] - cost[in_a], cost[in_a + W] - cost[in_b + W]};
}

// From the stored costs of a list of n: N_VECTORS * W >= n > (N_VECTORS - 1) * W, at most 64.
template <int DIM, int N_VECTORS>
QK_INLINE Found nearest(const float* stored, const uint16_t* list, int n, float margin) {
    typedef Ends<DIM> E;
    typedef std::conditional_t<N_VECTORS * E::W <= 32, uint32_t, uint64_t> Mask;
    static_assert(N_VECTORS * E::W <= 64);
    typename E::Costs cost[N_VECTORS];
    for (int v = 0; v < N_VECTORS; ++v) cost[v] = E::load(stored + v * 2 * E::W);
    typename E::Costs m = cost[0];
    for (int v = 1; v < N_VECTORS; ++v) m = E::least(m, cost[v]);
    m = E::least_of(m);
    const typename E::Costs limit = E::plus(m, margin);
    Mask first_a = Mask{1} << (N_VECTORS * E::W - 1), first_b = first_a, near_a = 0, near_b = 0;
    const Mask real = static_cast<Mask>(~Mask{0}) >> (static_cast<int>(8 * sizeof(Mask)) - n);
    for (int v = 0; v < N_VECTORS; ++v) {
        const Bits equal = E::equal(cost[v], m), near = E::not_above(cost[v], limit);
        first_a |= static_cast<Mask>(equal.a) << (v * E::W);
        first_b |= static_cast<Mask>(equal.b) << (v * E::W);
        near_a |= static_cast<Mask>(near.a) << (v * E::W);
        near_b |= static_cast<Mask>(near.b) << (v * E::W);
    }
    int a, b;
    if constexpr (sizeof(Mask) == 4)
        a = __builtin_ctz(first_a), b = __builtin_ctz(first_b);
    else
        a = __builtin_ctzll(first_a), b = __builtin_ctzll(first_b);
    return found<E::W>(stored, list, a, b, single<Mask>(near_a & real) & single<Mask>(near_b & real) ? true : false);
}

// For any n up to 1024.
template <int DIM>
__attribute__((noinline)) Found nearest_of_many(const Ends<DIM>& ends, const uint16_t* list, int n, float margin) {
    typedef Ends<DIM> E;
    alignas(64) float stored[2 * 1024];
    const auto at = [&stored](int v) { return E::load(stored + v * 2 * E::W); };
    const int n_vectors = (n + E::W - 1) / E::W;
    typename E::Costs m{};
    for (int v = 0; v < n_vectors; ++v) {
        const typename E::Costs c = ends.costs(list + v * E::W);
        E::store(c, stored + v * 2 * E::W);
        m = v ? E::least(m, c) : c;
    }
    m = E::least_of(m);
    const typename E::Costs limit = E::plus(m, margin);
    int first_a = n - 1, first_b = n - 1, near_a = 0, near_b = 0;
    for (int v = n_vectors - 1; v >= 0; --v) {
        const uint32_t real = v == n_vectors - 1 ? (1u << (n - v * E::W)) - 1 : ~0u;
        const Bits equal = E::equal(at(v), m), near = E::not_above(at(v), limit);
        if (equal.a & real) first_a = v * E::W + __builtin_ctz(equal.a);
        if (equal.b & real) first_b = v * E::W + __builtin_ctz(equal.b);
        near_a += __builtin_popcount(near.a & real);
        near_b += __builtin_popcount(near.b & real);
    }
    return found<E::W>(stored, list, first_a, first_b, near_a <= 1 && near_b <= 1);
}

}  // namespace quantkit::QK_ISA
