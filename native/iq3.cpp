// IQ3_XXS, IQ3_S: super-blocks of 256 values. Four values are a point in a grid of 256 or 512 points (levels 1, 3, ...
// 15; see grids.h), with signs; 32 values share a four-bit scale, all share a half `d`.
//
//   IQ3_XXS  98 bytes: d, points[64], 8 * {4 bytes: four 7-bit signs | scale << 28}
//   IQ3_S   110 bytes: d, points[64] (low bytes), qh[8] (the high bit of each), signs[32], scales[4] (4 bits each)
//
// Of seven signs, the eighth makes the count even; if it is odd, the value with the least weight changes its sign.
// Reproduces quantize_row_iq3_xxs_impl (for a grid of 256) and quantize_row_iq3_s_impl of ggml/src/ggml-quants.c,
// with and without importance, bit for bit, LANES super-blocks at once.
#include "grid_search.h"
#include "tables.h"

namespace quantkit::QK_ISA {

namespace {

constexpr float GROUP_MAX_EPS_IQ3_XXS = 1e-8f;

struct Iq3Xxs {
    static constexpr int DIM = 4, GROUP = 32, FIRST = -15, LAST = 15;
    static constexpr float STEP = 0.2f;
    static constexpr Redo REDO = Redo::OFF_GRID;
    static constexpr bool START_ON_GRID = true, PARITY = true;
    static constexpr int BYTES = 98;
    static constexpr float FUDGE = 1.0125f;
};

struct Iq3S {
    static constexpr int DIM = 4, GROUP = 32, FIRST = -9, LAST = 9;
    static constexpr float STEP = 0.2f;
    static constexpr Redo REDO = Redo::ALL_IF_OFF_GRID;
    static constexpr bool START_ON_GRID = false, PARITY = false;
    static constexpr int BYTES = 110;
    static constexpr float FUDGE = 1.033f;
};

template <typename T, bool WEIGHTS>
QK_INLINE void tile_iq3(const Grid& grid, Slab<T>& slab, const float* const* xs, const float* const* ws,
                        uint8_t* const* y) {
    alignas(64) F x[QK_K], w[QK_K];
    I signs[QK_K / 8];
    load_lanes<QK_K>(xs, x);
    if constexpr (WEIGHTS) {
        load_lanes<QK_K>(ws, w);
        const F sigma2 = 2.0f * sum_of_squares(x) / 256.0f;
        for (int i = 0; i < QK_K; ++i) w[i] = w[i] * sqrt_of(sigma2 + x[i] * x[i]);
    } else {
        for (int i = 0; i < QK_K; ++i) w[i] = x[i] * x[i];
    }
    take_signs<T::PARITY>(x, w, signs);
    F scales[SLABS];
    I packed[SLABS];
    // IQ3_S: ggml does not advance past the points and signs of a slab of zeros; those of the next slab go there, and
    // the rest of the block stays zero
    int slot[LANES] = {};
    if constexpr (!T::PARITY)
        for (int lane = 0; lane < LANES; ++lane) std::memset(y[lane], 0, T::BYTES);
    for (int s = 0; s < SLABS; ++s) {
        std::memcpy(slab.x, x + s * SLAB, sizeof slab.x);
        std::memcpy(slab.w, w + s * SLAB, sizeof slab.w);
        F top = slab.x[0];
        for (int i = 1; i < SLAB; ++i) top = max_of(top, slab.x[i]);
        const I alive = T::PARITY ? ~I(top < GROUP_MAX_EPS_IQ3_XXS) : I(top != 0.0f);
        const F fit = select(alive, top, splat(1.0f));
        F found = top / 15.0f;
        I point[8];
        slab.search(grid, &fit, &alive, &found, point);
        const I flip = I(found < 0.0f);
        scales[s] = select(alive, abs_of(found), F{});
        I sign{};
        for (int k = 0; k < 4; ++k)
            sign |= ((signs[4 * s + k] ^ (flip & (T::PARITY ? 127 : 255))) & alive) << ((T::PARITY ? 7 : 8) * k);
        packed[s] = sign;
        I high{};
        for (int k = 0; k < 8; ++k) {
            I index;
            for (int lane = 0; lane < LANES; ++lane) index[lane] = grid.index[point[k][lane] & 0xffff];
            for (int lane = 0; lane < LANES; ++lane)
                y[lane][2 + 8 * slot[lane] + k] = static_cast<uint8_t>(index[lane]);
            high |= (index >> 8) << k;
        }
        if constexpr (!T::PARITY) store_word(high, y, 66 + s, 1);
        for (int lane = 0; lane < LANES; ++lane) {
            const int32_t bits = sign[lane];
            if constexpr (!T::PARITY) std::memcpy(y[lane] + 74 + 4 * slot[lane], &bits, 4);
            slot[lane] += T::PARITY || alive[lane];
        }
    }
    I levels[SLABS], empty;
    store_word(block_scale<SLABS>(scales, T::FUDGE, levels, &empty), y, 0, 2);
    if constexpr (T::PARITY) {
        for (int s = 0; s < SLABS; ++s) store_word(packed[s] | (levels[s] << 28), y, 66 + 4 * s);
        for (uint32_t m = lane_bits(empty); m; m &= m - 1) std::memset(y[__builtin_ctz(m)], 0, T::BYTES);
    } else {
        for (int s = 0; s < SLABS; s += 2) store_word(levels[s] | (levels[s + 1] << 4), y, 106 + s / 2, 1);
    }
}

template <typename T>
QK_INLINE void quantize_iq3(const Grid& g, const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    Slab<T>& slab = own_slab<T>();
    const auto with = [&](auto xs, auto ws, auto ys) QK_LAMBDA {
        tile_iq3<T, true>(g, slab, xs, ws, ys);
    };
    const auto without = [&](auto xs, auto ws, auto ys) QK_LAMBDA {
        tile_iq3<T, false>(g, slab, xs, ws, ys);
    };
    if (w)
        for_each_tile<QK_K, T::BYTES>(x, y, n_rows, n_cols, w, with);
    else
        for_each_tile<QK_K, T::BYTES>(x, y, n_rows, n_cols, w, without);
}

}  // namespace

void quantize_iq3_xxs(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    quantize_iq3<Iq3Xxs>(grid(GridType::IQ3_XXS), x, y, n_rows, n_cols, w);
}

void quantize_iq3_s(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    quantize_iq3<Iq3S>(grid(GridType::IQ3_S), x, y, n_rows, n_cols, w);
}

}  // namespace quantkit::QK_ISA
