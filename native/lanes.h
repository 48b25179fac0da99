// Lanes: the same scalar program runs for LANES blocks at once, one block in each lane.
//
// ggml's quantizers are long chains of float operations whose order determines the bytes. A vector that
// holds the same step of LANES different blocks keeps each block's own order, so each lane computes
// bit for bit what the scalar code would. Vectors are GCC/Clang vector extensions: the same source
// compiles to AVX2, AVX-512 and NEON; this file is compiled once for each, in its own namespace.
//
// It also compiles without any of them, for the set `plain` of error feedback (feedback.h).
//
// Contract: no fused multiply-add (-ffp-contract=off); sqrt and division are correctly
// rounded; a comparison with NaN is false, as in C.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef QK_ISA
#error "compile with -DQK_ISA=<name of the instruction set>"
#endif

namespace quantkit::QK_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float F __attribute__((vector_size(LANES * 4)));
typedef int32_t I __attribute__((vector_size(LANES * 4)));
typedef uint32_t U __attribute__((vector_size(LANES * 4)));

#define QK_INLINE inline __attribute__((always_inline))
// the same for a lambda
#define QK_LAMBDA __attribute__((always_inline))

QK_INLINE F splat(float x) { return x - F{}; }  // minus zero: keeps the sign of -0
QK_INLINE I splat(int32_t x) { return x - I{}; }
QK_INLINE I bits_of(F x) { return reinterpret_cast<I>(x); }
QK_INLINE F float_of(I x) { return reinterpret_cast<F>(x); }

// mask ? a : b, lane by lane; masks are all ones or all zeros.
#if defined(__AVX2__) && !defined(__AVX512F__)  // for the expression, GCC compares the mask with 0 again
QK_INLINE F select(I mask, F a, F b) {
    return reinterpret_cast<F>(_mm256_blendv_ps(reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(a),
                                                reinterpret_cast<__m256>(mask)));
}
QK_INLINE I select(I mask, I a, I b) {
    return reinterpret_cast<I>(select(mask, reinterpret_cast<F>(a), reinterpret_cast<F>(b)));
}
#else
QK_INLINE F select(I mask, F a, F b) { return mask ? a : b; }
QK_INLINE I select(I mask, I a, I b) { return mask ? a : b; }
#endif

