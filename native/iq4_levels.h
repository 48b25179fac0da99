// The levels of IQ4_NL and IQ4_XS, finding the nearest of them, and ggml's search for a scale (see iq4.cpp). Shared by
// iq4.cpp and error feedback.
//
// Two things replace best_index_int8, ggml's search for the level nearest to a scaled value:
//
// Thresholds. For adjacent levels a < b ggml takes a if fl(v - a) < fl(b - v), else b. As v grows, the
// left side never falls and the right side never grows, so there is one float from which on b is taken. It is the
// midpoint: Levels evaluates ggml's own expression there (giving b) and at the float before it (giving a). A NaN is
// below no threshold and gets the last level, as in ggml.
//
// Two candidates per value. The tries scale by (t + level[0]) / max, t = -7..7. For one x, fl(id * x) is monotone in
// id, so in all tries it lies between its values at t = -7 and t = 7, which have the same sign and a ratio of at
// most (127+7)/(127-7) = 1.117. Neighbouring thresholds of the same sign have ratios of 1.2 and more (Levels checks
// this too), so at most one lies between: each try only decides between the level at t = -7 and the next one towards
// zero, whose products are computed once.
#pragma once
#include "codebooks.h"
#include "lanes.h"

#include <cmath>
#include <stdexcept>

namespace quantkit::QK_ISA {

namespace {

constexpr int NTRY = 7;
constexpr float LEAST_LARGEST = 1e-15f;  // smallest maximum of a group that is not all zeros: ggml's GROUP_MAX_EPS
constexpr float SPREAD = 1.12f;  // an upper bound on the largest try's scale over the smallest's

// Looks up an eight-entry table by index 0..7 in each lane; the table is repeated if there are more lanes.
struct Table8 {
    alignas(64) float entry[LANES];

    void set(int i, float x) {
        for (int lane = i; lane < LANES; lane += 8) entry[lane] = x;
    }
    QK_INLINE F operator[](I index) const {
        F table;
        std::memcpy(&table, entry, sizeof table);
#if defined(__AVX512F__)
        return reinterpret_cast<F>(
            _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), reinterpret_cast<__m512>(table)));
#elif defined(__AVX2__)
        return reinterpret_cast<F>(
            _mm256_permutevar8x32_ps(reinterpret_cast<__m256>(table), reinterpret_cast<__m256i>(index)));
#else
        F out;
        for (int lane = 0; lane < LANES; ++lane) out[lane] = table[index[lane]];
        return out;
#endif
    }
};

// The levels, and the thresholds from which on the next level is nearest.
struct Levels {
    float first;             // level 0, the largest in magnitude
    float at3, at7, at11;    // thresholds: level k + 1 from at_k on
    Table8 at_odd, at_even;  // [i] = at 4*(i/2)+1; at 2*i
    Table8 even, odd;        // levels 2*i, 2*i + 1
    Table8 even_in, odd_in;  // for each the next level towards zero; for the one whose range contains zero, itself

    explicit Levels(const Codebook& book) {
        const int8_t* v = book.values;
        float at[15];
        bool known = static_cast<float>(v[0] - NTRY) > SPREAD * static_cast<float>(v[0] + NTRY);
        for (int k = 0; k < 15; ++k) {
            const float a = v[k], b = v[k + 1], middle = (a + b) * 0.5f, below = std::nextafterf(middle, -1e9f);
            const float last = k ? at[k - 1] : 0.0f, low = std::fabs(last), high = std::fabs(middle);
            const bool exact = a < b && below - a < b - below && !(middle - a < b - middle);
            const bool apart = last * middle <= 0.0f || std::fmin(low, high) * SPREAD < std::fmax(low, high);
            known &= exact && apart;
            at[k] = middle;
        }
        if (!known) throw std::logic_error("quantize: the codebook IQ4_NL is not ggml's");
        first = v[0];
        at3 = at[3], at7 = at[7], at11 = at[11];
        // level k is nearest to the values from at[k - 1] to at[k]
        const auto inner = [&](int k) -> float {
            if (k < 15 && at[k] <= 0.0f) return v[k + 1];
            return k > 0 && at[k - 1] > 0.0f ? v[k - 1] : v[k];
        };
        for (int i = 0; i < 8; ++i) {
            at_odd.set(i, at[4 * (i / 2) + 1]);
            at_even.set(i, at[2 * i]);
            even.set(i, v[2 * i]);
            odd.set(i, v[2 * i + 1]);
            even_in.set(i, inner(2 * i));
            odd_in.set(i, inner(2 * i + 1));
        }
    }
};

// best_index_int8 for LANES values at once: half the index, rounded down, and whether the level is the pair's even one.
struct Index {
    I pair, even;

    QK_INLINE I value() const { return (pair << 1) + 1 + even; }
};

QK_INLINE Index index_of(const Levels& levels, F x) {
    const I b3 = I(x < levels.at7);
    const I b2 = I(x < select(b3, splat(levels.at3), splat(levels.at11)));
    I pair = (4 & ~b3) | (2 & ~b2);
    pair |= 1 & ~I(x < levels.at_odd[pair]);
    return {pair, I(x < levels.at_even[pair])};
}

