// Q8_0, Q4_0, Q4_1, Q5_0, Q5_1: blocks of 32 values with one half-precision scale (and minimum).
//
//   Q8_0  34 bytes: d, qs[32] (int8)           x = d*q
//   Q4_0  18 bytes: d, qs[16]                  x = d*(q-8)
//   Q4_1  20 bytes: d, m, qs[16]               x = d*q + m
//   Q5_0  22 bytes: d, qh[4], qs[16]           x = d*(q-16)
//   Q5_1  24 bytes: d, m, qh[4], qs[16]        x = d*q + m
//
// Reproduces quantize_row_q{4_0,4_1,5_0,5_1,8_0}_ref (without importance) and quantize_row_q{4_0,4_1,5_0,5_1}_impl
// (with) of ggml/src/ggml-quants.c, bit for bit. With importance, LANES blocks are done at once, as elsewhere. Without,
// a block takes only a few operations and no sum, so vectors lie along the row, eight blocks at a time.
#include "blocks32.h"
#include "k_search.h"
#include "tables.h"

#include <algorithm>

namespace quantkit::QK_ISA {

namespace {

enum Kind { Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 };

constexpr int bytes_of(Kind k) { return k == Q8_0 ? 34 : k == Q4_0 ? 18 : k == Q4_1 ? 20 : k == Q5_0 ? 22 : 24; }
constexpr bool has_minimum(Kind k) { return k == Q4_1 || k == Q5_1; }
constexpr int largest_level(Kind k) { return k == Q8_0 ? 127 : k == Q4_0 || k == Q4_1 ? 15 : 31; }

// ---------------------------------------------------------------- without importance

#if defined(__AVX2__)

QK_INLINE __m256 abs_of(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

// One value for each block of eight vectors: the largest (or, with MIN, the smallest) of each.
template <bool MIN>
QK_INLINE __m256 reduce8(const __m256* v) {
    const auto op = [](__m256 a, __m256 b) { return MIN ? _mm256_min_ps(a, b) : _mm256_max_ps(a, b); };
    __m256 u[2];
    for (int h = 0; h < 2; ++h) {
        const __m256* p = v + 4 * h;
        const __m256 a = op(_mm256_unpacklo_ps(p[0], p[1]), _mm256_unpackhi_ps(p[0], p[1]));
        const __m256 b = op(_mm256_unpacklo_ps(p[2], p[3]), _mm256_unpackhi_ps(p[2], p[3]));
        u[h] = op(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    }
    return op(_mm256_permute2f128_ps(u[0], u[1], 0x20), _mm256_permute2f128_ps(u[0], u[1], 0x31));
}

// Returns the first of 32 values whose magnitude is `amax`, the largest. (ggml keeps the first, and its sign matters.)
QK_INLINE float first_largest(const float* x, float amax) {
    const __m256 a = _mm256_set1_ps(amax);
    __m256i is[4];
    for (int i = 0; i < 4; ++i)
        is[i] = _mm256_castps_si256(_mm256_cmp_ps(abs_of(_mm256_loadu_ps(x + 8 * i)), a, _CMP_EQ_OQ));
    // 16-bit words of is[0], is[1] by half, then bytes of all: 4-byte groups in the order 0 2 4 6 | 1 3 5 7
    const __m256i all = _mm256_packs_epi16(_mm256_packs_epi32(is[0], is[1]), _mm256_packs_epi32(is[2], is[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const int mask = _mm256_movemask_epi8(_mm256_permutevar8x32_epi32(all, order));
    return x[__builtin_ctz(static_cast<unsigned>(mask) | 0x80000000u)];
}

// d ? 1 / d : 0
QK_INLINE __m256 inverse_of(__m256 d) {
    const __m256 some = _mm256_cmp_ps(d, _mm256_setzero_ps(), _CMP_NEQ_UQ);
    return _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(1.0f), d));
}

QK_INLINE void put_half(uint8_t* y, uint16_t h) { std::memcpy(y, &h, 2); }

// 32 levels as bytes, in order.
template <Kind K>
QK_INLINE __m256i levels(const float* x, float low, float id) {
    const __m256 scale = _mm256_set1_ps(id), minimum = _mm256_set1_ps(low);
    __m256i q[4];
    for (int i = 0; i < 4; ++i) {
        __m256 v = _mm256_loadu_ps(x + 8 * i);
        if constexpr (has_minimum(K)) v = _mm256_sub_ps(v, minimum);
        v = _mm256_mul_ps(v, scale);
        if constexpr (K == Q8_0) {
            // roundf: adding the float just below a half, with the sign, and truncating rounds halves away from zero
            const __m256 sign = _mm256_and_ps(v, _mm256_set1_ps(-0.0f));
            v = _mm256_add_ps(v, _mm256_or_ps(sign, _mm256_set1_ps(0x1.fffffep-2f)));
        } else {
            v = _mm256_add_ps(v, _mm256_set1_ps(K == Q4_0 ? 8.5f : K == Q5_0 ? 16.5f : 0.5f));
        }
        q[i] = _mm256_cvttps_epi32(v);
    }
    const __m256i a = _mm256_packs_epi32(q[0], q[1]), b = _mm256_packs_epi32(q[2], q[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    if constexpr (K == Q8_0) return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order);
    // Inf and NaN convert to -2^31, of which ggml keeps the low byte, 0: packus also gives 0.
    // (Q5_1 has no limit in ggml, and never exceeds one: (max - min) * id is 31 up to rounding.)
    const __m256i bytes = _mm256_min_epu8(_mm256_packus_epi16(a, b), _mm256_set1_epi8(largest_level(K)));
    return _mm256_permutevar8x32_epi32(bytes, order);
}

template <Kind K>
QK_INLINE void eight_blocks(const float* x, uint8_t* y) {
    __m256 part[8], low_part[8], low = _mm256_setzero_ps(), d;
    for (int b = 0; b < 8; ++b) {
        __m256 v[4];
        for (int i = 0; i < 4; ++i) {
            v[i] = _mm256_loadu_ps(x + 32 * b + 8 * i);
            if constexpr (!has_minimum(K)) v[i] = abs_of(v[i]);
        }
        part[b] = _mm256_max_ps(_mm256_max_ps(v[0], v[1]), _mm256_max_ps(v[2], v[3]));
        if constexpr (has_minimum(K))
            low_part[b] = _mm256_min_ps(_mm256_min_ps(v[0], v[1]), _mm256_min_ps(v[2], v[3]));
    }
    const __m256 max = reduce8<false>(part);
    alignas(32) float lows[8], ids[8];
    if constexpr (K == Q8_0) {
        d = _mm256_div_ps(max, _mm256_set1_ps(127.0f));
    } else if constexpr (has_minimum(K)) {
        low = reduce8<true>(low_part);
        // with zeros of both signs max - low is -0, but +0 in ggml, which keeps the first of equals
        d = abs_of(_mm256_div_ps(_mm256_sub_ps(max, low), _mm256_set1_ps(largest_level(K))));
        _mm256_store_ps(lows, low);
        int zero = _mm256_movemask_ps(_mm256_cmp_ps(low, _mm256_setzero_ps(), _CMP_EQ_OQ));
        if (zero) {  // the minimum then has the sign of the first zero
            for (; zero; zero &= zero - 1) {
                const int b = __builtin_ctz(zero);
                int j = 0;
                while (x[32 * b + j] != 0.0f) ++j;
                lows[b] = x[32 * b + j];
            }
            low = _mm256_load_ps(lows);
        }
    } else {
        alignas(32) float amax[8], signed_max[8];
        _mm256_store_ps(amax, max);
        for (int b = 0; b < 8; ++b) signed_max[b] = first_largest(x + 32 * b, amax[b]);
        // ggml never keeps a zero as the largest: + 0 turns -0 into 0
        d = _mm256_add_ps(_mm256_load_ps(signed_max), _mm256_setzero_ps());
        d = _mm256_div_ps(d, _mm256_set1_ps(K == Q4_0 ? -8.0f : -16.0f));
    }
    __m256 id = inverse_of(d);
    if constexpr (K == Q8_0)  // if 1 / d is Inf, all levels are 0 (see `levels`); Inf would pack to -128
        id = _mm256_andnot_ps(_mm256_cmp_ps(id, _mm256_set1_ps(__builtin_inff()), _CMP_EQ_OQ), id);
    _mm256_store_ps(ids, id);
    alignas(16) uint16_t hd[8], hm[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(hd), _mm256_cvtps_ph(d, _MM_FROUND_TO_NEAREST_INT));
    if constexpr (has_minimum(K))
        _mm_store_si128(reinterpret_cast<__m128i*>(hm), _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    for (int b = 0; b < 8; ++b) {
        uint8_t* to = y + b * bytes_of(K);
        const __m256i q = levels<K>(x + 32 * b, has_minimum(K) ? lows[b] : 0.0f, ids[b]);
        put_half(to, hd[b]);
        if constexpr (has_minimum(K)) put_half(to + 2, hm[b]);
        if constexpr (K == Q8_0) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2), q);
            continue;
        }
        const __m256i nibbles = largest_level(K) == 15 ? q : _mm256_and_si256(q, _mm256_set1_epi8(15));
        const __m128i qs = _mm_or_si128(_mm256_castsi256_si128(nibbles),
                                        _mm_slli_epi16(_mm256_extracti128_si256(nibbles, 1), 4));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + bytes_of(K) - 16), qs);
        if constexpr (K == Q5_0 || K == Q5_1) {
            const int qh = _mm256_movemask_epi8(_mm256_slli_epi16(q, 3));
            std::memcpy(to + bytes_of(K) - 20, &qh, 4);
        }
    }
}

#else

// The same, a value at a time: on processors without the intrinsics the compiler must find the vectors.
template <Kind K>
QK_INLINE void one_block(const float* x, uint8_t* y) {
    float d, low = 0.0f;
    if constexpr (has_minimum(K)) {
        float max = x[0];
        low = x[0];
        for (int j = 1; j < 32; ++j) {
            low = x[j] < low ? x[j] : low;
            max = x[j] > max ? x[j] : max;
        }
        d = (max - low) / static_cast<float>(largest_level(K));
    } else {
        float amax = 0.0f, max = 0.0f;
        for (int j = 0; j < 32; ++j) {
            const float a = __builtin_fabsf(x[j]);
            if (a > amax) amax = a, max = x[j];
        }
        d = K == Q8_0 ? amax / 127.0f : max / (K == Q4_0 ? -8.0f : -16.0f);
    }
    const float id = d != 0.0f ? 1.0f / d : 0.0f;
    // Inf and NaN, if 1 / d overflows, become level 0
    const auto whole = [](float v) { return __builtin_fabsf(v) < 1e9f ? static_cast<int32_t>(v) : 0; };
    uint8_t q[32];
    for (int j = 0; j < 32; ++j) {
        if constexpr (K == Q8_0)
            q[j] = static_cast<uint8_t>(whole(__builtin_roundf(x[j] * id)));
        else if constexpr (has_minimum(K))
            q[j] = static_cast<uint8_t>(std::min(largest_level(K), whole((x[j] - low) * id + 0.5f)));
        else
            q[j] = static_cast<uint8_t>(std::min(largest_level(K), whole(x[j] * id + (K == Q4_0 ? 8.5f : 16.5f))));
    }
    const auto put_half = [](uint8_t* to, float v) {
        const __fp16 h = static_cast<__fp16>(v);
        std::memcpy(to, &h, 2);
    };
    put_half(y, d);
    if constexpr (has_minimum(K)) put_half(y + 2, low);
    if constexpr (K == Q8_0) {
        std::memcpy(y + 2, q, 32);
        return;
    }
    uint8_t* qs = y + bytes_of(K) - 16;
    for (int j = 0; j < 16; ++j) qs[j] = static_cast<uint8_t>((q[j] & 15) | ((q[j + 16] & 15) << 4));
    if constexpr (K == Q5_0 || K == Q5_1) {
        uint32_t qh = 0;
        for (int j = 0; j < 32; ++j) qh |= static_cast<uint32_t>(q[j] >> 4) << j;
        std::memcpy(y + bytes_of(K) - 20, &qh, 4);
    }
}

template <Kind K>
QK_INLINE void eight_blocks(const float* x, uint8_t* y) {
    for (int b = 0; b < 8; ++b) one_block<K>(x + 32 * b, y + b * bytes_of(K));
}

#endif

template <Kind K>
void plain(const float* x, uint8_t* y, size_t n_blocks) {
    for (; n_blocks >= 8; n_blocks -= 8, x += 8 * 32, y += 8 * bytes_of(K)) eight_blocks<K>(x, y);
    if (n_blocks == 0) return;
    float rest[8 * 32] = {};
    uint8_t made[8 * bytes_of(K)];
    std::memcpy(rest, x, n_blocks * 32 * sizeof *x);
    eight_blocks<K>(rest, made);
    std::memcpy(y, made, n_blocks * bytes_of(K));
}

// ---------------------------------------------------------------- with importance

// Mean of the squares of up to LANES rows, each summed from left to right.
QK_INLINE F mean_squares(const float* x, size_t n_rows, size_t n_cols) {
    const float* rows[LANES];
    for (size_t lane = 0; lane < LANES; ++lane) rows[lane] = x + std::min(lane, n_rows - 1) * n_cols;
    F sum{};
    for (size_t c = 0; c < n_cols; c += 32) {
        F v[32];
        load_lanes<32>(rows, v);
        for (int k = 0; k < 32; ++k) sum += v[k] * v[k];
        for (const float*& row : rows) row += 32;
    }
    return sum / static_cast<float>(n_cols);
}

// How many blocks a lane takes at a time: two for the affine search.
constexpr int side_by_side(Kind k) { return has_minimum(k) ? 2 : 1; }

// N blocks for each lane: x holds their values, w their weights; tile t of LANES blocks is x[32*t ...].
template <Kind K, int N>
QK_INLINE void search(const F* x, const F* w, uint8_t* const* y) {
    constexpr bool FIVE = largest_level(K) == 31;
    constexpr int NMAX = has_minimum(K) ? largest_level(K) : (largest_level(K) + 1) / 2;
    I level[32];
    if constexpr (has_minimum(K)) {
        Affine found[N];
        search_affine<32, NMAX, true, false, N>(x, w, -0.9f, 0.05f, 36, found);
        for (int t = 0; t < N; ++t) {
            for (int j = 0; j < 32; ++j) level[j] = levels_of<NMAX>(found[t], x[32 * t + j]);
            store_blocks32<4, FIVE>(level, to_half(found[t].scale) | (to_half(-found[t].minimum) << 16), y + t * LANES);
        }
    } else {
        for (int t = 0; t < N; ++t) {
            const Symmetric found = search_symmetric<32, NMAX, true>(x + 32 * t, w + 32 * t);
            for (int j = 0; j < 32; ++j) level[j] = levels_of<NMAX>(found, x[32 * t + j]);
            store_blocks32<2, FIVE>(level, to_half(found.scale), y + t * LANES);
        }
    }
}

// LANES rows at a time: first their mean squares, then their blocks, N*LANES at a time whatever row they are in.
// Past the end, lanes repeat the last block and write to a scratch place.
template <Kind K>
void weighted(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* importance) {
    constexpr int N = side_by_side(K), AT_ONCE = N * LANES;
    const size_t per_row = n_cols / 32;
    uint8_t spare[bytes_of(K)];
    for (size_t row0 = 0; row0 < n_rows; row0 += LANES) {
        const size_t rows = std::min<size_t>(LANES, n_rows - row0), total = rows * per_row;
        const float* xg = x + row0 * n_cols;
        uint8_t* yg = y + row0 * per_row * bytes_of(K);
        float sigma2[LANES];
        const F means = mean_squares(xg, rows, n_cols);
        std::memcpy(sigma2, &means, sizeof sigma2);
        size_t row = 0, column = 0;  // of the next block
        for (size_t b = 0; b < total; b += AT_ONCE) {
            const float* xs[AT_ONCE];
            const float* ws[AT_ONCE];
            uint8_t* ys[AT_ONCE];
            float s[AT_ONCE];
            for (int lane = 0; lane < AT_ONCE; ++lane) {
                const bool real = b + lane < total;
                xs[lane] = xg + (row * per_row + column) * 32;
                ws[lane] = importance + column * 32;
                ys[lane] = real ? yg + (b + lane) * bytes_of(K) : spare;
                s[lane] = sigma2[row];
                if (b + lane + 1 < total && ++column == per_row) column = 0, ++row;
            }
            F v[N * 32], w[N * 32];
            for (int t = 0; t < N; ++t) {
                F sigma;
                std::memcpy(&sigma, s + t * LANES, sizeof sigma);
                load_lanes<32>(xs + t * LANES, v + 32 * t);
                load_lanes<32>(ws + t * LANES, w + 32 * t);
                for (int j = 32 * t; j < 32 * (t + 1); ++j) w[j] = w[j] * sqrt_of(sigma + v[j] * v[j]);
            }
            search<K, N>(v, w, ys);
        }
    }
}

template <Kind K>
void quantize(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    if (w)
        weighted<K>(x, y, n_rows, n_cols, w);
    else
        plain<K>(x, y, n_rows * (n_cols / 32));
}

}  // namespace

void quantize_q8_0(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float*) {
    plain<Q8_0>(x, y, n_rows * (n_cols / 32));
}

void quantize_q4_0(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    quantize<Q4_0>(x, y, n_rows, n_cols, w);
}

void quantize_q4_1(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    quantize<Q4_1>(x, y, n_rows, n_cols, w);
}

void quantize_q5_0(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    quantize<Q5_0>(x, y, n_rows, n_cols, w);
}

void quantize_q5_1(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    quantize<Q5_1>(x, y, n_rows, n_cols, w);
}

}  // namespace quantkit::QK_ISA
