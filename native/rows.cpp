// Stored rows to float32, one value at a time. See rows.h for the formats and the contract, rows_simd.cpp for the same
// with vectors.
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

template <typename T>
T load(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

// To nearest even; a NaN stays a NaN (quiet, sign kept).
float round_to_bf16(float x) {
    const uint32_t u = bits_of(x);
    if ((u & 0x7fffffffu) > INF_BITS) return float_of((u | 0x00400000u) & 0xffff0000u);
    return float_of((u + (0x7fffu + ((u >> 16) & 1u))) & 0xffff0000u);
}

// IEEE binary16: exact in float32, including subnormals, infinities and NaN payloads.
float f16_value(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t exponent = (h >> 10) & 0x1fu;
    const uint32_t mantissa = h & 0x3ffu;
    if (exponent == 0x1f) return float_of(sign | INF_BITS | (mantissa << 13));
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

// out[i] = value(i), rounded if asked; returns the largest magnitude.
template <typename Value>
uint32_t fill(size_t n, bool round_bf16, float* out, Value value) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; ++i) {
        const float x = value(i);
        out[i] = round_bf16 ? round_to_bf16(x) : x;
        largest = std::max(largest, bits_of(out[i]) & 0x7fffffffu);
    }
    return largest;
}

uint32_t e4m3(const uint8_t* src, size_t n, const float* scale, size_t block_cols, bool round_bf16, float* out) {
    static const std::array<float, 256> values = make_e4m3_values();
    uint32_t largest = 0;
    for (size_t c = 0; c < n; c += block_cols, ++scale) {
        const uint8_t* codes = src + c;
        const auto value = [codes, s = *scale](size_t i) { return values[codes[i]] * s; };
        largest = std::max(largest, fill(std::min(block_cols, n - c), round_bf16, out + c, value));
    }
    return largest;
}

uint32_t bf16(const uint8_t* src, size_t n, bool, float* out) {
    return fill(n, false, out, [src](size_t i) { return float_of(uint32_t{load<uint16_t>(src + 2 * i)} << 16); });
}

uint32_t f16(const uint8_t* src, size_t n, bool round_bf16, float* out) {
    return fill(n, round_bf16, out, [src](size_t i) { return f16_value(load<uint16_t>(src + 2 * i)); });
}

uint32_t f32(const uint8_t* src, size_t n, bool round_bf16, float* out) {
    return fill(n, round_bf16, out, [src](size_t i) { return load<float>(src + 4 * i); });
}

uint32_t largest_of(const float* x, size_t n) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; ++i) largest = std::max(largest, bits_of(x[i]) & 0x7fffffffu);
    return largest;
}

}  // namespace

const RowKernels PLAIN_ROWS = {e4m3, bf16, f16, f32, largest_of, nullptr, nullptr};

}  // namespace quantkit