QK_INLINE F level_of(const Levels& levels, Index i) { return select(i.even, levels.even[i.pair], levels.odd[i.pair]); }

QK_INLINE F inner_of(const Levels& levels, Index i) {
    return select(i.even, levels.even_in[i.pair], levels.odd_in[i.pair]);
}

// A value's two candidates: their products with weight and value, and with weight and level; and
// the scaled value from which on the upper one is nearest.
struct Candidates {
    F at, low_x, high_x, low_q, high_q;
};

// sum w*q*x and sum w*q*q for N tries side by side.
template <int N>
QK_INLINE void sums_of_tries(const F* x, const Candidates* c, const F* id, F* sumqx, F* sumq2) {
    F sx[N] = {}, s2[N] = {};
    for (int j = 0; j < 32; ++j)
        for (int t = 0; t < N; ++t) {
            const I low = I(id[t] * x[j] < c[j].at);
            sx[t] += select(low, c[j].low_x, c[j].high_x);
            s2[t] += select(low, c[j].low_q, c[j].high_q);
        }
    for (int t = 0; t < N; ++t) sumqx[t] = sx[t], sumq2[t] = s2[t];
}

// The scale for 32 values with weights w: the first try has the opposite sign, then follow t = -7..7.
QK_INLINE F scale_of(const Levels& levels, const F* x, const F* w) {
    F amax{}, max{};
    for (int j = 0; j < 32; ++j) {
        const F ax = abs_of(x[j]);
        const I more = I(ax > amax);
        amax = select(more, ax, amax);
        max = select(more, x[j], max);
    }
    F id[2 * NTRY + 1];
    for (int t = -NTRY; t <= NTRY; ++t) id[t + NTRY] = (static_cast<float>(t) + levels.first) / max;
    const F first = 1.0f / (-max / levels.first);
    F sumqx{}, sumq2{};
    Candidates candidates[32];
    for (int j = 0; j < 32; ++j) {
        const F q = level_of(levels, index_of(levels, first * x[j]));
        const F wq = w[j] * q;
        sumqx += wq * x[j];
        sumq2 += wq * q;
        const Index outer = index_of(levels, id[0] * x[j]);
        const F a = level_of(levels, outer), b = inner_of(levels, outer);
        const F low = min_of(a, b), high = max_of(a, b), wl = w[j] * low, wh = w[j] * high;
        candidates[j] = {(low + high) * 0.5f, wl * x[j], wh * x[j], wl * low, wh * high};
    }
    F d = select(I(sumq2 > 0.0f), sumqx / sumq2, F{});
    F best = d * sumqx;
    constexpr int SIDE_BY_SIDE = LANES == 16 ? 8 : 5;
    F sx[2 * NTRY + 1], s2[2 * NTRY + 1];
    for (int t = 0; t < 2 * NTRY + 1;) {
        if constexpr (LANES == 16) {
            if (t == 0)
                sums_of_tries<8>(x, candidates, id, sx, s2);
            else
                sums_of_tries<7>(x, candidates, id + t, sx + t, s2 + t);
        } else {
            sums_of_tries<5>(x, candidates, id + t, sx + t, s2 + t);
        }
        t += SIDE_BY_SIDE;
    }
    for (int t = 0; t < 2 * NTRY + 1; ++t) {
        const I better = I(s2[t] > 0.0f) & I(sx[t] * sx[t] > best * s2[t]);
        d = select(better, sx[t] / s2[t], d);
        best = select(better, d * sx[t], best);
    }
    return select(I(amax < LEAST_LARGEST), F{}, d);
}

// Sets w to the weights of a super-block of N values; with WEIGHTS, w holds the importance before.
template <int N, bool WEIGHTS>
QK_INLINE void weigh(const F* x, F* w) {
    if constexpr (WEIGHTS) {
        F sigma2{};
        for (int k = 0; k < N; ++k) sigma2 += x[k] * x[k];
        sigma2 *= 2.0f / static_cast<float>(N);
        for (int k = 0; k < N; ++k) w[k] = w[k] * sqrt_of(sigma2 + x[k] * x[k]);
    } else {
        for (int k = 0; k < N; ++k) w[k] = x[k] * x[k];
    }
}

// x ? 1 / x : 0
QK_INLINE F inverse_of(F x) { return select(I(x == 0.0f), F{}, 1.0f / x); }

// IQ4_XS: the scales of 8 groups of 32 values with weights w; returns the super-block's scale.
QK_INLINE F scale_iq4_xs(const Levels& levels, const F* x, const F* w, F* scales) {
    F amax{}, max{};
    for (int b = 0; b < 8; ++b) {
        scales[b] = scale_of(levels, x + 32 * b, w + 32 * b);
        const F a = abs_of(scales[b]);
        const I more = I(a > amax);
        amax = select(more, a, amax);
        max = select(more, scales[b], max);
    }
    return -max / 32.0f;
}

}  // namespace

}  // namespace quantkit::QK_ISA
