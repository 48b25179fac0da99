// IQ1_S and IQ1_M: 256 values a block.
//
//   IQ1_S  50 bytes  half d; 32 bytes: low 8 bits of the grid index of 8 values; 8 words of 16 bits, one for 32
//                    values: 4x3 high bits of the indices, 3 bits of scale, 1 bit: levels shifted down
//   IQ1_M  56 bytes  32 bytes as above; 16 bytes, one for 16 values: twice 3 high bits of an index and 1 bit: levels
//                    shifted down; 4 words of 16 bits: 4x3 bits of scale, 4 bits of the half d
//
// Reproduces quantize_row_iq1_s_impl, quantize_row_iq1_m_impl and iq1_find_best_neighbour2. A lane is a block, whose
// groups of 32 (16) values are done in order. Only finding the best split of a sorted group and the best neighbour
// differs from ggml's way: see iq1_split.h, iq1_split_halves.h and iq1_neighbours.h.
#include <stdexcept>

#include "blocks.h"
#include "iq1_grid.h"
#include "iq1_neighbours.h"
#include "iq1_split_halves.h"
#include "tables.h"

namespace quantkit::QK_ISA {

namespace {

// A tile of LANES blocks: values with one block a lane, and the rows and weights of each block.
struct Tile {
    F x[QK_K];
    const float* const* rows;
    float weight[LANES][QK_K];
};

template <bool WEIGHTS>
QK_INLINE void load(Tile& tile, const float* const* xs, const float* const* ws) {
    tile.rows = xs;
    load_lanes<QK_K>(xs, tile.x);
    F squares{};
    for (int k = 0; k < QK_K; ++k) squares += tile.x[k] * tile.x[k];
    const F sigma2 = 2.0f * squares / 256.0f;
    for (int lane = 0; lane < LANES; ++lane)
        for (int k = 0; k < QK_K; k += LANES) {
            F v, q;
            std::memcpy(&v, xs[lane] + k, sizeof v);
            if constexpr (WEIGHTS) {
                std::memcpy(&q, ws[lane] + k, sizeof q);
                q = q * sqrt_of(sigma2[lane] + v * v);
            } else {
                q = v * v;
            }
            std::memcpy(tile.weight[lane] + k, &q, sizeof q);
        }
}

// The result for a group of N values.
template <int N, int SHIFTS>
struct Coded {
    F scale;  // 0 if nothing was found; then all levels are 0, the first entry of the grid
    I down[SHIFTS];
    I pattern[N / 8], index[N / 8];
};

// Quantizes group ib of a tile, except for rounding the scale.
template <int N, int SHIFTS>
QK_INLINE void code_group(const Iq1Grid& grid, const Tile& tile, int ib, float least, Group<N>& g,
                          Coded<N, SHIFTS>& out) {
    constexpr int K = N / 8;
    const float* rows[LANES];
    for (int lane = 0; lane < LANES; ++lane) rows[lane] = tile.weight[lane] + N * ib;
    load_lanes<N>(rows, g.w);
    F largest{};
    for (int j = 0; j < N; ++j) {
        g.x[j] = tile.x[N * ib + j];
        largest = max_of(largest, abs_of(g.x[j]));
    }
    sort(g);
    Split<SHIFTS> split;
    if constexpr (SHIFTS == 1)
        search_split(g, split);
    else
        search_split_halves(g, split);
    const I dead = split.none | I(largest < least);
    const I negative = I(split.scale < 0.0f);  // then the levels are reversed
    F scale = select(negative, -split.scale, split.scale);
    uint32_t lowered[SHIFTS], nearest[SHIFTS];
    for (int h = 0; h < SHIFTS; ++h) {
        out.down[h] = (split.down[h] ^ negative) & ~dead;
        lowered[h] = bits_set(out.down[h]);
        nearest[h] = bits_set(split.nearest[h]);
    }
    for (int k = 0; k < K; ++k) {
        I p{};
        for (int j = 0; j < 8; ++j) {
            const I key = g.key[8 * k + j];
            p -= (I(key >= split.low) + I(key >= split.high)) << (2 * j);
        }
        out.pattern[k] = select(negative, 0xaaaa - p, p) & ~dead;  // the first entry of the grid
    }

    // codes are in the order (eight, lane); those off the grid are listed first, so that the searches directly follow
    // one another
    int32_t* patterns = reinterpret_cast<int32_t*>(out.pattern);
    int32_t* indices = reinterpret_cast<int32_t*>(out.index);
    struct Open {
        int code, ternary;
    } open[K * LANES];
    int n_open = 0;
    for (int code = 0; code < K * LANES; ++code) {
        const int ternary = grid.ternary(static_cast<uint32_t>(patterns[code]));
        const int index = grid.index[ternary];
        indices[code] = index;
        open[n_open] = {code, ternary};
        n_open += index < 0;
    }
    uint32_t off_grid = 0;
    for (int i = 0; i < n_open; ++i) {
        const int code = open[i].code, lane = code % LANES, k = code / LANES, h = SHIFTS == 1 ? 0 : k;
        const int at = N * ib + 8 * k;
        const Iq1Grid::List list = (nearest[h] >> lane & 1 ? grid.near : grid.all)[open[i].ternary];
        const uint32_t found =
            best_neighbour(grid.neighbours + list.begin, static_cast<int>(list.n), tile.rows[lane] + at,
                           tile.weight[lane] + at, scale[lane], lowered[h] >> lane & 1 ? DOWN : UP);
        patterns[code] = static_cast<int32_t>(found);
        indices[code] = grid.index[grid.ternary(found)];
        off_grid |= 1u << lane;
    }

    // compute the scale again where a neighbour was taken
    F sumqx{}, sumq2{};
    for (int k = 0; k < K; ++k) {
        const F first = select(out.down[SHIFTS == 1 ? 0 : k], splat(DOWN[0]), splat(UP[0]));
        for (int j = 0; j < 8; ++j) {
            const F q = to_float((out.pattern[k] >> (2 * j)) & 3) + first;
            const F wq = g.w[8 * k + j] * q;
            sumqx += wq * g.x[8 * k + j];
            sumq2 += wq * q;
        }
    }
    const I again = mask_of_bits(off_grid) & I(sumqx > 0.0f) & I(sumq2 > 0.0f);
    scale = select(again, sumqx / sumq2, scale);
    out.scale = select(dead, F{}, scale);
}

// The three bits of a scale: selects the odd multiple of d nearest to `scale`.
QK_INLINE I scale_bits(F id, F scale) { return max_of(I{}, min_of(splat(7), nearest_int(0.5f * (id * scale - 1.0f)))); }

void tile_iq1_s(const Iq1Grid& grid, const float* const* xs, const float* const* ws, uint8_t* const* y) {
    constexpr int GROUPS = 8;
    alignas(64) Tile tile;
    load<true>(tile, xs, ws);
    alignas(64) Group<32> g;
    F scales[GROUPS], max_scale{};
    I down[GROUPS], low[GROUPS], high[GROUPS];
    for (int ib = 0; ib < GROUPS; ++ib) {
        Coded<32, 1> c;
        code_group(grid, tile, ib, 1e-12f, g, c);
        scales[ib] = c.scale;
        down[ib] = c.down[0];
        low[ib] = (c.index[0] & 255) | (c.index[1] & 255) << 8 | (c.index[2] & 255) << 16 | c.index[3] << 24;
        high[ib] = c.index[0] >> 8 | (c.index[1] >> 8) << 3 | (c.index[2] >> 8) << 6 | (c.index[3] >> 8) << 9;
        max_scale = max_of(max_scale, c.scale);
    }
    const I some = I(max_scale != 0.0f);
    const F d = max_scale / 15.0f, id = 1.0f / d;
    for (int ib = 0; ib < GROUPS; ++ib) high[ib] |= some & ((scale_bits(id, scales[ib]) | (down[ib] & 8)) << 12);
    store_word(some & to_half(d * 1.125f), y, 0, 2);
    store_lanes<8>(low, y, 2);
    for (int i = 0; i < 4; ++i) store_word(high[2 * i] | high[2 * i + 1] << 16, y, 34 + 4 * i);
}

template <bool WEIGHTS>
void tile_iq1_m(const Iq1Grid& grid, const float* const* xs, const float* const* ws, uint8_t* const* y) {
    constexpr int GROUPS = 16;
    alignas(64) Tile tile;
    load<WEIGHTS>(tile, xs, ws);
    alignas(64) Group<16> g;
    alignas(64) F weights[QK_K];
    Coded<16, 2> coded[GROUPS];
    F max_scale{};
    for (int ib = 0; ib < GROUPS; ++ib) {
        code_group(grid, tile, ib, 1e-7f, g, coded[ib]);
        for (int j = 0; j < 16; ++j) weights[16 * ib + j] = g.w[j];
        max_scale = max_of(max_scale, coded[ib].scale);
    }
    const I some = I(max_scale != 0.0f);
    F d = max_scale / 15.0f, sumqx{}, sumq2{};
    const F id = 1.0f / d;
    I low[8] = {}, high[4] = {}, sc[4] = {};
    for (int ib = 0; ib < GROUPS; ++ib) {
        const Coded<16, 2>& c = coded[ib];
        const I l = scale_bits(id, c.scale);
        const F factor = to_float(2 * l + 1);
        sc[ib / 4] |= l << (3 * (ib % 4));
        low[ib / 2] |= ((c.index[0] & 255) | (c.index[1] & 255) << 8) << (16 * (ib % 2));
        high[ib / 4] |= (c.index[0] >> 8 | (c.index[1] >> 8) << 4 | (some & ((c.down[0] & 0x08) | (c.down[1] & 0x80))))
                        << (8 * (ib % 4));
        for (int k = 0; k < 2; ++k) {
            const F first = select(c.down[k], splat(DOWN[0]), splat(UP[0]));
            for (int j = 0; j < 8; ++j) {
                const int at = 16 * ib + 8 * k + j;
                const F q = (to_float((c.pattern[k] >> (2 * j)) & 3) + first) * factor;
                const F wq = weights[at] * q;
                sumqx += wq * tile.x[at];
                sumq2 += wq * q;
            }
        }
    }
    d = select(I(sumq2 > 0.0f), sumqx / sumq2, d);
    const I half = to_half(d * 1.1125f);
    for (int i = 0; i < 4; ++i) sc[i] = some & (sc[i] | ((half >> (4 * i)) & 15) << 12);
    store_lanes<8>(low, y, 0);
    for (int i = 0; i < 4; ++i) store_word(high[i], y, 32 + 4 * i);
    for (int i = 0; i < 2; ++i) store_word(sc[2 * i] | sc[2 * i + 1] << 16, y, 48 + 4 * i);
}

}  // namespace

void quantize_iq1_s(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    if (!w) throw std::invalid_argument("quantize: IQ1_S needs the importance of each column");
    const Iq1Grid& grid = iq1_grid();
    for_each_tile<QK_K, 50>(x, y, n_rows, n_cols, w,
                            [&grid](auto xs, auto ws, auto ys) { tile_iq1_s(grid, xs, ws, ys); });
}

void quantize_iq1_m(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    const Iq1Grid& grid = iq1_grid();
    if (w)
        for_each_tile<QK_K, 56>(x, y, n_rows, n_cols, w,
                                [&grid](auto xs, auto ws, auto ys) { tile_iq1_m<true>(grid, xs, ws, ys); });
    else
        for_each_tile<QK_K, 56>(x, y, n_rows, n_cols, w,
                                [&grid](auto xs, auto ws, auto ys) { tile_iq1_m<false>(grid, xs, ws, ys); });
}

}  // namespace quantkit::QK_ISA
