// Stored rows to float32, a vector at a time, and float32 rows to F32, F16 and BF16 (ggml_fp32_to_fp16_row,
// ggml_fp32_to_bf16_row_ref). See rows.h for the formats and the contract, rows.cpp for the same in plain C++.
// No templates from the standard library here: the linker keeps one copy of each, and if it kept this file's, other
// processors could not run it.
#include "rows.h"

#include "e4m3_file.h"
#include "lanes.h"
#include "row_values.h"
#include "tables.h"

namespace quantkit::QK_ISA {

namespace {

typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

QK_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }

// Loads LANES 16-bit words from memory.
QK_INLINE U load_halves(const uint8_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<U>(_mm512_maskz_cvtepu16_epi32(0xffff, load<__m256i>(p)));
#elif defined(__AVX2__)
    return reinterpret_cast<U>(_mm256_cvtepu16_epi32(load<__m128i>(p)));
#else
    return __builtin_convertvector(load<Halves>(p), U);
#endif
}

// The largest magnitude seen so far, in each lane.
struct Largest {
    I bits{};

    QK_INLINE void see(F x) {
        const I magnitude = bits_of(x) & 0x7fffffff;
#if defined(__AVX512F__)
        bits = reinterpret_cast<I>(
            _mm512_max_epi32(reinterpret_cast<__m512i>(bits), reinterpret_cast<__m512i>(magnitude)));
#else
        bits = max_of(bits, magnitude);
#endif
    }
    QK_INLINE uint32_t of_all() const {
        int32_t most = 0;
        for (int lane = 0; lane < LANES; ++lane) most = bits[lane] > most ? bits[lane] : most;
        return static_cast<uint32_t>(most);
    }
};

// 2 * LANES E4M3 codes, exactly, as value / 256: a code shifted by 7 bits is a half whose exponent is 8 too small,
// also for subnormals. Code 0x7f fills all bits of a half's exponent but the highest; adding 1 carries into that.
QK_INLINE Pair e4m3_pair(const uint8_t* p) {
#if defined(__AVX512BW__)
    const __m512i code = _mm512_maskz_cvtepi8_epi16(~0u, load<__m256i>(p));
    const __m512i h = _mm512_and_si512(_mm512_slli_epi16(code, 7), _mm512_set1_epi16(static_cast<short>(0xbf80)));
    const __m512i nan = _mm512_and_si512(_mm512_add_epi16(h, _mm512_set1_epi16(0x80)), _mm512_set1_epi16(0x4000));
    const __m512i half = _mm512_or_si512(h, nan);
    return {reinterpret_cast<F>(_mm512_maskz_cvtph_ps(0xffff, _mm512_castsi512_si256(half))),
            reinterpret_cast<F>(_mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_extracti64x4_epi64(0xff, half, 1)))};
#elif defined(__AVX2__)
    const __m256i code = _mm256_cvtepi8_epi16(load<__m128i>(p));
    const __m256i h = _mm256_and_si256(_mm256_slli_epi16(code, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    const __m256i nan = _mm256_and_si256(_mm256_add_epi16(h, _mm256_set1_epi16(0x80)), _mm256_set1_epi16(0x4000));
    const __m256i half = _mm256_or_si256(h, nan);
    return {reinterpret_cast<F>(_mm256_cvtph_ps(_mm256_castsi256_si128(half))),
            reinterpret_cast<F>(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)))};
#else
    // in floats: give subnormals the exponent of 2^-14 and then subtract 2^-14, which leaves m/8 * 2^-14
    Pair out;
    for (int k = 0; k < 2; ++k) {
        typedef uint8_t Bytes __attribute__((vector_size(LANES)));
        const U code = __builtin_convertvector(load<Bytes>(p + k * LANES), U);
        const I m = reinterpret_cast<I>(code & 0x7f), sign = reinterpret_cast<I>(code << 24 & 0x80000000);
        const I subnormal = m < 8, nan = (m == 0x7f) & 0x7fc00000;
        const F x = float_of((m << 20) + (112 << 23) + (subnormal & (1 << 23))) - float_of(subnormal & (113 << 23));
        (k ? out.b : out.a) = float_of(bits_of(x) | nan | sign);
    }
    return out;
#endif
}