// ggml's MAX(a, b) and MIN(a, b): the second argument unless the first is really greater (less).
#if defined(__AVX512F__)
QK_INLINE F max_of(F a, F b) {
    return reinterpret_cast<F>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
QK_INLINE F min_of(F a, F b) {
    return reinterpret_cast<F>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#elif defined(__AVX2__)  // from the expression GCC makes a comparison and a blend: five micro-operations, not one
QK_INLINE F max_of(F a, F b) {
    return reinterpret_cast<F>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
QK_INLINE F min_of(F a, F b) {
    return reinterpret_cast<F>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
#else
QK_INLINE F max_of(F a, F b) { return a > b ? a : b; }
QK_INLINE F min_of(F a, F b) { return a < b ? a : b; }
#endif
QK_INLINE I max_of(I a, I b) { return a > b ? a : b; }
QK_INLINE I min_of(I a, I b) { return a < b ? a : b; }

QK_INLINE F abs_of(F x) { return float_of(bits_of(x) & 0x7fffffff); }

QK_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }

QK_INLINE F sqrt_of(F x) {
#if defined(__AVX512F__)
    return reinterpret_cast<F>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
    return reinterpret_cast<F>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(__aarch64__)
    float32x4_t half[2];
    std::memcpy(half, &x, sizeof x);
    half[0] = vsqrtq_f32(half[0]);
    half[1] = vsqrtq_f32(half[1]);
    std::memcpy(&x, half, sizeof x);
    return x;
#else
    for (int i = 0; i < LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// Whether any lane of a mask is set.
QK_INLINE bool any(I mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
    int32_t all = 0;
    for (int i = 0; i < LANES; ++i) all |= mask[i];
    return all != 0;
#endif
}

// ggml's nearest_int, also out of range: it wraps, and Inf and NaN give whatever their bits give.
QK_INLINE I nearest_int(F x) { return (bits_of(x + 12582912.0f) & 0x007fffff) - 0x00400000; }

#if !defined(__AVX2__)
// float -> IEEE half, to nearest even; and back.
#if defined(__aarch64__)
QK_INLINE uint16_t half_of(float x) {
    const __fp16 h = static_cast<__fp16>(x);
    uint16_t u;
    std::memcpy(&u, &h, 2);
    return u;
}
QK_INLINE float float_of_half(uint16_t u) {
    __fp16 h;
    std::memcpy(&h, &u, 2);
    return static_cast<float>(h);
}
#else
inline uint16_t half_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    const uint32_t sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds and leaves units of 2^-24 in the last places
        float a;
        std::memcpy(&a, &magnitude, 4);
        a += 0.5f;
        uint32_t bits;
        std::memcpy(&bits, &a, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13));
}
inline float float_of_half(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = h >> 10 & 0x1fu, mantissa = h & 0x3ffu;
    uint32_t u;
    if (exponent == 0) {
        const float a = static_cast<float>(mantissa) * 0x1p-24f;
        std::memcpy(&u, &a, 4);
    } else {
        u = (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | mantissa << 13;
    }
    u |= sign;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
#endif
#endif

// float -> IEEE half, to nearest even, as bits in the low 16 of each lane; and back, exactly.
QK_INLINE I to_half(F x) {
#if defined(__AVX512F__)
    const __m256i h = _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
    return reinterpret_cast<I>(_mm512_cvtepu16_epi32(h));
#elif defined(__AVX2__)
    const __m128i h = _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
    return reinterpret_cast<I>(_mm256_cvtepu16_epi32(h));
#else
    I out{};
    for (int i = 0; i < LANES; ++i) out[i] = half_of(x[i]);
    return out;
#endif
}

QK_INLINE F from_half(I h) {
#if defined(__AVX512F__)
    return reinterpret_cast<F>(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(h))));
#elif defined(__AVX2__)
    const __m256i v = _mm256_packus_epi32(reinterpret_cast<__m256i>(h), reinterpret_cast<__m256i>(h));
    return reinterpret_cast<F>(_mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(v, 0x08))));
#else
    F out{};
    for (int i = 0; i < LANES; ++i) out[i] = float_of_half(static_cast<uint16_t>(h[i]));
    return out;
#endif
}

#if defined(__AVX2__)
// In each half of eight rows: s[i] has number i of rows 0 to 3, s[i + 4] of rows 4 to 7.
QK_INLINE void transpose(const __m256* r, __m256* s) {
    for (int h = 0; h < 8; h += 4) {
        const __m256 a = _mm256_unpacklo_ps(r[h], r[h + 1]), b = _mm256_unpackhi_ps(r[h], r[h + 1]);
        const __m256 c = _mm256_unpacklo_ps(r[h + 2], r[h + 3]), d = _mm256_unpackhi_ps(r[h + 2], r[h + 3]);
        s[h] = _mm256_shuffle_ps(a, c, 0x44);
        s[h + 1] = _mm256_shuffle_ps(a, c, 0xee);
        s[h + 2] = _mm256_shuffle_ps(b, d, 0x44);
        s[h + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
}
#endif

// LANES blocks of N floats, one a lane: out[k][lane] = x[lane][first + k].
template <int N>
QK_INLINE void load_lanes(const float* const* x, F* out, int first = 0) {
#if defined(__AVX2__)
    for (int half = 0; half < LANES / 8; ++half) {
        const float* const* p = x + 8 * half;
        float* to = reinterpret_cast<float*>(out) + 8 * half;
        for (int k = 0; k < N; k += 8) {
            __m256 r[8], s[8];
            for (int i = 0; i < 4; ++i) {
                const float *a = p[i] + first + k, *b = p[i + 4] + first + k;
                r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
                r[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a + 4)), _mm_loadu_ps(b + 4), 1);
            }
            transpose(r, s);
            for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + (k + i) * LANES, s[i]);
        }
    }
#else
    for (int k = 0; k < N; ++k)
        for (int lane = 0; lane < LANES; ++lane) out[k][lane] = x[lane][first + k];
#endif
}

