// Rows of a checkpoint to float32: see rows.h for the formats and the contract.
//
// The arithmetic is that of the reference converter: float32(weight) * scale, one rounding,
// then (for tensors that pass through a BF16 file) round to nearest even bfloat16.
#include "rows.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace quantkit {

namespace {

uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
}

float float_of(uint32_t u) {
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
}

float round_to_bf16(float x) { return float_of(static_cast<uint32_t>(f32_to_bf16(x)) << 16); }

// IEEE binary16: exact in float32, subnormals, infinities and NaN payloads included.
float f16_value(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t exponent = (h >> 10) & 0x1fu;
    const uint32_t mantissa = h & 0x3ffu;
    if (exponent == 0x1f) return float_of(sign | 0x7f800000u | (mantissa << 13));
    if (exponent == 0) {
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        return float_of(sign | bits_of(magnitude));
    }
    return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

std::array<float, 256> make_e4m3_values() {
    std::array<float, 256> values{};
    for (int code = 0; code < 256; ++code) {
        const int exponent = (code >> 3) & 15;
        const int mantissa = code & 7;
        float magnitude;
        if (exponent == 15 && mantissa == 7)
            magnitude = float_of(0x7fc00000u);
        else if (exponent == 0)
            magnitude = std::ldexp(static_cast<float>(mantissa), -9);
        else
            magnitude = std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
        values[code] = code & 0x80 ? -magnitude : magnitude;
    }
    return values;
}

}  // namespace

const float* e4m3_values() {
    static const std::array<float, 256> values = make_e4m3_values();
    return values.data();
}

uint16_t f32_to_bf16(float x) {
    const uint32_t u = bits_of(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 64u);
    return static_cast<uint16_t>((u + (0x7fffu + ((u >> 16) & 1u))) >> 16);
}

void e4m3_to_f32(const uint8_t* src, size_t n_rows, size_t n_cols, size_t src_stride, const float* scale,
                 size_t scale_stride, size_t row0, size_t block_rows, size_t block_cols, bool round_bf16, float* out) {
    const float* values = e4m3_values();
    float table[256];
    size_t r = 0;
    while (r < n_rows) {
        // All rows of this rectangle that lie in one row of blocks, block by block: the 256 products
        // of a block are made once, and every weight is then a look-up.
        const size_t block_row = (row0 + r) / block_rows;
        const size_t r_end = std::min(n_rows, (block_row + 1) * block_rows - row0);
        for (size_t c0 = 0; c0 < n_cols; c0 += block_cols) {
            const size_t c_end = std::min(n_cols, c0 + block_cols);
            const float s = scale[block_row * scale_stride + c0 / block_cols];
            if ((r_end - r) * (c_end - c0) >= 512) {
                for (int code = 0; code < 256; ++code) {
                    const float product = values[code] * s;
                    table[code] = round_bf16 ? round_to_bf16(product) : product;
                }
                for (size_t i = r; i < r_end; ++i) {
                    const uint8_t* in = src + i * src_stride;
                    float* to = out + i * n_cols;
                    for (size_t c = c0; c < c_end; ++c) to[c] = table[in[c]];
                }
            } else {
                for (size_t i = r; i < r_end; ++i) {
                    const uint8_t* in = src + i * src_stride;
                    float* to = out + i * n_cols;
                    for (size_t c = c0; c < c_end; ++c) {
                        const float product = values[in[c]] * s;
                        to[c] = round_bf16 ? round_to_bf16(product) : product;
                    }
                }
            }
        }
        r = r_end;
    }
}

void bf16_to_f32(const uint16_t* src, size_t n, float* out) {
    for (size_t i = 0; i < n; ++i) out[i] = float_of(static_cast<uint32_t>(src[i]) << 16);
}

void f16_to_f32(const uint16_t* src, size_t n, bool round_bf16, float* out) {
    for (size_t i = 0; i < n; ++i) {
        const float x = f16_value(src[i]);
        out[i] = round_bf16 ? round_to_bf16(x) : x;
    }
}

void f32_to_f32(const float* src, size_t n, bool round_bf16, float* out) {
    if (!round_bf16) {
        std::memcpy(out, src, n * sizeof(float));
        return;
    }
    for (size_t i = 0; i < n; ++i) out[i] = round_to_bf16(src[i]);
}

size_t first_nonfinite(const float* x, size_t n) {
    constexpr size_t chunk = 4096;
    for (size_t i = 0; i < n; i += chunk) {
        const size_t end = std::min(n, i + chunk);
        uint32_t bad = 0;
        for (size_t j = i; j < end; ++j) bad |= (bits_of(x[j]) & 0x7f800000u) == 0x7f800000u;
        if (!bad) continue;
        for (size_t j = i; j < end; ++j)
            if (!std::isfinite(x[j])) return j;
    }
    return n;
}

}  // namespace quantkit
