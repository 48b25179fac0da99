// The scale searches of ggml's K types, LANES groups at once. Each function names the ggml function whose
// bytes it reproduces (ggml/src/ggml-quants.c); the order of every float operation is that function's.
#pragma once
#include <cfloat>
#include <type_traits>

#include "lanes.h"

namespace quantkit::QK_ISA {

constexpr float GROUP_MAX_EPS = 1e-15f;

// The result of a search. The levels themselves are not kept: they follow from `iscale` and `low`, and are needed
// only in the rare group whose final scale is zero.
struct Affine {
    F scale;
    F minimum;  // ggml's *the_min: minus the group's lowest value
    F iscale;   // for the accepted levels: level = clamp(nearest_int(iscale * (x - low)))
    F low;
    I dead;     // no spread: all levels are 0
};

// The level of x in a group under `a`: what ggml left in L.
template <int NMAX>
QK_INLINE I levels_of(const Affine& a, F x) {
    const I l = max_of(I{}, min_of(splat(NMAX), nearest_int(a.iscale * (x - a.low))));
    return select(a.dead, I{}, l);
}

// make_qkx3_quants and make_qkx2_quants (N values in a group, levels 0..NMAX; weights given), GROUPS groups side by
// side so that their serial sums overlap. The two differ in when a group counts as flat. `use_mad` is theirs.
// Levels are rounded in float where they provably stay in range, and as in ggml where they may not.
template <int N, int NMAX, bool QKX3, bool USE_MAD, int GROUPS>
QK_INLINE void search_affine(const F* x, const F* w, float rmin, float rdelta, int nstep, Affine* out) {
    constexpr float MAGIC = 12582912.0f;
    F lo[GROUPS], hi[GROUPS], sum_w[GROUPS], sum_x[GROUPS];
    F x_lo[GROUPS];
    for (int g = 0; g < GROUPS; ++g) {
        const F* xg = x + g * N;
        const F* wg = w + g * N;
        F mn = xg[0], mx = xg[0], sw = wg[0], sx = wg[0] * xg[0];
        for (int i = 1; i < N; ++i) {
            mn = min_of(xg[i], mn);
            mx = max_of(xg[i], mx);
            sw += wg[i];
            sx += wg[i] * xg[i];
        }
        x_lo[g] = mn;
        lo[g] = select(mn > 0.0f, F{}, mn);
        hi[g] = mx;
        sum_w[g] = sw;
        sum_x[g] = sx;
    }
    F best[GROUPS];
    for (int g = 0; g < GROUPS; ++g) {
        const F* xg = x + g * N;
        const F* wg = w + g * N;
        out[g].dead = QKX3 ? I(hi[g] <= lo[g]) : I(hi[g] == lo[g]);
        out[g].minimum = -lo[g];
        const F iscale = static_cast<float>(NMAX) / (hi[g] - lo[g]);
        const F scale = 1.0f / iscale;
        F err{};
        for (int i = 0; i < N; ++i) {
            const F l = to_float(max_of(I{}, min_of(splat(NMAX), nearest_int(iscale * (xg[i] - lo[g])))));
            F diff = scale * l + lo[g] - xg[i];
            diff = USE_MAD ? abs_of(diff) : diff * diff;
            err += wg[i] * diff;
        }
        best[g] = err;
        out[g].scale = scale;
        out[g].iscale = iscale;
        out[g].low = lo[g];
    }
    for (int is = 0; is <= nstep; ++is) {
        const float numerator = rmin + rdelta * static_cast<float>(is) + static_cast<float>(NMAX);
        F iscale[GROUPS], sum_l[GROUPS], sum_l2[GROUPS], sum_xl[GROUPS];
        F level[GROUPS][N];
        I far{}, negative{};
        for (int g = 0; g < GROUPS; ++g) {
            iscale[g] = numerator / (hi[g] - lo[g]);
            sum_l[g] = sum_l2[g] = sum_xl[g] = F{};
            // iscale * (x - lo) is monotone in x: if both ends are in range, all values are
            const F a = iscale[g] * (x_lo[g] - lo[g]), b = iscale[g] * (hi[g] - lo[g]);
            far |= ~(I(a >= -4194303.0f) & I(b <= 4194303.0f)) & ~out[g].dead;
            negative |= I(a < -0.5f);
        }
        // rounds to levels and adds up; `round` gives the level for iscale * (x - lo)
        const auto sums = [&](auto round) QK_LAMBDA {
            for (int i = 0; i < N; ++i)
                for (int g = 0; g < GROUPS; ++g) {
                    const F xi = x[g * N + i], wi = w[g * N + i];
                    const F l = round(iscale[g] * (xi - lo[g]));
                    level[g][i] = l;
                    const F wl = wi * l;
                    sum_l[g] += wl;
                    sum_l2[g] += wl * l;
                    sum_xl[g] += wl * xi;
                }
        };
        const F nmax = splat(static_cast<float>(NMAX));
        // up to rounding, b is the numerator, where it is in range
        const bool limit_high = numerator > static_cast<float>(NMAX) + 0.49f, limit_low = any(negative);
        if (any(far)) {
            sums([](F v) { return to_float(max_of(I{}, min_of(splat(NMAX), nearest_int(v)))); });
        } else if (limit_low && limit_high) {
            sums([=](F v) { return max_of(F{}, min_of(nmax, (v + MAGIC) - MAGIC)); });
        } else if (limit_low) {
            sums([=](F v) { return max_of(F{}, (v + MAGIC) - MAGIC); });
        } else if (limit_high) {
            sums([=](F v) { return min_of(nmax, (v + MAGIC) - MAGIC); });
        } else {
            sums([=](F v) { return (v + MAGIC) - MAGIC; });
        }
        F this_scale[GROUPS], this_min[GROUPS], err[GROUPS];
        M open[GROUPS];
        for (int g = 0; g < GROUPS; ++g) {
            const F d = sum_w[g] * sum_l2[g] - sum_l[g] * sum_l[g];
            open[g] = less(F{}, d);
            this_scale[g] = (sum_w[g] * sum_xl[g] - sum_x[g] * sum_l[g]) / d;
            this_min[g] = (sum_l2[g] * sum_x[g] - sum_l[g] * sum_xl[g]) / d;
            const M above = less(F{}, this_min[g]);
            if (any(above)) {
                this_min[g] = select(above, F{}, this_min[g]);
                this_scale[g] = select(above, sum_xl[g] / sum_l2[g], this_scale[g]);
            }
            err[g] = F{};
        }
        for (int i = 0; i < N; ++i)
            for (int g = 0; g < GROUPS; ++g) {
                F diff = this_scale[g] * level[g][i] + this_min[g] - x[g * N + i];
                diff = USE_MAD ? abs_of(diff) : diff * diff;
                err[g] += w[g * N + i] * diff;
            }
        for (int g = 0; g < GROUPS; ++g) {
            const M better = open[g] & less(err[g], best[g]);
            best[g] = select(better, err[g], best[g]);
            out[g].scale = select(better, this_scale[g], out[g].scale);
            out[g].iscale = select(better, iscale[g], out[g].iscale);
            out[g].low = select(better, lo[g], out[g].low);
            lo[g] = select(better, this_min[g], lo[g]);
        }
    }
    for (int g = 0; g < GROUPS; ++g) {
        out[g].scale = select(out[g].dead, F{}, out[g].scale);
        out[g].minimum = select(out[g].dead, out[g].minimum, -lo[g]);
    }
}

// make_qp_quants: N values, levels 0..NMAX kept as ggml's uint8 (which wraps), weights w. Returns the scale.
template <int N, int NMAX>
QK_INLINE F search_positive(const F* x, I* level, const F* w) {
    F mx{};
    for (int i = 0; i < N; ++i) mx = max_of(mx, x[i]);
    const I zero = I(mx < GROUP_MAX_EPS);
    F iscale = static_cast<float>(NMAX) / mx;
    F scale = 1.0f / iscale;
    F best{};
    for (int i = 0; i < N; ++i) {
        const F l = to_float(nearest_int(iscale * x[i]) & 0xff);
        const F diff = x[i] - scale * l;
        best += w[i] * diff * diff;
    }
    for (int is = -4; is <= 4; ++is) {
        if (is == 0) continue;
        const F iscale_is = (0.1f * static_cast<float>(is) + static_cast<float>(NMAX)) / mx;
        const F scale_is = 1.0f / iscale_is;
        F err{};
        for (int i = 0; i < N; ++i) {
            const F l = to_float(min_of(splat(NMAX), nearest_int(iscale_is * x[i])));
            const F diff = x[i] - scale_is * l;
            err += w[i] * diff * diff;
        }
        const I better = I(err < best);
        best = select(better, err, best);
        iscale = select(better, iscale_is, iscale);
    }
    F sumlx{}, suml2{};
    for (int i = 0; i < N; ++i) {
        const I kept = min_of(splat(NMAX), nearest_int(iscale * x[i]));
        level[i] = kept & 0xff;
        const F l = to_float(kept);
        sumlx += w[i] * x[i] * l;
        suml2 += w[i] * l * l;
    }
    I running = ~zero;
    for (int pass = 0; pass < 5 && any(running); ++pass) {
        I changed{};
        for (int i = 0; i < N; ++i) {
            const F l = to_float(level[i]);
            F slx = sumlx - w[i] * x[i] * l;
            F sl2 = suml2 - w[i] * l * l;
            const I candidate = running & I(slx > 0.0f) & I(sl2 > 0.0f);
            const I next = min_of(splat(NMAX), nearest_int(x[i] * sl2 / slx));
            const F nl = to_float(next);
            slx += w[i] * x[i] * nl;
            sl2 += w[i] * nl * nl;
            const I take = candidate & I(next != level[i]) & I(slx * slx * suml2 > sumlx * sumlx * sl2);
            level[i] = select(take, next & 0xff, level[i]);
            sumlx = select(take, slx, sumlx);
            suml2 = select(take, sl2, suml2);
            changed |= take;
        }
        running &= changed;
    }
    for (int i = 0; i < N; ++i) level[i] = select(zero, I{}, level[i]);
    return select(zero | ~I(suml2 > 0.0f), F{}, sumlx / suml2);
}

// nearest_int of x clamped to [low, high], as a float. Exact for every x: the range is that of nearest_int's wrap.
QK_INLINE F nearest_clamped(F x, float low, float high) {
    constexpr float MAGIC = 12582912.0f;
    const F u = float_of((bits_of(x + MAGIC) & 0x007fffff) | 0x4b000000);  // nearest_int(x) + MAGIC
    return max_of(splat(low + MAGIC), min_of(splat(high + MAGIC), u)) - MAGIC;
}

// Finds the largest of N values by magnitude (the first of equals), with its sign; and the magnitude.
template <int N>
QK_INLINE void extreme(const F* x, F* mx, F* amax) {
    F m[2] = {}, a[2] = {};  // for the first and the second half
    for (int i = 0; i < N / 2; ++i)
        for (int h = 0; h < 2; ++h) {
            const F xi = x[i + h * (N / 2)], ax = abs_of(xi);
            m[h] = select(less(a[h], ax), xi, m[h]);
            a[h] = max_of(ax, a[h]);
        }
    *mx = select(less(a[0], a[1]), m[1], m[0]);
    *amax = max_of(a[1], a[0]);
}

template <int N>
QK_INLINE bool all_finite(const F* x) {
    F most{};
    I nan{};
    for (int i = 0; i < N; ++i) {
        most = max_of(abs_of(x[i]), most);
        nan |= I(x[i] != x[i]);
    }
    return !any(nan | I(most > FLT_MAX));
}

// The result of search_symmetric: levels follow from `kept`.
struct Symmetric {
    F scale;
    F kept;   // the inverse scale: level = clamp(nearest_int(kept * x), -NMAX, NMAX - 1) + NMAX
    I zero;   // all values are zero: level 0
};

template <int NMAX>
QK_INLINE I levels_of(const Symmetric& s, F x) {
    const I l = max_of(splat(-NMAX), min_of(splat(NMAX - 1), nearest_int(s.kept * x)));
    return select(s.zero, I{}, l + NMAX);
}

// For S inverse scales side by side: sums of w*x*l and w*l*l over N values, where l is iscale * x rounded and, with
// LIMIT, clamped.
template <int N, int NMAX, int S, bool LIMIT>
QK_INLINE void symmetric_sums(const F* x, const F* wx, const F* w, const F* iscale, F* sumlx, F* suml2) {
    constexpr float MAGIC = 12582912.0f;
    F slx[S] = {}, sl2[S] = {};
#pragma GCC unroll 4  // all of them at once do not fit the registers
    for (int i = 0; i < N; ++i)
        for (int s = 0; s < S; ++s) {
            F l;
            if constexpr (LIMIT)
                l = nearest_clamped(iscale[s] * x[i], -NMAX, NMAX - 1);
            else
                l = (iscale[s] * x[i] + MAGIC) - MAGIC;
            slx[s] += wx[i] * l;
            sl2[s] += w[i] * l * l;
        }
    for (int s = 0; s < S; ++s) sumlx[s] = slx[s], suml2[s] = sl2[s];
}

// What ggml divides by the largest value in its step `is`, -9..9.
template <int NMAX>
struct Numerators {
    float of_step[19] = {};
    constexpr Numerators() {
        for (int is = -9; is <= 9; ++is) of_step[9 + is] = -(static_cast<float>(NMAX) + 0.1f * static_cast<float>(is));
    }
};

// make_qx_quants with rmse_type 1 (N values, levels 0..2*NMAX-1 around NMAX); weights w, or x*x if w is null.
//
// FINITE says that all x are finite. Then, with a = |iscale| and y = x with the sign of iscale * x, every product a * y
// is within NMAX + 0.9 (and rounding) of 0, since |x| <= |mx| and |mx| >= 1e-15 (other groups are dropped), and levels
// are rounded in float. They need no clamping if y is clamped once for many steps: a is (NMAX + 0.1 * is) / |mx|,
// and h = c * |mx| makes a * h a number between NMAX - 1.5 and NMAX - 0.5 at each of these steps. So a y up to
// h gives a level up to NMAX - 1, and a y above h gives at least NMAX - 1, as h does. The same holds below, where a
// level under -NMAX needs is > 0.
template <int N, int NMAX, bool WEIGHTS, bool FINITE = true>
QK_INLINE Symmetric search_symmetric(const F* x, const F* weights) {
    constexpr int S = 3;  // steps side by side
    constexpr float MAX = NMAX;
    constexpr float HIGH[2] = {(MAX - 1) / (MAX - 0.45f), (MAX - 1) / (MAX + 0.5f)};  // is <= 0, is > 0
    constexpr float LOW = -MAX / (MAX + 0.5f);
    static_assert((MAX - 0.9f) * HIGH[0] > MAX - 1.45f && MAX * HIGH[0] < MAX - 0.55f, "a level is 0.05 from the next");
    static_assert((MAX + 0.1f) * HIGH[1] > MAX - 1.45f && (MAX + 0.9f) * HIGH[1] < MAX - 0.55f, "with is > 0");
    static_assert((MAX + 0.1f) * LOW < 0.45f - MAX && (MAX + 0.9f) * LOW > -0.45f - MAX, "and the lowest one");
    F mx, amax;
    extreme<N>(x, &mx, &amax);
    Symmetric out;
    out.zero = I(amax < GROUP_MAX_EPS);
    F wx[N], square[WEIGHTS ? 1 : N];
    for (int i = 0; i < N; ++i) {
        if constexpr (!WEIGHTS) square[i] = x[i] * x[i];
        wx[i] = (WEIGHTS ? weights[i] : square[i]) * x[i];
    }
    const F* w = WEIGHTS ? weights : square;
    F y[2][FINITE ? N : 1];  // for the steps up to 0, and for those above
    const I flip = FINITE ? ~bits_of(mx) & INT32_MIN : I{};
    if constexpr (FINITE)
        for (int i = 0; i < N; ++i) {
            const F yi = float_of(bits_of(x[i]) ^ flip);
            y[0][i] = min_of(HIGH[0] * amax, yi);
            y[1][i] = max_of(LOW * amax, min_of(HIGH[1] * amax, yi));
        }
    static constexpr Numerators<NMAX> NUMERATORS;
    F best;
    // ggml starts from the scale of is = 0; the others follow in order
    const auto steps = [&](auto count, int first, int is) QK_LAMBDA {
        constexpr int C = decltype(count)::value;
        F iscale[C], sumlx[C], suml2[C];
        for (int s = 0; s < C; ++s) iscale[s] = NUMERATORS.of_step[9 + is + s] / mx;
        if constexpr (FINITE) {
            F a[C];
            for (int s = 0; s < C; ++s) a[s] = abs_of(iscale[s]);
            symmetric_sums<N, NMAX, C, false>(y[is > 0], wx, w, a, sumlx, suml2);
        } else {
            symmetric_sums<N, NMAX, C, true>(x, wx, w, iscale, sumlx, suml2);
        }
        for (int s = 0; s < C; ++s) {
            const F scale = sumlx[s] / suml2[s];
            if (first) {
                out.kept = iscale[s];
                out.scale = select(I(suml2[s] != 0.0f), scale, F{});
                best = out.scale * sumlx[s];
                continue;
            }
            const M better = less(F{}, suml2[s]) & less(best * suml2[s], sumlx[s] * sumlx[s]);
            out.kept = select(better, iscale[s], out.kept);
            out.scale = select(better, scale, out.scale);
            best = select(better, scale * sumlx[s], best);
        }
    };
    steps(std::integral_constant<int, 1>{}, true, 0);
    constexpr std::integral_constant<int, S> SOME;
    for (int is = -9; is < 0; is += S) steps(SOME, false, is);
    for (int is = 1; is < 10; is += S) steps(SOME, false, is);
    out.scale = select(out.zero, F{}, out.scale);
    return out;
}

// make_q3_quants with do_rmse (N values, levels 0..2*NMAX-1 around NMAX), GROUPS groups side by side. `level`
// receives the levels as floats around 0. Gives the scales, and whether all of a group's values are zero (level 0).
//
// Its refinement asks for every value whether q = x * sl2 / slx, rounded and clamped, is a level other than l, and
// mostly it is not. A value is skipped, in all lanes at once, where (below * slx < p) and (p < above * slx) with
// p = x * sl2, below = l - 0.499, above = l + 0.499 (u + 0.499 if u > l was first clamped to l: any level up to
// u is clamped to l again). Then slx > 0 (below < above), and p / slx lies between below and above but for the rounding
// of the two products and of the quotient, 2^-24 each: so q gives l. (Denormal products could be off by
// more. They do not occur where sumlx > 2^-100: slx is the difference of sumlx and another float, so it is 0 or
// at least half a unit in the last place of sumlx, 2^-125, and an error of 2^-149 is nothing to 0.001 * slx.)
//
// If sumlx <= 0 at first, nothing changes: the terms of its sum all have the sign of iscale (l has that of
// iscale * x), a sum of terms none of which is positive is not above any of them, and so slx = sumlx - term <= 0.
template <int N, int NMAX, int GROUPS>
QK_INLINE void search_q3(const F* x, F* level, F* scale, I* zero) {
    constexpr float MAGIC = 12582912.0f;
    constexpr float LOW = -NMAX, HIGH = NMAX - 1;
    struct Value {
        F w, wx, term, square, below, above;
    } values[GROUPS][N];
    F sumlx[GROUPS] = {}, suml2[GROUPS] = {};
    for (int g = 0; g < GROUPS; ++g) {
        F mx, amax;
        extreme<N>(x + g * N, &mx, &amax);
        zero[g] = I(amax < GROUP_MAX_EPS);
        const F iscale = -static_cast<float>(NMAX) / mx;
        for (int i = 0; i < N; ++i) {
            Value& v = values[g][i];
            const F xi = x[g * N + i];
            // |iscale * x| <= NMAX up to rounding: the lower limit holds by itself
            const F u = (iscale * xi + MAGIC) - MAGIC;
            const F l = min_of(splat(HIGH), u);
            level[g * N + i] = l;
            v.w = xi * xi;
            v.wx = v.w * xi;
            v.term = v.wx * l;
            v.square = v.w * l * l;
            sumlx[g] += v.term;
            suml2[g] += v.square;
            v.below = l - 0.499f;
            v.above = u + 0.499f;
        }
    }
    M running[GROUPS];
    bool certain[GROUPS];
    for (int g = 0; g < GROUPS; ++g) {
        running[g] = less(F{}, sumlx[g]) & ~mask_of(zero[g]);
        certain[g] = !any(M(running[g] & less(sumlx[g], splat(0x1p-100f))));
    }
    for (int pass = 0; pass < 5; ++pass) {
        M changed[GROUPS] = {};
        uint32_t mine[GROUPS], some = 0;
        for (int g = 0; g < GROUPS; ++g) {
            mine[g] = lanes_of(running[g]);
            if (pass > 0 && mine[g] && certain[g]) {
                M all = ~M{};
                for (int i = 0; i < N; ++i) {
                    const Value& v = values[g][i];
                    const F slx = sumlx[g] - v.term, p = x[g * N + i] * (suml2[g] - v.square);
                    all &= less(v.below * slx, p) & less(p, v.above * slx);
                }
                if ((lanes_of(all) & mine[g]) == mine[g]) mine[g] = 0, running[g] = M{};
            }
            some |= mine[g];
        }
        if (!some) break;
        for (int i = 0; i < N; ++i)
            for (int g = 0; g < GROUPS; ++g) {
                Value& v = values[g][i];
                F slx = sumlx[g] - v.term;
                F sl2 = suml2[g] - v.square;
                const F p = x[g * N + i] * sl2;
                const M same = less(v.below * slx, p) & less(p, v.above * slx);
                if ((lanes_of(same) & mine[g]) == mine[g] && (certain[g] || !mine[g])) continue;
                const M candidate = running[g] & less(F{}, slx);
                const F next = nearest_clamped(p / slx, LOW, HIGH);
                slx += v.wx * next;
                sl2 += v.w * next * next;
                const M take = candidate & differ(next, level[g * N + i]) & less(F{}, sl2) &
                               less(sumlx[g] * sumlx[g] * sl2, slx * slx * suml2[g]);
                const F l = select(take, next, level[g * N + i]);
                level[g * N + i] = l;
                v.term = v.wx * l;
                v.square = v.w * l * l;
                v.below = l - 0.499f;
                v.above = select(take, next + 0.499f, v.above);
                sumlx[g] = select(take, slx, sumlx[g]);
                suml2[g] = select(take, sl2, suml2[g]);
                certain[g] = certain[g] && !any(M(running[g] & less(sumlx[g], splat(0x1p-100f))));
                changed[g] |= take;
            }
        for (int g = 0; g < GROUPS; ++g) running[g] &= changed[g];
    }
    for (int g = 0; g < GROUPS; ++g)
        scale[g] = select(zero[g] | ~I(suml2[g] > 0.0f), F{}, sumlx[g] / suml2[g]);
}

}  // namespace quantkit::QK_ISA
