// E4M3 codes straight to a file's floats, a vector of codes at a time; see rows.h.
#pragma once
#include "row_values.h"
#include "rows.h"

namespace quantkit::QK_ISA {

namespace {

#if defined(__AVX2__)
template <FileFloat KIND>
struct As {
    static constexpr FileFloat TYPE = KIND;
};

// Vectors of bytes, of words, and of the halves that make one F.
#if defined(__AVX512F__)
using Bytes = __m512i;
QK_INLINE Bytes and_of(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
QK_INLINE Bytes max_bytes(Bytes a, Bytes b) { return _mm512_max_epu8(a, b); }
QK_INLINE Bytes all_bytes(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
QK_INLINE Bytes all_words(int x) { return _mm512_set1_epi16(static_cast<short>(x)); }
QK_INLINE Bytes left8(Bytes a) { return _mm512_slli_epi16(a, 8); }
QK_INLINE Bytes right1(Bytes a) { return _mm512_srai_epi16(a, 1); }
QK_INLINE Pair values_of(Bytes halves) {
    return {reinterpret_cast<F>(_mm512_maskz_cvtph_ps(0xffff, _mm512_castsi512_si256(halves))),
            reinterpret_cast<F>(_mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_extracti64x4_epi64(0xff, halves, 1)))};
}
// The same 16 bytes in each 128-bit part.
QK_INLINE Bytes repeated(const uint8_t* p) { return _mm512_broadcast_i32x4(load<__m128i>(p)); }
// Each byte: the one of its 128-bit part of `table` that the low half of `at` selects; 0 where bit 7 of `at` is set.
QK_INLINE Bytes looked_up(Bytes table, Bytes at) { return _mm512_shuffle_epi8(table, at); }
// Words of low and high bytes: out[0] for the first half of the codes that `spread` rearranged, out[1] for the second.
QK_INLINE Bytes spread(Bytes codes) {
    return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), codes);
}
QK_INLINE void words_of(Bytes low, Bytes high, Bytes* out) {
    out[0] = _mm512_unpacklo_epi8(low, high);
    out[1] = _mm512_unpackhi_epi8(low, high);
}
// The upper words of the lanes of both, alternating.
QK_INLINE Bytes upper_words(U even, U odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, reinterpret_cast<__m512i>(even >> 16), reinterpret_cast<__m512i>(odd));
}
// The lanes of both, alternating.
QK_INLINE void in_turn(F even, F odd, F* out) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    out[0] = reinterpret_cast<F>(
        _mm512_permutex2var_ps(reinterpret_cast<__m512>(even), low, reinterpret_cast<__m512>(odd)));
    out[1] = reinterpret_cast<F>(
        _mm512_permutex2var_ps(reinterpret_cast<__m512>(even), high, reinterpret_cast<__m512>(odd)));
}
#else
using Bytes = __m256i;
QK_INLINE Bytes and_of(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
QK_INLINE Bytes max_bytes(Bytes a, Bytes b) { return _mm256_max_epu8(a, b); }
QK_INLINE Bytes all_bytes(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
QK_INLINE Bytes all_words(int x) { return _mm256_set1_epi16(static_cast<short>(x)); }
QK_INLINE Bytes left8(Bytes a) { return _mm256_slli_epi16(a, 8); }
QK_INLINE Bytes right1(Bytes a) { return _mm256_srai_epi16(a, 1); }
QK_INLINE Pair values_of(Bytes halves) {
    return {reinterpret_cast<F>(_mm256_cvtph_ps(_mm256_castsi256_si128(halves))),
            reinterpret_cast<F>(_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)))};
}
QK_INLINE Bytes repeated(const uint8_t* p) { return _mm256_broadcastsi128_si256(load<__m128i>(p)); }
QK_INLINE Bytes looked_up(Bytes table, Bytes at) { return _mm256_shuffle_epi8(table, at); }
QK_INLINE Bytes spread(Bytes codes) { return _mm256_permute4x64_epi64(codes, 0xd8); }
QK_INLINE void words_of(Bytes low, Bytes high, Bytes* out) {
    out[0] = _mm256_unpacklo_epi8(low, high);
    out[1] = _mm256_unpackhi_epi8(low, high);
}
QK_INLINE Bytes upper_words(U even, U odd) {
    return _mm256_blend_epi16(reinterpret_cast<__m256i>(even >> 16), reinterpret_cast<__m256i>(odd), 0xaa);
}
QK_INLINE void in_turn(F even, F odd, F* out) {
    const __m256 low = _mm256_unpacklo_ps(reinterpret_cast<__m256>(even), reinterpret_cast<__m256>(odd));
    const __m256 high = _mm256_unpackhi_ps(reinterpret_cast<__m256>(even), reinterpret_cast<__m256>(odd));
    out[0] = reinterpret_cast<F>(_mm256_permute2f128_ps(low, high, 0x20));
    out[1] = reinterpret_cast<F>(_mm256_permute2f128_ps(low, high, 0x31));
}
#endif
constexpr size_t CODES = sizeof(Bytes);
typedef uint8_t ByteLanes __attribute__((vector_size(CODES)));
typedef uint16_t WordLanes __attribute__((vector_size(CODES)));

