// IQ1_S: finding ggml's best split of a sorted group into three levels without scoring every split.
#pragma once
#include "iq1_sort.h"

namespace quantkit::QK_ISA {

namespace {

// The result of ggml's search over (i1, i2, shift): values below `low` have level 0, those from `high` on level 2.
// SHIFTS: each part of the group has its own shift.
template <int SHIFTS>
struct Split {
    F scale;
    I low, high;        // keys
    I down[SHIFTS];     // masks: the levels are shifted down
    I none;             // mask: nothing found
    I nearest[SHIFTS];  // masks: the scale is positive, and each value has its nearest level there, with room to spare
};

// Sorts h ascending, given that it falls and then rises, and moves v along.
template <int N>
QK_INLINE void merge_bitonic(F* h, F* v) {
#pragma GCC unroll 32
    for (int i = 0; i < N / 2; ++i) {
        const F a = h[i], b = h[i + N / 2], va = v[i], vb = v[i + N / 2];
        const I swap = I(a > b);
        h[i] = min_of(a, b);
        h[i + N / 2] = max_of(a, b);
#if defined(__AVX512F__)
        v[i] = select(swap, vb, va);
        v[i + N / 2] = select(swap, va, vb);
#else
        const I change = (bits_of(va) ^ bits_of(vb)) & swap;  // cheaper than two blends
        v[i] = float_of(bits_of(va) ^ change);
        v[i + N / 2] = float_of(bits_of(vb) ^ change);
#endif
    }
    if constexpr (N > 2) {
        merge_bitonic<N / 2>(h, v);
        merge_bitonic<N / 2>(h + N / 2, v + N / 2);
    }
}

// Returns, approximately, the best score of any split under one shift, as the fraction n / d, and the sum of |w*x|. For
// each scale the best split is known: each value takes its nearest level. As the scale falls from infinity, values
// leave level 1 for an outer one, one after another; only the splits on this path can be best. C is the increase of the
// level's square at that moment, and H = |x| / C is half the scale at which it happens.
template <int N>
QK_INLINE void best_on_path(const Group<N>& g, F total_x, F total_w, float shift, float c_negative, float c_positive,
                            F* n_out, F* d_out, F* sum_abs) {
    F h[N], v[N];
    for (int j = 0; j < N; ++j) {
        const F x = g.sorted_x[j];
        h[j] = max_of(x * (1.0f / c_positive), x * (-1.0f / c_negative));
        v[j] = g.sorted_w[j] * select(I(x < 0.0f), splat(c_negative), splat(c_positive));
    }
    merge_bitonic<N>(h, v);
    F qx = total_x * shift, q2 = total_w * (shift * shift);
    const F start = qx;
    F n = qx * qx, d = q2;
    for (int j = N - 1; j >= 0; --j) {
        qx = about_fma(v[j], h[j], qx);
        q2 += v[j];
        const F m = qx * qx;
        const I more = I(m * d > n * q2);
        n = select(more, m, n);
        d = select(more, q2, d);
    }
    *n_out = n;
    *d_out = d;
    *sum_abs = qx - start;
}

// ggml's sum over the three levels, of values (levels to the first power) or weights (squares), from the sums below i1,
// below i2 and of all.
template <bool SQUARES, typename T>
QK_INLINE T sum_of_levels(const float* q, T s1, T s2, T all) {
    if constexpr (SQUARES) return s1 * q[0] * q[0] + (s2 - s1) * q[1] * q[1] + (all - s2) * q[2] * q[2];
    return s1 * q[0] + (s2 - s1) * q[1] + (all - s2) * q[2];
}

// The highest level, its square, and by how much the square falls at the first and the second cut.
struct Levels {
    float top, square, fall1, fall2;
};
constexpr Levels LEVELS[2] = {{1 + DELTA, 1.265625f, 0.75f, -1.25f}, {1 - DELTA, 0.765625f, 1.25f, -0.75f}};

// Positions of the splits (i1, i2) of N values in ggml's order.
template <int N>
struct Splits {
    static constexpr int COUNT = (N + 1) * (N + 2) / 2;
    uint8_t i1[COUNT] = {}, i2[COUNT] = {};
    constexpr Splits() {
        int n = 0;
        for (int a = 0; a <= N; ++a)
            for (int b = a; b <= N; ++b) i1[n] = static_cast<uint8_t>(a), i2[n++] = static_cast<uint8_t>(b);
    }
};

template <int N>
constexpr Splits<N> SPLITS{};

// ggml's search unchanged, for one lane; the sums are [N + 1][LANES]. Splits with the same i1 are compared with the
// best LANES at a time: those that are not better change nothing, and the first better one becomes the best.
template <int N>
__attribute__((noinline)) void scan_lane(const Group<N>& g, const F* sum_x, const F* sum_w, int lane, Split<1>& out) {
    constexpr int PADDED = N + LANES;
    float sx[PADDED + 1], sw[PADDED + 1];
    for (int j = 0; j <= PADDED; ++j) sx[j] = sum_x[j < N ? j : N][lane], sw[j] = sum_w[j < N ? j : N][lane];
    const F all_x = splat(sx[N]), all_w = splat(sw[N]);
    float best_score = -FLT_MAX, scale = 0;
    int best1 = -1, best2 = -1;
    bool down = false;
    for (int i1 = 0; i1 <= N; ++i1) {
        const F x1 = splat(sx[i1]), w1 = splat(sw[i1]);
        for (int i2 = i1; i2 <= N; i2 += LANES) {
            F x2, w2, sumqx[2], sumq2[2];
            std::memcpy(&x2, sx + i2, sizeof x2);
            std::memcpy(&w2, sw + i2, sizeof w2);
            sumqx[0] = sum_of_levels<false>(UP, x1, x2, all_x);
            sumq2[0] = sum_of_levels<true>(UP, w1, w2, all_w);
            sumqx[1] = sum_of_levels<false>(DOWN, x1, x2, all_x);
            sumq2[1] = sum_of_levels<true>(DOWN, w1, w2, all_w);
            const uint32_t real = N + 1 - i2 >= LANES ? (1u << LANES) - 1 : (1u << (N + 1 - i2)) - 1;
            uint32_t left = real, left_down = real;
            for (;;) {
                const uint32_t ups =
                    left & bits_set(I(sumq2[0] > 0.0f) & I(sumqx[0] * sumqx[0] > best_score * sumq2[0]));
                const uint32_t downs =
                    left_down & bits_set(I(sumq2[1] > 0.0f) & I(sumqx[1] * sumqx[1] > best_score * sumq2[1]));
                if (!(ups | downs)) break;
                const int at = __builtin_ctz(ups | downs);
                down = !(ups >> at & 1);
                scale = sumqx[down][at] / sumq2[down][at];
                best_score = scale * sumqx[down][at];
                best1 = i1, best2 = i2 + at;
                left = real & ~0u << at << 1;
                left_down = down ? left : real & ~0u << at;
            }
        }
    }
    out.none[lane] = best1 < 0 ? -1 : 0;
    if (best1 < 0) return;
    out.scale[lane] = scale;
    out.low[lane] = g.sorted[best1][lane];
    out.high[lane] = g.sorted[best2][lane];
    out.down[0][lane] = down ? -1 : 0;
}

// ggml's exhaustive search. A split's score is sumqx^2 / sumq2; with the levels v, which are 1 apart,
//   sumqx = X v2 - X1 - X2,  sumq2 = W v2^2 + W1 (v0^2 - v1^2) + W2 (v1^2 - v2^2)
// for the sums X, W of all and X1, W1, X2, W2 of those below i1 and i2.
//
// 1. best_on_path gives approximately the best score, `top`. Let t = top (1 - 2^-16). A shift whose best score is below
//    t (1 - 2^-10) is left out. Proof: let u = 2^-24, M = sum |w x|, W = sum w, and M^2 < 4 t W (else it is not left
//    out). ggml's sums differ from the true ones by less than 110 u M (33 roundings in each of three prefix sums of at
//    most M, and its own) and 113 u W. A split that scores t in ggml's floats, with true sums qx and q2 >= W/64 (no
//    level is nearer to 0 than 1/8), has |qx| > sqrt(t (q2 - 113 u W)) - 110 u M > sqrt(t q2) (1 - 2.2e-4 - 1.1e-4), so
//    its true score is above t (1 - 6.5e-4). No true score is above the best on the path (for negative scales a
//    constant is best, where the path starts), and that is computed to within 8e-5: 41 u M in qx > sqrt(t W) / 8.
// 2. All splits whose score may be above t (1 - 2^-20) are listed: those with qx^2 > t q2 - slack, computed in a short
//    way. ggml's floats differ from those: sums of products of at most M = sum |w x| in up to 11
//    roundings give |qx - sumqx| < 11 u M, |qx^2 - sumqx^2| < 29 u M^2, t |q2 - sumq2| < 18 u t W; with the roundings
//    of the comparison and the 2^-20 this is less than slack = 2^-18 (M^2 + t W) = 64 u (M^2 + t W).
// 3. The listed splits are computed exactly as in ggml, in its order, and those scoring above t compared as in ggml,
//    whose comparison of two scores errs by at most 4.1 u, relatively. So if no score lies between t (1 - 2^-20) and t,
//    every split above t replaces any below, none below replaces one above, and the one left at the end is
//    ggml's. If a score lies there, two higher values of t are tried; their lists are parts of the same list.
// 4. A lane for which no t works, or that has no score above t, or is out of the range in which the bounds hold, is
//    searched as in ggml.
template <int N>
__attribute__((noinline)) void search_split(const Group<N>& g, Split<1>& out) {
    F sum_x[N + 1], sum_w[N + 1];
    sum_x[0] = sum_w[0] = F{};
    for (int j = 0; j < N; ++j) {
        sum_x[j + 1] = sum_x[j] + g.sorted_w[j] * g.sorted_x[j];
        sum_w[j + 1] = sum_w[j] + g.sorted_w[j];
    }
    const F all_x = sum_x[N], all_w = sum_w[N];
    F n_up, d_up, n_down, d_down, sum_abs;
    best_on_path(g, all_x, all_w, DELTA, 0.75f, 1.25f, &n_up, &d_up, &sum_abs);
    best_on_path(g, all_x, all_w, -DELTA, 1.25f, 0.75f, &n_down, &d_down, &sum_abs);
    const I downward = I(n_down * d_up > n_up * d_down);
    const F n = select(downward, n_down, n_up), d = select(downward, d_down, d_up);
    const F t = n / d * (1.0f - 0x1p-16f);
    const F scope = sum_abs * sum_abs + t * all_w, slack = scope * 0x1p-18f;
    // this keeps the products of best_on_path in range too: at most M^2 W, at least t W^2 / 4096 where it matters
    I odd = ~(I(n > 1e-30f) & I(n < 1e30f) & I(d > 1e-24f) & I(d < 1e30f) & I(scope < 1e32f) &
              I(sum_abs * sum_abs * all_w < 1e37f) & I(t * all_w * all_w > 1e-31f));
    const F other_n = select(downward, n_up, n_down), other_d = select(downward, d_up, d_down);
    const I both = ~I(other_n < t * (1.0f - 0x1p-10f) * other_d) | ~I(sum_abs * sum_abs < 4.0f * t * all_w);

    constexpr int COUNT = Splits<N>::COUNT, PADDED = (COUNT + 15) / 16 * 16;
    alignas(64) Bits hits[PADDED][2] = {};  // for the better shift, for the other
    const uint32_t turned = bits_set(downward);
    for (int role = 0; role < 2; ++role) {
        const uint32_t wanted = role ? bits_set(both & ~odd) : ~0u;
        if (!wanted) break;
        const I down = role ? ~downward : downward;
        const auto level = [&](float Levels::*field) {
            return select(down, splat(LEVELS[1].*field), splat(LEVELS[0].*field));
        };
        const F fall1 = t * level(&Levels::fall1), fall2 = t * level(&Levels::fall2);
        const F qx0 = all_x * level(&Levels::top), t0 = t * all_w * level(&Levels::square) - slack;
        F t2[N + 1];
        for (int i = 0; i <= N; ++i) t2[i] = sum_w[i] * fall2;
        Bits(*hit)[2] = hits;
        for (int i1 = 0; i1 <= N; ++i1) {
            const F x1 = qx0 - sum_x[i1], t1 = t0 + sum_w[i1] * fall1;
            for (int i2 = i1; i2 <= N; ++i2, ++hit)
                (*hit)[role] = static_cast<Bits>(square_exceeds(x1 - sum_x[i2], t1, t2[i2]) & wanted);
        }
    }

    F scale{};
    I low{}, high{}, is_down{}, pending = ~odd;
    F below_low{}, from_low{}, below_high{}, from_high{};  // values on both sides of the two cuts
    const F least = splat(-FLT_MAX), most = splat(FLT_MAX);
    for (const float room : {0x1p-16f, 0x1p-17f, 0x1p-18f}) {
        const F limit = n / d * (1.0f - room), sure = limit * (1.0f - 0x1p-20f);
        const uint32_t wanted = bits_set(pending);
        F best = splat(-FLT_MAX);
        I found{}, between{};
        for (int chunk = 0; chunk < PADDED; chunk += 16) {
            for (uint32_t some = pairs_set(hits[chunk]); some; some &= some - 1) {
                const int c = chunk + __builtin_ctz(some);
                const uint32_t better = hits[c][0], other = hits[c][1];
                for (int shift = 0; shift < 2; ++shift) {
                    const uint32_t flip = shift ? ~turned : turned;  // lanes in which this shift is not the better one
                    const uint32_t lanes = ((better & ~flip) | (other & flip)) & wanted;
                    if (!lanes) continue;
                    const int i1 = SPLITS<N>.i1[c], i2 = SPLITS<N>.i2[c];
                    const F sumqx = shift ? sum_of_levels<false>(DOWN, sum_x[i1], sum_x[i2], all_x)
                                          : sum_of_levels<false>(UP, sum_x[i1], sum_x[i2], all_x);
                    const F sumq2 = shift ? sum_of_levels<true>(DOWN, sum_w[i1], sum_w[i2], all_w)
                                          : sum_of_levels<true>(UP, sum_w[i1], sum_w[i2], all_w);
                    const F square = sumqx * sumqx;
                    const I open = mask_of_bits(lanes) & I(sumq2 > 0.0f);
                    const I above = open & I(square > limit * sumq2);
                    between |= open & ~above & I(square > sure * sumq2);
                    const I take = above & I(square > best * sumq2);
                    const F ratio = sumqx / sumq2;
                    scale = select(take, ratio, scale);
                    best = select(take, ratio * sumqx, best);
                    low = select(take, g.sorted[i1], low);
                    high = select(take, g.sorted[i2], high);
                    is_down = select(take, splat(-shift), is_down);
                    below_low = select(take, i1 > 0 ? g.sorted_x[i1 - 1] : least, below_low);
                    from_low = select(take, i1 < N ? g.sorted_x[i1] : most, from_low);
                    below_high = select(take, i2 > 0 ? g.sorted_x[i2 - 1] : least, below_high);
                    from_high = select(take, i2 < N ? g.sorted_x[i2] : most, from_high);
                    found |= take;
                }
            }
        }
        pending &= ~found | between;
        if (!any(pending)) break;
    }
    odd |= pending;
    out.scale = scale;
    out.low = low;
    out.high = high;
    out.down[0] = is_down;
    out.none = I{};
    const F middle = select(is_down, splat(-DELTA), splat(DELTA));
    const F cut_low = scale * (middle - 0.5f), cut_high = scale * (middle + 0.5f), room = scale * 0x1p-18f;
    out.nearest[0] = ~odd & I(scale > 0.0f) & I(below_low <= cut_low - room) & I(from_low >= cut_low + room) &
                  I(below_high <= cut_high - room) & I(from_high >= cut_high + room);
    if (any(odd))
        for (int lane = 0; lane < LANES; ++lane)
            if (odd[lane]) scan_lane(g, sum_x, sum_w, lane, out);
}

}  // namespace

}  // namespace quantkit::QK_ISA
