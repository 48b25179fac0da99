// IQ1_M: the same for a group of 16 whose halves have their own shifts.
#pragma once
#include "iq1_split.h"

namespace quantkit::QK_ISA {

namespace {

// One of IQ1_M's four pairs of shifts: for the first and the second eight values.
struct Shifts {
    bool down[2];
};
constexpr Shifts SHIFTS_M[4] = {{{false, false}}, {{false, true}}, {{true, false}}, {{true, true}}};

// Sums below each position of the sorted group, over the first and the second eight values.
struct HalfSums {
    F x[2][17], w[2][17];
};

// sumqx and sumq2 of a split under a pair of shifts, computed as in ggml.
template <typename T>
QK_INLINE void score_halves(const Shifts& shifts, const T (&x1)[2], const T (&x2)[2], const T (&x)[2], const T (&w1)[2],
                            const T (&w2)[2], const T (&w)[2], T* sumqx, T* sumq2) {
    T qx[2], q2[2];
    for (int h = 0; h < 2; ++h) {
        const Levels& l = LEVELS[shifts.down[h]];
        qx[h] = x[h] * l.top - (x1[h] + x2[h]);
        q2[h] = w[h] * l.top * l.top + w1[h] * l.fall1 + w2[h] * l.fall2;
    }
    *sumqx = qx[0] + qx[1];
    *sumq2 = q2[0] + q2[1];
}

// ggml's search unchanged, for one lane.
__attribute__((noinline)) void scan_lane_halves(const Group<16>& g, const HalfSums& sums, int lane, Split<2>& out) {
    constexpr int N = 16;
    float x[N + 1][2], w[N + 1][2];
    for (int j = 0; j <= N; ++j)
        for (int h = 0; h < 2; ++h) x[j][h] = sums.x[h][j][lane], w[j][h] = sums.w[h][j][lane];
    float best_score = -FLT_MAX, scale = 0;
    int best1 = -1, best2 = -1, best_k = 0;
    for (int i1 = 0; i1 <= N; ++i1)
        for (int i2 = i1; i2 <= N; ++i2)
            for (int k = 0; k < 4; ++k) {
                float sumqx, sumq2;
                score_halves(SHIFTS_M[k], x[i1], x[i2], x[N], w[i1], w[i2], w[N], &sumqx, &sumq2);
                if (sumq2 > 0 && sumqx * sumqx > best_score * sumq2) {
                    scale = sumqx / sumq2;
                    best_score = scale * sumqx;
                    best1 = i1, best2 = i2, best_k = k;
                }
            }
    out.none[lane] = best1 < 0 ? -1 : 0;
    if (best1 < 0) return;
    out.scale[lane] = scale;
    out.low[lane] = g.sorted[best1][lane];
    out.high[lane] = g.sorted[best2][lane];
    for (int h = 0; h < 2; ++h) out.down[h][lane] = SHIFTS_M[best_k].down[h] ? -1 : 0;
}

// ggml's exhaustive search over (i1, i2) and four pairs of shifts, done like search_split: `top` is approximately the
// best score of some splits; all that may be better are listed, and compared as in ggml. The sums of the short way and
// ggml's differ by |qx - sumqx| < 14 u M, |qx^2 - sumqx^2| < 35 u M^2, t |q2 - sumq2| < 54 u t W with the 2^-20, less
// than slack = 2^-17 (M^2 + t W).
__attribute__((noinline)) void search_split_halves(const Group<16>& g, Split<2>& out) {
    constexpr int N = 16, COUNT = Splits<N>::COUNT, PADDED = (COUNT + 15) / 16 * 16;
    HalfSums sums;
    for (int h = 0; h < 2; ++h) sums.x[h][0] = sums.w[h][0] = F{};
    for (int j = 0; j < N; ++j) {
        const I second = I((g.sorted[j] & 8) != 0);
        const F w = g.sorted_w[j], wx = w * g.sorted_x[j];
        for (int h = 0; h < 2; ++h) {
            const I here = h ? second : ~second;
            sums.x[h][j + 1] = select(here, sums.x[h][j] + wx, sums.x[h][j]);
            sums.w[h][j + 1] = select(here, sums.w[h][j] + w, sums.w[h][j]);
        }
    }
    F x[N + 1], fall1[4][N + 1], fall2[4][N + 1], qx0[4], q20[4];
    for (int i = 0; i <= N; ++i) {
        x[i] = sums.x[0][i] + sums.x[1][i];
        for (int k = 0; k < 4; ++k) {
            const Levels &a = LEVELS[SHIFTS_M[k].down[0]], &b = LEVELS[SHIFTS_M[k].down[1]];
            fall1[k][i] = sums.w[0][i] * a.fall1 + sums.w[1][i] * b.fall1;
            fall2[k][i] = sums.w[0][i] * a.fall2 + sums.w[1][i] * b.fall2;
        }
    }
    for (int k = 0; k < 4; ++k) {
        const Levels &a = LEVELS[SHIFTS_M[k].down[0]], &b = LEVELS[SHIFTS_M[k].down[1]];
        qx0[k] = sums.x[0][N] * a.top + sums.x[1][N] * b.top;
        q20[k] = sums.w[0][N] * a.square + sums.w[1][N] * b.square;
    }
    const F all_x = x[N], all_w = sums.w[0][N] + sums.w[1][N];

    // the best of equal shifts; from its scale, a good one of unequal shifts in two steps: the best split for the scale
    // (the two cuts are independent), then the best scale for that split
    F n, d, n_down, d_down, sum_abs;
    best_on_path(g, all_x, all_w, DELTA, 0.75f, 1.25f, &n, &d, &sum_abs);
    best_on_path(g, all_x, all_w, -DELTA, 1.25f, 0.75f, &n_down, &d_down, &sum_abs);
    const I downward = I(n_down * d > n * d_down);
    n = select(downward, n_down, n);
    d = select(downward, d_down, d);
    const F start = sqrt_of(n) / d;
    for (int k = 1; k < 3; ++k) {
        F s = start;
        for (int step = 0; step < 2; ++step) {
            F least1{}, least2{}, x1{}, x2{}, w1{}, w2{};
            for (int i = 1; i <= N; ++i) {
                const F twice = x[i] + x[i];
                const F f1 = about_fma(s, fall1[k][i], twice), f2 = about_fma(s, fall2[k][i], twice);
                const I less1 = I(f1 < least1), less2 = I(f2 < least2);
                least1 = select(less1, f1, least1);
                x1 = select(less1, x[i], x1);
                w1 = select(less1, fall1[k][i], w1);
                least2 = select(less2, f2, least2);
                x2 = select(less2, x[i], x2);
                w2 = select(less2, fall2[k][i], w2);
            }
            const F qx = qx0[k] - x1 - x2, q2 = q20[k] + w1 + w2;
            const I more = I(qx * qx * d > n * q2);
            n = select(more, qx * qx, n);
            d = select(more, q2, d);
            s = qx / q2;
        }
    }
    const F t = n / d * (1.0f - 0x1p-16f), scope = sum_abs * sum_abs + t * all_w, slack = scope * 0x1p-17f;
    I odd = ~(I(n > 1e-24f) & I(n < 1e30f) & I(d > 1e-20f) & I(d < 1e30f) & I(scope < 1e32f));

    alignas(64) Bits hits[PADDED][4];
    std::memset(hits[COUNT], 0, sizeof hits[0] * (PADDED - COUNT));
    F t2[4][N + 1];
    for (int k = 0; k < 4; ++k)
        for (int i = 0; i <= N; ++i) t2[k][i] = t * fall2[k][i];
    Bits(*hit)[4] = hits;
    for (int i1 = 0; i1 <= N; ++i1) {
        F x1[4], t1[4];
        for (int k = 0; k < 4; ++k) {
            x1[k] = qx0[k] - x[i1];
            t1[k] = t * (q20[k] + fall1[k][i1]) - slack;
        }
        for (int i2 = i1; i2 <= N; ++i2, ++hit)
            for (int k = 0; k < 4; ++k) {
                const F qx = x1[k] - x[i2];
                (*hit)[k] = square_exceeds(qx, t1[k], t2[k][i2]);
            }
    }

    F scale{};
    I low{}, high{}, down[2] = {}, pending = ~odd;
    for (const float room : {0x1p-16f, 0x1p-17f, 0x1p-18f}) {
        const F limit = n / d * (1.0f - room), sure = limit * (1.0f - 0x1p-20f);
        const uint32_t wanted = bits_set(pending);
        F best = splat(-FLT_MAX);
        I found{}, between{};
        for (int chunk = 0; chunk < PADDED; chunk += 8) {
            for (uint32_t some = pairs_set(hits[chunk]); some; some &= some - 1) {
                const int pair = __builtin_ctz(some), c = chunk + pair / 2;
                for (int k = pair % 2 * 2; k < pair % 2 * 2 + 2; ++k) {
                    const uint32_t lanes = hits[c][k] & wanted;
                    if (!lanes) continue;
                    const int i1 = SPLITS<N>.i1[c], i2 = SPLITS<N>.i2[c];
                    const auto at = [](const F(&s)[2][17], int i, F(&to)[2]) { to[0] = s[0][i], to[1] = s[1][i]; };
                    F xs[3][2], ws[3][2], sumqx, sumq2;
                    at(sums.x, i1, xs[0]), at(sums.x, i2, xs[1]), at(sums.x, N, xs[2]);
                    at(sums.w, i1, ws[0]), at(sums.w, i2, ws[1]), at(sums.w, N, ws[2]);
                    score_halves(SHIFTS_M[k], xs[0], xs[1], xs[2], ws[0], ws[1], ws[2], &sumqx, &sumq2);
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
                    for (int h = 0; h < 2; ++h) down[h] = select(take, splat(SHIFTS_M[k].down[h] ? -1 : 0), down[h]);
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
    out.none = I{};
    for (int h = 0; h < 2; ++h) {
        out.down[h] = down[h];
        const F middle = select(down[h], splat(-DELTA), splat(DELTA));
        const F cut_low = scale * (middle - 0.5f), cut_high = scale * (middle + 0.5f), room = scale * 0x1p-18f;
        I good = ~odd & I(scale > 0.0f);
        for (int j = 8 * h; j < 8 * h + 8; ++j) {
            const F over_low = g.x[j] - cut_low, over_high = g.x[j] - cut_high;
            good &= I(select(I(g.key[j] >= low), over_low, -over_low) >= room) &
                    I(select(I(g.key[j] >= high), over_high, -over_high) >= room);
        }
        out.nearest[h] = good;
    }
    if (any(odd))
        for (int lane = 0; lane < LANES; ++lane)
            if (odd[lane]) scan_lane_halves(g, sums, lane, out);
}

}  // namespace

}  // namespace quantkit::QK_ISA