// STREAM: stores 16 bytes at a time, since that is all the alignment an array has.
template <bool STREAM, typename V>
QK_INLINE void put(uint8_t* p, V v) {
    if constexpr (STREAM) {
        __m128i part[sizeof v / 16];
        std::memcpy(part, &v, sizeof v);
        for (size_t i = 0; i < sizeof v / 16; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, part[i]);
    } else {
        std::memcpy(p, &v, sizeof v);
    }
}

// Converts CODES codes, none of them NaN, times s / 256.
template <FileFloat TYPE, bool STREAM>
QK_INLINE void e4m3_step(const uint8_t* src, F s, uint8_t* out) {
    const Bytes codes = load<Bytes>(src), kept = all_words(0xbf80);
    // as halves (see e4m3_pair), even-numbered and odd-numbered codes apart
    const Pair even = values_of(and_of(right1(left8(codes)), kept)), odd = values_of(and_of(right1(codes), kept));
    const F x[2][2] = {{even.a * s, odd.a * s}, {even.b * s, odd.b * s}};
    for (int h = 0; h < 2; ++h) {
        if constexpr (TYPE == FileFloat::BF16) {
            put<STREAM>(out + h * CODES, upper_words(bf16_upper(x[h][0]), bf16_upper(x[h][1])));
        } else {
            constexpr Round ROUND = TYPE == FileFloat::F32 ? Round::NO : Round::NO_LARGE_NAN;
            F made[2];
            in_turn(rounded<ROUND>(x[h][0]), rounded<ROUND>(x[h][1]), made);
            put<STREAM>(out + 2 * h * CODES, made[0]);
            put<STREAM>(out + 2 * h * CODES + CODES, made[1]);
        }
    }
}

QK_INLINE uint32_t largest_of_each(Bytes codes) {
    uint8_t each[CODES];
    std::memcpy(each, &codes, sizeof each);
    uint32_t largest = 0;
    for (uint8_t code : each) largest = code > largest ? code : largest;
    return largest;
}

// The largest of n codes, ignoring their signs.
QK_INLINE uint32_t largest_code(const uint8_t* src, size_t n) {
    Bytes most{};
    size_t i = 0;
    for (; i + CODES <= n; i += CODES) most = max_bytes(most, and_of(load<Bytes>(src + i), all_bytes(0x7f)));
    uint32_t largest = largest_of_each(most);
    for (; i < n; ++i) largest = (src[i] & 0x7fu) > largest ? src[i] & 0x7fu : largest;
    return largest;
}

// A code's magnitude grows with the code, and so does its rounded product with a scale: so the largest product in a
// block is that of its largest code. Returned as bits; s is 256 times the scale.
template <FileFloat TYPE>
QK_INLINE uint32_t magnitude_of(uint32_t code, F s) {
    constexpr Round ROUND = TYPE == FileFloat::F32_ROUNDED ? Round::NO_LARGE_NAN : Round::NO;
    const F product = values_of(all_words(static_cast<int>(code << 7))).a * s;
    return reinterpret_cast<U>(rounded<ROUND>(product))[0] & 0x7fffffff;
}

