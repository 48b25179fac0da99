// Stored rows to float32, a vector at a time, and float32 rows to F32, F16 and BF16 (ggml_fp32_to_fp16_row,
// ggml_fp32_to_bf16_row_ref). See rows.h for the formats and the contract, rows.cpp for the same in plain C++.
// No templates of the standard library here: the linker keeps one copy of each, and it might keep this file's, which
// other processors cannot run.
#include "rows.h"

#include "lanes.h"
#include "tables.h"

namespace quantkit::QK_ISA {

namespace {

typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

template <typename V>
QK_INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

QK_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }

QK_INLINE U widen(Bytes x) { return __builtin_convertvector(x, U); }
QK_INLINE U widen(Halves x) { return __builtin_convertvector(x, U); }

// The largest magnitude of what has been seen, a lane each.
struct Largest {
    I bits{};

    QK_INLINE void see(F x) {
        const I magnitude = bits_of(x) & 0x7fffffff;
#if defined(__AVX512F__)
        bits = reinterpret_cast<I>(_mm512_max_epi32(reinterpret_cast<__m512i>(bits), reinterpret_cast<__m512i>(magnitude)));
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

// To nearest even; a NaN stays a NaN (quiet, sign kept).
QK_INLINE F round_to_bf16(F x) {
    const U u = reinterpret_cast<U>(x);
    const U even = u + ((u >> 16 & 1) + 0x7fff);
    const I rounded = x == x ? reinterpret_cast<I>(even) : reinterpret_cast<I>(u | 0x00400000);
    return float_of(rounded & static_cast<int32_t>(0xffff0000));
}

template <bool ROUND>
QK_INLINE F rounded(F x) {
    return ROUND ? round_to_bf16(x) : x;
}

// E4M3 codes, exactly. Shifted by 20 bits, a code's exponent and mantissa are those of a float, the exponent 120 too
// small. A subnormal code is given the exponent of 2^-6 instead, which is then taken away: m/8 * 2^-6 is left.
QK_INLINE F e4m3_value(U code) {
    const I m = reinterpret_cast<I>(code & 0x7f), sign = reinterpret_cast<I>(code << 24 & 0x80000000);
    const I subnormal = m < 8;
    const F x = float_of((m << 20) + (120 << 23) + (subnormal & (1 << 23))) - float_of(subnormal & (121 << 23));
    const I nan = (m == 0x7f) & 0x7fc00000;
    return float_of(bits_of(x) | nan | sign);
}

// n values in steps of LANES: whole vectors from src, SIZE bytes a value; the last through a copy of its values.
template <size_t SIZE, typename Value>
QK_INLINE void fill(const uint8_t* src, size_t n, float* out, Largest& largest, Value value) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const F x = value(src + i * SIZE);
        largest.see(x);
        store(out + i, x);
    }
    if (i == n) return;
    uint8_t rest[LANES * SIZE] = {};
    std::memcpy(rest, src + i * SIZE, (n - i) * SIZE);
    F x = value(rest);
    std::memcpy(out + i, &x, (n - i) * sizeof(float));
    for (size_t lane = n - i; lane < LANES; ++lane) x[lane] = 0;  // 0 * Inf is no value of the row
    largest.see(x);
}

template <bool ROUND>
uint32_t e4m3_row(const uint8_t* src, size_t n, const float* scale, size_t block_cols, float* out) {
    Largest largest;
    for (size_t c = 0; c < n; c += block_cols, ++scale) {
        const F s = splat(*scale);
        const auto value = [s](const uint8_t* p) { return rounded<ROUND>(e4m3_value(widen(load<Bytes>(p))) * s); };
        fill<1>(src + c, n - c < block_cols ? n - c : block_cols, out + c, largest, value);
    }
    return largest.of_all();
}

uint32_t e4m3(const uint8_t* src, size_t n, const float* scale, size_t block_cols, bool round_bf16, float* out) {
    return (round_bf16 ? e4m3_row<true> : e4m3_row<false>)(src, n, scale, block_cols, out);
}

uint32_t bf16(const uint8_t* src, size_t n, bool, float* out) {
    Largest largest;
    fill<2>(src, n, out, largest, [](const uint8_t* p) { return reinterpret_cast<F>(widen(load<Halves>(p)) << 16); });
    return largest.of_all();
}

template <bool ROUND>
uint32_t f16_row(const uint8_t* src, size_t n, float* out) {
    Largest largest;
    fill<2>(src, n, out, largest, [](const uint8_t* p) {
#if defined(__AVX512F__)
        const F x = reinterpret_cast<F>(_mm512_cvtph_ps(load<__m256i>(p)));
#elif defined(__AVX2__)
        const F x = reinterpret_cast<F>(_mm256_cvtph_ps(load<__m128i>(p)));
#else
        const F x = from_half(reinterpret_cast<I>(widen(load<Halves>(p))));
#endif
        return rounded<ROUND>(x);
    });
    return largest.of_all();
}

uint32_t f16(const uint8_t* src, size_t n, bool round_bf16, float* out) {
    return (round_bf16 ? f16_row<true> : f16_row<false>)(src, n, out);
}

template <bool ROUND>
uint32_t f32_row(const uint8_t* src, size_t n, float* out) {
    Largest largest;
    fill<4>(src, n, out, largest, [](const uint8_t* p) { return rounded<ROUND>(load<F>(p)); });
    return largest.of_all();
}

uint32_t f32(const uint8_t* src, size_t n, bool round_bf16, float* out) {
    return (round_bf16 ? f32_row<true> : f32_row<false>)(src, n, out);
}

uint32_t largest_of(const float* x, size_t n) {
    Largest a, b;  // two, for the latency
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

// n values to halves, LANES at a time.
template <typename Convert>
QK_INLINE void to_halves(const float* x, uint8_t* y, size_t n, Convert convert) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Halves h = convert(load<F>(x + i));
        std::memcpy(y + 2 * i, &h, sizeof h);
    }
    F rest{};
    std::memcpy(&rest, x + i, (n - i) * sizeof(float));
    const Halves h = convert(rest);
    std::memcpy(y + 2 * i, &h, (n - i) * sizeof(uint16_t));
}

}  // namespace

void quantize_f32(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float*) {
    std::memcpy(y, x, n_rows * n_cols * sizeof(float));
}

void quantize_f16(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float*) {
    to_halves(x, y, n_rows * n_cols, [](F v) {
#if defined(__AVX512F__)
        // masked by nothing: GCC 12 warns of the undefined value that its plain form begins with
        return reinterpret_cast<Halves>(
            _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
        return reinterpret_cast<Halves>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
        return __builtin_convertvector(to_half(v), Halves);
#endif
    });
}

void quantize_bf16(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float*) {
    to_halves(x, y, n_rows * n_cols, [](F v) {
        return __builtin_convertvector(reinterpret_cast<U>(round_to_bf16(v)) >> 16, Halves);
    });
}

extern const RowKernels ROWS = {e4m3, bf16, f16, f32, largest_of};

}  // namespace quantkit::QK_ISA
