// IQ2_XXS, IQ2_XS, IQ2_S: super-blocks of 256 values. Eight values are a point in a grid of 256, 512 or 1024 points
// (levels 1, 3, 5; see grids.h) with eight signs; 32 (IQ2_XXS) or 16 values share a four-bit scale, all a half `d`.
//
//   IQ2_XXS  66 bytes: d, 8 * {4 bytes: points; 4 bytes: four 7-bit signs | scale << 28}
//   IQ2_XS   74 bytes: d, 32 * {2 bytes: point | 7-bit signs << 9}, scales[8] (4 bits each)
//   IQ2_S    82 bytes: d, points[32] (low bytes), signs[32], qh[8] (2 high bits of each point), scales[8]
//
// Of seven signs, the eighth makes the count even; if it is odd, the value with the least weight changes its sign.
// Reproduces quantize_row_iq2_xxs_impl, quantize_row_iq2_xs_impl and quantize_row_iq2_s_impl of
// ggml/src/ggml-quants.c, bit for bit, LANES super-blocks at once. The first two need an importance.
#include <stdexcept>

#include "grid_search.h"
#include "tables.h"

namespace quantkit::QK_ISA {

namespace {

constexpr float GROUP_MAX_EPS = 1e-15f;
constexpr float GROUP_MAX_EPS_IQ2_S = 1e-8f;

struct Iq2Xxs {
    static constexpr int DIM = 8, GROUP = 32, FIRST = -6, LAST = 6;
    static constexpr float STEP = 0.1f;
    static constexpr Redo REDO = Redo::ALL;
    static constexpr bool START_ON_GRID = true;
};

struct Iq2Xs {  // and IQ2_S
    static constexpr int DIM = 8, GROUP = 16, FIRST = -9, LAST = 9;
    static constexpr float STEP = 0.1f;
    static constexpr Redo REDO = Redo::OFF_GRID;
    static constexpr bool START_ON_GRID = true;
};

// make_qp_quants for N values, levels 0..NMAX kept as uint8. Returns only the scale, for GROUPS groups of N side by
// side, since the refinement is one long chain. `mx`: their largest, at least 0.
template <int N, int NMAX, int GROUPS>
QK_INLINE void search_positive_scale(const F* x, const F* w, F* out) {
    F mx[GROUPS], iscale[GROUPS], best[GROUPS], sumlx[GROUPS], suml2[GROUPS];
    I zero[GROUPS], running[GROUPS];
    for (int g = 0; g < GROUPS; ++g) {
        const F* xg = x + g * N;
        const F* wg = w + g * N;
        F m{};
        for (int i = 0; i < N; ++i) m = max_of(m, xg[i]);
        mx[g] = m;
        zero[g] = I(m < GROUP_MAX_EPS);
        iscale[g] = static_cast<float>(NMAX) / m;
        const F scale = 1.0f / iscale[g];
        F err{};
        for (int i = 0; i < N; ++i) {
            const F l = to_float(nearest_int(iscale[g] * xg[i]) & 0xff);
            const F diff = xg[i] - scale * l;
            err += wg[i] * diff * diff;
        }
        best[g] = err;
    }
    for (int is = -4; is <= 4; ++is) {
        if (is == 0) continue;
        for (int g = 0; g < GROUPS; ++g) {
            const F* xg = x + g * N;
            const F* wg = w + g * N;
            const F iscale_is = (0.1f * static_cast<float>(is) + static_cast<float>(NMAX)) / mx[g];
            const F scale_is = 1.0f / iscale_is;
            F err{};
            for (int i = 0; i < N; ++i) {
                const F l = to_float(min_of(splat(NMAX), nearest_int(iscale_is * xg[i])));
                const F diff = xg[i] - scale_is * l;
                err += wg[i] * diff * diff;
            }
            const I better = I(err < best[g]);
            best[g] = select(better, err, best[g]);
            iscale[g] = select(better, iscale_is, iscale[g]);
        }
    }
    I level[GROUPS][N];
    I any_running{};
    for (int g = 0; g < GROUPS; ++g) {
        sumlx[g] = suml2[g] = F{};
        for (int i = 0; i < N; ++i) {
            const I kept = min_of(splat(NMAX), nearest_int(iscale[g] * x[g * N + i]));
            level[g][i] = kept & 0xff;
            const F l = to_float(kept), wi = w[g * N + i];
            sumlx[g] += wi * x[g * N + i] * l;
            suml2[g] += wi * l * l;
        }
        running[g] = ~zero[g];
        any_running |= running[g];
    }
    for (int pass = 0; pass < 5 && any(any_running); ++pass) {
        I changed[GROUPS];
        for (int g = 0; g < GROUPS; ++g) changed[g] = I{};
        for (int i = 0; i < N; ++i)
            for (int g = 0; g < GROUPS; ++g) {
                const F xi = x[g * N + i], wi = w[g * N + i], wx = wi * xi, l = to_float(level[g][i]);
                F slx = sumlx[g] - wx * l;
                F sl2 = suml2[g] - wi * l * l;
                const I candidate = running[g] & I(slx > 0.0f) & I(sl2 > 0.0f);
                const I next = min_of(splat(NMAX), nearest_int(xi * sl2 / slx));
                const F nl = to_float(next);
                slx += wx * nl;
                sl2 += wi * nl * nl;
                const I take = candidate & I(next != level[g][i]) & I(slx * slx * suml2[g] > sumlx[g] * sumlx[g] * sl2);
                level[g][i] = select(take, next & 0xff, level[g][i]);
                sumlx[g] = select(take, slx, sumlx[g]);
                suml2[g] = select(take, sl2, suml2[g]);
                changed[g] |= take;
            }
        any_running = I{};
        for (int g = 0; g < GROUPS; ++g) {
            running[g] &= changed[g];
            any_running |= running[g];
        }
    }
    for (int g = 0; g < GROUPS; ++g) out[g] = select(zero[g] | ~I(suml2[g] > 0.0f), F{}, sumlx[g] / suml2[g]);
}

// Turns importance into weights: w * sqrt(sigma2 + x*x).
QK_INLINE void weigh(const F* x, F* w, F sigma2) {
    for (int i = 0; i < QK_K; ++i) w[i] = w[i] * sqrt_of(sigma2 + x[i] * x[i]);
}

template <int N>
QK_INLINE F largest(const F* x) {
    F m = x[0];
    for (int i = 1; i < N; ++i) m = max_of(m, x[i]);
    return m;
}

QK_INLINE void clear_blocks(I empty, uint8_t* const* y, size_t bytes) {
    for (uint32_t m = lane_bits(empty); m; m &= m - 1) std::memset(y[__builtin_ctz(m)], 0, bytes);
}

QK_INLINE void tile_iq2_xxs(const Grid& grid, Slab<Iq2Xxs>& slab, const float* const* xs, const float* const* ws,
                            uint8_t* const* y) {
    alignas(64) F x[QK_K], w[QK_K];
    I signs[QK_K / 8];
    load_lanes<QK_K>(xs, x);
    load_lanes<QK_K>(ws, w);
    weigh(x, w, sum_of_squares(x) / 256.0f);
    take_signs<true>(x, w, signs);
    F scales[SLABS];
    for (int s = 0; s < SLABS; s += 4) search_positive_scale<SLAB, 4, 4>(x + s * SLAB, w + s * SLAB, scales + s);
    I packed[SLABS];
    for (int s = 0; s < SLABS; ++s) {
        std::memcpy(slab.x, x + s * SLAB, sizeof slab.x);
        std::memcpy(slab.w, w + s * SLAB, sizeof slab.w);
        F fit = scales[s] * 3.0f;
        const I alive = ~I(largest<SLAB>(slab.x) < GROUP_MAX_EPS) & ~I(fit <= 0.0f);
        F top{};
        for (int i = 0; i < SLAB; ++i) top = max_of(abs_of(slab.x[i]), top);
        fit = select(alive, fit, 1.0f + top);
        F found = scales[s];
        I point[4];
        slab.search(grid, &fit, &alive, &found, point);
        const I flip = I(found < 0.0f);
        I bits{};
        for (int k = 0; k < 4; ++k) bits |= ((signs[4 * s + k] ^ (flip & 127)) & alive) << (7 * k);
        packed[s] = bits;
        scales[s] = select(alive, abs_of(found), F{});
        for (int lane = 0; lane < LANES; ++lane)
            for (int k = 0; k < 4; ++k)
                y[lane][2 + 8 * s + k] = static_cast<uint8_t>(grid.index[point[k][lane] & 0xffff]);
    }
    I levels[SLABS], empty;
    store_word(block_scale<SLABS>(scales, 1.0f, levels, &empty), y, 0, 2);
    for (int s = 0; s < SLABS; ++s) store_word(packed[s] | (levels[s] << 28), y, 6 + 8 * s);
    clear_blocks(empty, y, 66);
}

template <bool WEIGHTS, bool PARITY>
QK_INLINE void tile_iq2_xs(const Grid& grid, Slab<Iq2Xs>& slab, const float* const* xs, const float* const* ws,
                           uint8_t* const* y) {
    alignas(64) F x[QK_K], w[QK_K];
    I signs[QK_K / 8];
    load_lanes<QK_K>(xs, x);
    const F sumx2 = sum_of_squares(x);
    const F sigma2 = PARITY ? sumx2 / 256.0f : 2.0f * sumx2 / 256.0f;
    if constexpr (WEIGHTS) {
        load_lanes<QK_K>(ws, w);
        weigh(x, w, sigma2);
    } else {
        for (int i = 0; i < QK_K; ++i) w[i] = 0.25f * sigma2 + x[i] * x[i];
    }
    take_signs<PARITY>(x, w, signs);
    F scales[2 * SLABS];
    I high[SLABS] = {};
    for (int s = 0; s < SLABS; ++s) {
        std::memcpy(slab.x, x + s * SLAB, sizeof slab.x);
        std::memcpy(slab.w, w + s * SLAB, sizeof slab.w);
        F fit[2], found[2];
        I alive[2], point[4];
        for (int g = 0; g < 2; ++g) {
            const F top = largest<16>(slab.x + 16 * g);
            alive[g] = ~I(top < (PARITY ? GROUP_MAX_EPS : GROUP_MAX_EPS_IQ2_S));
            fit[g] = select(alive[g], top, splat(1.0f));
            found[g] = top / 5.0f;
        }
        slab.search(grid, fit, alive, found, point);
        for (int g = 0; g < 2; ++g) {
            const I flip = I(found[g] < 0.0f);
            scales[2 * s + g] = select(alive[g], abs_of(found[g]), F{});
            for (int k = 2 * g; k < 2 * g + 2; ++k) {
                const I sign = (signs[4 * s + k] ^ (flip & (PARITY ? 127 : 255))) & alive[g];
                I index;
                for (int lane = 0; lane < LANES; ++lane) index[lane] = grid.index[point[k][lane] & 0xffff];
                const int at = 4 * s + k;
                if constexpr (PARITY) {
                    store_word(index | (sign << 9), y, 2 + 2 * at, 2);
                } else {
                    store_word(index, y, 2 + at, 1);
                    store_word(sign, y, 34 + at, 1);
                    high[s] |= (index >> 8) << (2 * k);
                }
            }
        }
    }
    I levels[2 * SLABS], empty;
    store_word(block_scale<2 * SLABS>(scales, PARITY ? 1.0f : 0.9875f, levels, &empty), y, 0, 2);
    for (int s = 0; s < SLABS; ++s) store_word(levels[2 * s] | (levels[2 * s + 1] << 4), y, (PARITY ? 66 : 74) + s, 1);
    if constexpr (PARITY)
        clear_blocks(empty, y, 74);
    else
        for (int s = 0; s < SLABS; ++s) store_word(high[s], y, 66 + s, 1);
}

}  // namespace

void quantize_iq2_xxs(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    if (!w) throw std::invalid_argument("quantize: IQ2_XXS needs an importance");
    const Grid& g = grid(GridType::IQ2_XXS);
    Slab<Iq2Xxs>& slab = own_slab<Iq2Xxs>();
    for_each_tile<QK_K, 66>(x, y, n_rows, n_cols, w, [&](auto xs, auto ws, auto ys) QK_LAMBDA {
        tile_iq2_xxs(g, slab, xs, ws, ys);
    });
}

void quantize_iq2_xs(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    if (!w) throw std::invalid_argument("quantize: IQ2_XS needs an importance");
    const Grid& g = grid(GridType::IQ2_XS);
    Slab<Iq2Xs>& slab = own_slab<Iq2Xs>();
    for_each_tile<QK_K, 74>(x, y, n_rows, n_cols, w, [&](auto xs, auto ws, auto ys) QK_LAMBDA {
        tile_iq2_xs<true, true>(g, slab, xs, ws, ys);
    });
}

void quantize_iq2_s(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    const Grid& g = grid(GridType::IQ2_S);
    Slab<Iq2Xs>& slab = own_slab<Iq2Xs>();
    if (w)
        for_each_tile<QK_K, 82>(x, y, n_rows, n_cols, w, [&](auto xs, auto ws, auto ys) QK_LAMBDA {
            tile_iq2_xs<true, false>(g, slab, xs, ws, ys);
        });
    else
        for_each_tile<QK_K, 82>(x, y, n_rows, n_cols, w, [&](auto xs, auto ws, auto ys) QK_LAMBDA {
            tile_iq2_xs<false, false>(g, slab, xs, ws, ys);
        });
}

}  // namespace quantkit::QK_ISA
