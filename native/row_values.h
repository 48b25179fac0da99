// Loading the values of rows into lanes, and rounding them to bfloat16.
#pragma once
#include "lanes.h"

namespace quantkit::QK_ISA {

namespace {

template <typename V>
QK_INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Rounds to bfloat16 (nearest, ties to even) in the upper half of each lane; the lower half is leftovers. Not for a NaN
// whose bits would carry into the sign.
QK_INLINE U bf16_upper(F x) {
    const U u = reinterpret_cast<U>(x);
    return u + ((u >> 16 & 1) + 0x7fff);
}

enum class Round { NO, YES, NO_LARGE_NAN };

// Rounds to bfloat16. A NaN stays a NaN.
template <Round ROUND>
QK_INLINE F rounded(F x) {
    if (ROUND == Round::NO) return x;
    const I upper = reinterpret_cast<I>(bf16_upper(x) & 0xffff0000);
    return float_of(ROUND == Round::NO_LARGE_NAN ? upper : upper | ((x != x) & 0x7fc00000));
}

struct Pair {
    F a, b;
};

}  // namespace

}  // namespace quantkit::QK_ISA