// n values in steps of 2 * LANES: value(p) converts those stored at p, SIZE bytes each. The last, partial step works
// on a copy.
template <size_t SIZE, typename Value>
QK_INLINE void fill(const uint8_t* src, size_t n, float* out, Largest& largest, Value value) {
    constexpr size_t STEP = 2 * LANES;
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        const Pair x = value(src + i * SIZE);
        largest.see(x.a);
        largest.see(x.b);
        store(out + i, x.a);
        store(out + i + LANES, x.b);
    }
    if (i == n) return;
    uint8_t rest[STEP * SIZE] = {};
    std::memcpy(rest, src + i * SIZE, (n - i) * SIZE);
    const Pair x = value(rest);
    float made[STEP];
    std::memcpy(made, &x, sizeof made);
    std::memcpy(out + i, made, (n - i) * sizeof(float));
    for (size_t k = n - i; k < STEP; ++k) made[k] = 0;  // 0 * Inf, say, is not a value of the row
    largest.see(load<F>(made));
    largest.see(load<F>(made + LANES));
}

template <Round ROUND>
uint32_t e4m3_row(const uint8_t* src, size_t n, const float* scale, size_t block_cols, float* out) {
    Largest largest;
    for (size_t c = 0; c < n; c += block_cols, ++scale) {
        const size_t m = n - c < block_cols ? n - c : block_cols;
        // exact, also for subnormal scales, unless it overflows
        const float scale256 = *scale * 256;
        if (scale256 - scale256 == 0) {  // is finite
            const F s = splat(scale256);
            fill<1>(src + c, m, out + c, largest, [s](const uint8_t* p) {
                const Pair x = e4m3_pair(p);
                return Pair{rounded<ROUND>(x.a * s), rounded<ROUND>(x.b * s)};
            });
        } else {
            // a NaN with all bits set would not stay a NaN when rounded
            const F s = splat(*scale == *scale ? *scale : __builtin_nanf(""));
            fill<1>(src + c, m, out + c, largest, [s](const uint8_t* p) {
                const Pair x = e4m3_pair(p);
                return Pair{rounded<ROUND>(x.a * 256 * s), rounded<ROUND>(x.b * 256 * s)};
            });
        }
    }
    return largest.of_all();
}

uint32_t e4m3(const uint8_t* src, size_t n, const float* scale, size_t block_cols, bool round_bf16, float* out) {
    return (round_bf16 ? e4m3_row<Round::NO_LARGE_NAN> : e4m3_row<Round::NO>)(src, n, scale, block_cols, out);
}

// A row of floats, SIZE bytes each: value(p) returns LANES of them.
template <Round ROUND, size_t SIZE, typename Value>
QK_INLINE uint32_t float_row(const uint8_t* src, size_t n, float* out, Value value) {
    Largest largest;
    fill<SIZE>(src, n, out, largest, [value](const uint8_t* p) {
        return Pair{rounded<ROUND>(value(p)), rounded<ROUND>(value(p + LANES * SIZE))};
    });
    return largest.of_all();
}

QK_INLINE F f16_values(const uint8_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<F>(_mm512_maskz_cvtph_ps(0xffff, load<__m256i>(p)));
#elif defined(__AVX2__)
    return reinterpret_cast<F>(_mm256_cvtph_ps(load<__m128i>(p)));
#else
    return from_half(reinterpret_cast<I>(load_halves(p)));
#endif
}

uint32_t bf16(const uint8_t* src, size_t n, bool, float* out) {
    const auto value = [](const uint8_t* p) { return reinterpret_cast<F>(load_halves(p) << 16); };
    return float_row<Round::NO, 2>(src, n, out, value);
}

uint32_t f16(const uint8_t* src, size_t n, bool round_bf16, float* out) {
    if (round_bf16) return float_row<Round::YES, 2>(src, n, out, f16_values);
    return float_row<Round::NO, 2>(src, n, out, f16_values);
}

uint32_t f32(const uint8_t* src, size_t n, bool round_bf16, float* out) {
    if (round_bf16) return float_row<Round::YES, 4>(src, n, out, load<F>);
    return float_row<Round::NO, 4>(src, n, out, load<F>);
}