// The last codes of a block if they are fewer than CODES.
template <FileFloat TYPE>
QK_INLINE void e4m3_rest(const uint8_t* src, size_t n, F s, uint8_t* out) {
    constexpr size_t SIZE = TYPE == FileFloat::BF16 ? 2 : 4;
    uint8_t rest[CODES] = {}, made[CODES * SIZE];
    std::memcpy(rest, src, n);
    e4m3_step<TYPE, false>(rest, s, made);
    std::memcpy(out, made, n * SIZE);
}

template <FileFloat TYPE, bool STREAM>
uint32_t e4m3_file_row(const uint8_t* src, size_t n, const float* scale, size_t block_cols, uint8_t* out) {
    constexpr size_t SIZE = TYPE == FileFloat::BF16 ? 2 : 4;
    uint32_t largest = 0;
    for (size_t c = 0; c < n; c += block_cols, ++scale) {
        const size_t m = n - c < block_cols ? n - c : block_cols;
        const uint32_t code = largest_code(src + c, m);
        const float scale256 = *scale * 256;  // exact, subnormal scales included, unless it overflows
        if (code == 0x7f || !(scale256 - scale256 == 0)) return INF_BITS;
        const F s = splat(scale256);
        size_t i = 0;
        for (; i + CODES <= m; i += CODES) e4m3_step<TYPE, STREAM>(src + c + i, s, out + (c + i) * SIZE);
        if (i < m) e4m3_rest<TYPE>(src + c + i, m - i, s, out + (c + i) * SIZE);
        const uint32_t magnitude = magnitude_of<TYPE>(code, s);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

// The bfloat16 values of all codes at one scale, from tables with 16 entries of one byte each.
//
// A code e, m (exponent, mantissa) with e >= 1 stands for (8 + m) * 2^(e - 10). Its product with the scale, rounded to
// float32 and then to bfloat16, differs from the product for another e and the same m only by a power of two, as long
// as neither is subnormal, since rounding then does not depend on the power of two. So the words of two such
// codes differ by the difference of their e << 7. With k = e / 2 rounded down, the word is that of (e & 1, m), of
// which there are 16, plus k << 8, without a carry from the low byte. Codes with e = 0 have their own table, which
// holds the xor of what the other table gives for them and the right value.
struct Bf16OfCode {
    alignas(16) uint8_t low[16], high[16];            // at e & 1, m, for k = 0
    alignas(16) uint8_t mend_low[16], mend_high[16];  // at 8 + m, for e = 0; the first eight are unused

    // Returns false if the scale is not finite or gives subnormals. If the largest codes overflow, so do their words,
    // in the same way; the caller refuses them by the largest magnitude.
    bool make(float scale256) {
        if (!(scale256 - scale256 == 0)) return false;
        constexpr int SMALLEST = 24;  // of the codes with e = 1
        uint8_t codes[CODES] = {}, made[CODES * 2];
        for (int i = 0; i < 16; ++i) codes[i] = static_cast<uint8_t>(16 + i);  // e = 2, 3
        for (int m = 0; m < 8; ++m) codes[16 + m] = static_cast<uint8_t>(m);
        codes[SMALLEST] = 8;
        e4m3_step<FileFloat::BF16, false>(codes, splat(scale256), made);
        uint16_t word[CODES];
        std::memcpy(word, made, sizeof word);
        if ((word[SMALLEST] & 0x7fff) < 0x100) return false;
        for (int i = 0; i < 16; ++i) {
            const unsigned w = word[i] - 0x100u;
            low[i] = static_cast<uint8_t>(w), high[i] = static_cast<uint8_t>(w >> 8);
        }
        for (int m = 0; m < 8; ++m) {
            mend_low[m] = mend_high[m] = 0;
            mend_low[8 + m] = static_cast<uint8_t>(word[16 + m] ^ low[m]);
            mend_high[8 + m] = static_cast<uint8_t>(word[16 + m] >> 8 ^ high[m]);
        }
        return true;
    }

    template <bool STREAM>
    QK_INLINE void step(Bytes codes, Bytes magnitude, uint8_t* out) const {
        const Bytes subnormal = Bytes(ByteLanes(magnitude) + 0x78);  // bit 7 where e >= 1
        const Bytes k = Bytes(WordLanes(magnitude) >> 4 & 0x0707);
        const Bytes l = looked_up(repeated(low), magnitude) ^ looked_up(repeated(mend_low), subnormal);
        const Bytes h = Bytes(ByteLanes(looked_up(repeated(high), magnitude)) + ByteLanes(k)) ^
                        looked_up(repeated(mend_high), subnormal) ^ codes ^ magnitude;
        Bytes words[2];
        words_of(l, h, words);
        put<STREAM>(out, words[0]);
        put<STREAM>(out + CODES, words[1]);
    }
};

// Rows that share their scales to bfloat16, by tables. INF_BITS as in e4m3_to_file, and if a scale suits no table.
template <bool STREAM>
uint32_t bf16_by_tables(const uint8_t* src, size_t n_rows, size_t n, const float* scale, size_t block_cols,
                        uint8_t* out) {
    constexpr size_t BAND = 64;  // blocks whose tables are kept at the same time
    Bf16OfCode tables[BAND];
    uint32_t largest = 0;
    for (size_t start = 0; start < n; start += BAND * block_cols) {
        const size_t width = n - start < BAND * block_cols ? n - start : BAND * block_cols;
        const float* const scales = scale + start / block_cols;
        const size_t n_blocks = (width + block_cols - 1) / block_cols;
        Bytes most[BAND] = {};
        for (size_t b = 0; b < n_blocks; ++b)
            if (!tables[b].make(scales[b] * 256)) return INF_BITS;
        for (size_t r = 0; r < n_rows; ++r)
            for (size_t b = 0; b < n_blocks; ++b) {
                const size_t m = width - b * block_cols < block_cols ? width - b * block_cols : block_cols;
                const size_t at = r * n + start + b * block_cols;
                const Bf16OfCode table = tables[b];
                Bytes seen = most[b];
                size_t i = 0;
                for (; i + CODES <= m; i += CODES) {
                    const Bytes codes = spread(load<Bytes>(src + at + i)), magnitude = and_of(codes, all_bytes(0x7f));
                    seen = max_bytes(seen, magnitude);
                    table.step<STREAM>(codes, magnitude, out + 2 * (at + i));
                }
                if (i < m) {
                    uint8_t rest[CODES] = {};
                    std::memcpy(rest, src + at + i, m - i);
                    seen = max_bytes(seen, and_of(load<Bytes>(rest), all_bytes(0x7f)));
                    e4m3_rest<FileFloat::BF16>(src + at + i, m - i, splat(scales[b] * 256), out + 2 * (at + i));
                }
                most[b] = seen;
            }
        for (size_t b = 0; b < n_blocks; ++b) {
            const uint32_t code = largest_of_each(most[b]);
            if (code == 0x7f) return INF_BITS;
            const uint32_t magnitude = magnitude_of<FileFloat::BF16>(code, splat(scales[b] * 256));
            largest = magnitude > largest ? magnitude : largest;
        }
    }
    return largest;
}

// Rows that share their scales.
template <FileFloat TYPE, bool STREAM>
uint32_t e4m3_file_rows(const uint8_t* src, size_t n_rows, size_t n, const float* scale, size_t block_cols,
                        uint8_t* out) {
    if constexpr (TYPE == FileFloat::BF16) {
        constexpr size_t WORTH_TABLES = 8;
        if (n_rows >= WORTH_TABLES && block_cols >= CODES) {
            const uint32_t bits = bf16_by_tables<STREAM>(src, n_rows, n, scale, block_cols, out);
            if (bits < INF_BITS) return bits;
        }
    }
    uint32_t largest = 0;
    for (size_t r = 0; r < n_rows && largest < INF_BITS; ++r) {
        const size_t at = r * n;
        const uint32_t bits =
            e4m3_file_row<TYPE, STREAM>(src + at, n, scale, block_cols, out + at * (TYPE == FileFloat::BF16 ? 2 : 4));
        largest = bits > largest ? bits : largest;
    }
    return largest;
}
#endif

}  // namespace

}  // namespace quantkit::QK_ISA
