// What the error feedback of IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S shares: eight columns are sizes from a grid,
// times signs, of which some types want an even number.
//
// There are too many codes for a metric M that is not diagonal. So a few that are good under M's diagonal, with x's
// signs, are scored under M: of points with the same first half the one that is best, and of these the best few; then
// the best of these has the one or two signs turned that help most.
#pragma once
#include <stdexcept>
#include <string>

#include "codebooks.h"
#include "feedback_iq.h"

namespace quantkit::QK_ISA {

namespace {

// Columns as sizes and signs (a bit each), and where the number of signs is odd though it must be even.
struct Target {
    F size[8];
    I signs, odd;
};

template <bool PARITY>
QK_INLINE Target target_of(const F* t) {
    Target out{};
    for (int i = 0; i < 8; ++i) {
        const I negative = I(t[i] < 0.0f);
        out.size[i] = abs_of(t[i]);
        out.signs |= negative & (1 << i);
        if constexpr (PARITY) out.odd ^= negative;
    }
    return out;
}

QK_INLINE void put_signs(I signs, const F* size, F* v) {
    for (int i = 0; i < 8; ++i) v[i] = float_of(bits_of(size[i]) ^ (((signs >> i) & 1) << 31));
}

// The signs of a target for given sizes: with the flip that costs least where their number is odd.
template <bool PARITY>
QK_INLINE I signs_for(const Target& t, const float* m, const F* size) {
    if constexpr (!PARITY) return t.signs;
    F least = m[0] * t.size[0] * size[0];
    I at = splat(1);
    for (int i = 1; i < 8; ++i) {
        const F cost = m[9 * i] * t.size[i] * size[i];
        const I less = I(cost < least);
        least = select(less, cost, least);
        at = select(less, splat(1 << i), at);
    }
    return t.signs ^ (at & t.odd);
}

// h = (x - v) M
QK_INLINE void pull_of(const float* m, const F* x, const F* v, F* h) {
    F r[8];
    for (int i = 0; i < 8; ++i) r[i] = x[i] - v[i];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
        F t = r[0] * m[j];
#pragma GCC unroll 8
        for (int i = 1; i < 8; ++i) t += r[i] * m[8 * i + j];
        h[j] = t;
    }
}

// The flip of one sign (unless their number must stay even) or of two that lowers (x - v) M (x - v)^T most, as bits.
template <bool PARITY>
QK_INLINE I best_flip(const float* m, const F* v, const F* h) {
    F change[8], least{};
    I at{};
    for (int i = 0; i < 8; ++i) {
        change[i] = v[i] * (h[i] + v[i] * m[9 * i]);
        if constexpr (!PARITY) {
            const I less = I(change[i] < least);
            least = select(less, change[i], least);
            at = select(less, splat(1 << i), at);
        }
    }
    for (int i = 0; i < 8; ++i)
        for (int j = i + 1; j < 8; ++j) {
            const F both = change[i] + change[j] + (v[i] * v[j]) * (2.0f * m[8 * i + j]);
            const I less = I(both < least);
            least = select(less, both, least);
            at = select(less, splat(1 << i | 1 << j), at);
        }
    return at;
}

// Puts `t` into the N least so far, in order.
template <int N>
QK_INLINE void keep_least(F* least, F t) {
    for (int i = 0; i < N; ++i) {
        const F other = max_of(least[i], t);
        least[i] = min_of(least[i], t);
        t = other;
    }
}

// A score that is not negative with a number below 2^BITS in its last places.
template <int BITS>
QK_INLINE F numbered(F score, int n) { return float_of((bits_of(score) & ~((1 << BITS) - 1)) | n); }

// Of LANES values each, those of a number of their own in every lane.
QK_INLINE I lanes_at(const I* values, I number) {
    I lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    return look_up(reinterpret_cast<const int32_t*>(values), number * LANES + lane);
}

// G is a type's grid: `candidates(target, m, s, take)` calls take(code, size) for codes without signs that are good
// under the diagonal of M; `sizes(code, s, size)` gives their sizes.
template <bool PARITY, int SIGNS_AT, typename G>
QK_INLINE I code_of_signed(const G& grid, const float* m, const float* inverse, const F* x, F s, F* v) {
    F best = splat(INFINITY), e[8], size[8], h[8];
    I code{};
    const Target target = target_of<PARITY>(x);
    grid.candidates(target, m, s, [&](I unsigned_code, const F* sizes) QK_LAMBDA {
        const I signs = signs_for<PARITY>(target, m, sizes);
        F w[8];
        put_signs(signs, sizes, w);
        const F cost = errors_of(inverse, x, w, e);
        const I less = I(cost < best);
        best = select(less, cost, best);
        code = select(less, unsigned_code | signs << SIGNS_AT, code);
    });
    grid.sizes(code, s, size);
    put_signs(code >> SIGNS_AT, size, v);
    pull_of(m, x, v, h);
    code ^= best_flip<PARITY>(m, v, h) << SIGNS_AT;
    put_signs(code >> SIGNS_AT, size, v);
    return code;
}

}  // namespace

}  // namespace quantkit::QK_ISA