uint32_t largest_of(const float* x, size_t n) {
    Largest a, b;  // two, to hide latency
    size_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        a.see(load<F>(x + i));
        b.see(load<F>(x + i + LANES));
    }
    a.bits = max_of(a.bits, b.bits);
    uint32_t most = a.of_all();
    for (; i < n; ++i) {
        const uint32_t magnitude = load<uint32_t>(x + i) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

typedef uint16_t TwoHalves __attribute__((vector_size(LANES * 4)));

// Converts n values to 16 bits each, 2 * LANES at a time.
template <typename Convert>
QK_INLINE void to_halves(const float* x, uint8_t* y, size_t n, Convert convert) {
    constexpr size_t STEP = 2 * LANES;
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        const TwoHalves h = convert(load<F>(x + i), load<F>(x + i + LANES));
        std::memcpy(y + 2 * i, &h, sizeof h);
    }
    float rest[STEP] = {};
    std::memcpy(rest, x + i, (n - i) * sizeof(float));
    const TwoHalves h = convert(load<F>(rest), load<F>(rest + LANES));
    std::memcpy(y + 2 * i, &h, (n - i) * sizeof(uint16_t));
}

#if defined(__AVX2__)
uint32_t e4m3_to_file(const uint8_t* src, size_t n_rows, size_t n, const float* scale, size_t block_cols,
                      FileFloat type, bool stream, uint8_t* out) {
    stream = stream && block_cols % 16 == 0;
    const auto rows = [&](auto at) {
        constexpr FileFloat TYPE = decltype(at)::TYPE;
        return (stream ? e4m3_file_rows<TYPE, true> : e4m3_file_rows<TYPE, false>)(src, n_rows, n, scale, block_cols,
                                                                                   out);
    };
    switch (type) {
        case FileFloat::BF16: return rows(As<FileFloat::BF16>{});
        case FileFloat::F32: return rows(As<FileFloat::F32>{});
        case FileFloat::F32_ROUNDED: break;
    }
    return rows(As<FileFloat::F32_ROUNDED>{});
}
#endif

}  // namespace

void quantize_f32(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float*) {
    std::memcpy(y, x, n_rows * n_cols * sizeof(float));
}

void quantize_f16(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float*) {
    to_halves(x, y, n_rows * n_cols, [](F a, F b) {
        TwoHalves out;
#if defined(__AVX512F__)
        // a mask that hides nothing: in the plain form, GCC 12 warns about the undefined value it starts from
        const __m256i halves[2] = {
            _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(a), _MM_FROUND_TO_NEAREST_INT),
            _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(b), _MM_FROUND_TO_NEAREST_INT)};
#elif defined(__AVX2__)
        const __m128i halves[2] = {_mm256_cvtps_ph(reinterpret_cast<__m256>(a), _MM_FROUND_TO_NEAREST_INT),
                                   _mm256_cvtps_ph(reinterpret_cast<__m256>(b), _MM_FROUND_TO_NEAREST_INT)};
#else
        const Halves halves[2] = {__builtin_convertvector(to_half(a), Halves),
                                  __builtin_convertvector(to_half(b), Halves)};
#endif
        std::memcpy(&out, halves, sizeof out);
        return out;
    });
}

void quantize_bf16(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float*) {
    to_halves(x, y, n_rows * n_cols, [](F a, F b) {
        a = reinterpret_cast<F>(bf16_upper(a));
        b = reinterpret_cast<F>(bf16_upper(b));
#if defined(__AVX512BW__)
        // the odd words of both
        const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                                             25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        return reinterpret_cast<TwoHalves>(
            _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(a), odd, reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
        const __m256i words = _mm256_packus_epi32(_mm256_srli_epi32(reinterpret_cast<__m256i>(a), 16),
                                                  _mm256_srli_epi32(reinterpret_cast<__m256i>(b), 16));
        return reinterpret_cast<TwoHalves>(_mm256_permute4x64_epi64(words, 0xd8));
#else
        TwoHalves out;
        const Halves halves[2] = {__builtin_convertvector(reinterpret_cast<U>(a) >> 16, Halves),
                                  __builtin_convertvector(reinterpret_cast<U>(b) >> 16, Halves)};
        std::memcpy(&out, halves, sizeof out);
        return out;
#endif
    });
}

#if defined(__AVX2__)
extern const RowKernels ROWS = {e4m3, bf16, f16, f32, largest_of, e4m3_to_file, [] { _mm_sfence(); }};
#else
extern const RowKernels ROWS = {e4m3, bf16, f16, f32, largest_of, nullptr, nullptr};
#endif

}  // namespace quantkit::QK_ISA