// The reverse for 32-bit words: word k of a lane's block goes to y[lane] + offset + 4*k; N words, a multiple of 8.
template <int N>
QK_INLINE void store_lanes(const I* words, uint8_t* const* y, int offset) {
#if defined(__AVX2__)
    for (int half = 0; half < LANES / 8; ++half) {
        const float* from = reinterpret_cast<const float*>(words) + 8 * half;
        for (int k = 0; k < N; k += 8) {
            __m256 r[8], s[8];
            for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + (k + i) * LANES);
            transpose(r, s);
            for (int i = 0; i < 4; ++i) {
                uint8_t* lo = y[8 * half + i] + offset + 4 * k;
                uint8_t* hi = y[8 * half + i + 4] + offset + 4 * k;
                _mm_storeu_ps(reinterpret_cast<float*>(lo), _mm256_castps256_ps128(s[i]));
                _mm_storeu_ps(reinterpret_cast<float*>(lo + 16), _mm256_castps256_ps128(s[i + 4]));
                _mm_storeu_ps(reinterpret_cast<float*>(hi), _mm256_extractf128_ps(s[i], 1));
                _mm_storeu_ps(reinterpret_cast<float*>(hi + 16), _mm256_extractf128_ps(s[i + 4], 1));
            }
        }
    }
#else
    for (int k = 0; k < N; ++k)
        for (int lane = 0; lane < LANES; ++lane) std::memcpy(y[lane] + offset + 4 * k, &words[k][lane], 4);
#endif
}

// A mask of lanes as comparison instructions produce it: one bit a lane on AVX-512, all ones or all zeros elsewhere.
#if defined(__AVX512F__)
typedef __mmask16 M;
QK_INLINE M less(F a, F b) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_LT_OQ);
}
QK_INLINE M differ(F a, F b) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_NEQ_UQ);
}
QK_INLINE F select(M mask, F a, F b) {
    return reinterpret_cast<F>(
        _mm512_mask_blend_ps(mask, reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
}
QK_INLINE bool any(M mask) { return mask != 0; }
QK_INLINE M mask_of(I mask) { return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)); }
QK_INLINE uint32_t lanes_of(M mask) { return mask; }
#else
typedef I M;
QK_INLINE M less(F a, F b) { return a < b; }
QK_INLINE M differ(F a, F b) { return a != b; }
QK_INLINE M mask_of(I mask) { return mask; }
QK_INLINE uint32_t lanes_of(M mask) {  // one bit a lane
#if defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
    return bits;
#endif
}
#endif

// Four values of every lane as the bytes of its word, each clamped to 0..MOST.
template <int MOST>
QK_INLINE I clamped_bytes(I a, I b, I c, I d) {
    static_assert(MOST <= 255, "a byte");
#if defined(__AVX512BW__)
    // packing works in quarters: turn 4 of a, 4 of b, … into a b c d of 4 lanes
    const __m512i ab = _mm512_packs_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
    const __m512i cd = _mm512_packs_epi32(reinterpret_cast<__m512i>(c), reinterpret_cast<__m512i>(d));
    const __m512i turn = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    const __m512i limited = _mm512_min_epu8(_mm512_packus_epi16(ab, cd), _mm512_set1_epi8(static_cast<char>(MOST)));
    return reinterpret_cast<I>(_mm512_shuffle_epi8(limited, turn));
#elif defined(__AVX2__)
    const __m256i ab = _mm256_packs_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
    const __m256i cd = _mm256_packs_epi32(reinterpret_cast<__m256i>(c), reinterpret_cast<__m256i>(d));
    const __m256i turn = _mm256_broadcastsi128_si256(_mm_set_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400));
    const __m256i limited = _mm256_min_epu8(_mm256_packus_epi16(ab, cd), _mm256_set1_epi8(static_cast<char>(MOST)));
    return reinterpret_cast<I>(_mm256_shuffle_epi8(limited, turn));
#else
    const auto limited = [](I x) { return max_of(I{}, min_of(splat(MOST), x)); };
    return limited(a) | (limited(b) << 8) | (limited(c) << 16) | (limited(d) << 24);
#endif
}

// One word of n <= 4 bytes a lane.
QK_INLINE void store_word(I word, uint8_t* const* y, int offset, int n_bytes = 4) {
    for (int lane = 0; lane < LANES; ++lane) {
        const int32_t w = word[lane];
        std::memcpy(y[lane] + offset, &w, n_bytes);
    }
}

}  // namespace quantkit::QK_ISA
