// What IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S share: LANES super-blocks of 256 values at once, a slab of 32 values
// at a time. Weights, signs, rounded levels, sums and scales are computed in lanes; the neighbour searches between
// them, one for each group of DIM values and each scale tried, are collected and done one after another.
//
// ggml tries STEPS scales for each group. Most of its neighbour searches need not be done:
//
// 1. Steps whose rounded levels (the cell) are the same have the same neighbours. The cost of neighbour g at scale s
//    is c_g(s) = sum w*(s*q - x)^2, and c_g/s^2 is linear in 1/s plus a term that all neighbours share. If at the
//    first and the last step of a run of equal cells the same g wins, and by more than the rounding error of all
//    floats involved, it wins at all scales between. The error: with T(s) = sum w*(q_max*s + |x|)^2 each float cost
//    is within E = 14 * 2^-24 * T(s) of the exact one (4 roundings in each term, counted against (q_max*s + |x|)^2,
//    and DIM - 1 in the sum). A lead D > 2E(s') at the ends s' of a run leaves f = (c_h - c_g)/s^2 at least
//    (D - 2E(s'))/s'^2 there and between; the float costs at s keep their order if s^2*f > 2E(s). Since
//    T(s)/s^2 <= (r/s')^2 * T(s'), where r is the ratio of the largest scale to the smallest,
//    D >= 2E(s') + 2r^2*E(s') suffices. r^2 <= 2.25 for all types: D = 4 * 2.25 * 14 * 2^-24 * T < 8e-6 * T, and T
//    of the largest scale serves for all. Underflow adds at most 2^-149 * (q_max*s + |x|) a term, far below what is
//    added for it.
// 2. A neighbour that is in every coordinate either equal to another or more levels away from the cell's never wins
//    (grids.cpp leaves it out): |s*q - x| is greater where they differ, float rounding is monotone, and of equals the
//    nearer comes first in ggml's order. This holds for values that round to the cell clearly. Where one is within
//    1e-4 of being rounded otherwise, or where rounding may wrap, ggml's full list is searched.
#pragma once
#include "blocks.h"
#include "grid_ends.h"
#include "grids.h"
#include "lanes.h"

namespace quantkit::QK_ISA {

constexpr int QK_K = 256;
constexpr int SLAB = 32;
constexpr int SLABS = QK_K / SLAB;

// The larger (smaller), b if they are equal or one is NaN; the larger of a and |b|.
#if defined(__AVX512F__)
QK_INLINE __m512 reg(F x) { return reinterpret_cast<__m512>(x); }
QK_INLINE F fast_max(F a, F b) { return reinterpret_cast<F>(_mm512_max_ps(reg(a), reg(b))); }
QK_INLINE F fast_min(F a, F b) { return reinterpret_cast<F>(_mm512_min_ps(reg(a), reg(b))); }
QK_INLINE F max_size(F a, F b) { return reinterpret_cast<F>(_mm512_range_ps(reg(a), reg(b), 0x0b)); }
QK_INLINE uint32_t lane_bits(I m) { return _mm512_movepi32_mask(reinterpret_cast<__m512i>(m)); }
#elif defined(__AVX2__)
QK_INLINE __m256 reg(F x) { return reinterpret_cast<__m256>(x); }
QK_INLINE F fast_max(F a, F b) { return reinterpret_cast<F>(_mm256_max_ps(reg(a), reg(b))); }
QK_INLINE F fast_min(F a, F b) { return reinterpret_cast<F>(_mm256_min_ps(reg(a), reg(b))); }
QK_INLINE F max_size(F a, F b) { return fast_max(a, abs_of(b)); }
QK_INLINE uint32_t lane_bits(I m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(m)));
}
// For each set of lanes: their numbers, a byte each, side by side.
struct Compress {
    uint64_t lanes[256];
    constexpr Compress() : lanes() {
        for (unsigned m = 0; m < 256; ++m) {
            int n = 0;
            for (unsigned lane = 0; lane < 8; ++lane)
                if ((m >> lane) & 1) lanes[m] |= static_cast<uint64_t>(lane) << (8 * n++);
        }
    }
};
inline constexpr Compress COMPRESS;
#else
QK_INLINE F fast_max(F a, F b) { return max_of(a, b); }
QK_INLINE F fast_min(F a, F b) { return min_of(a, b); }
QK_INLINE F max_size(F a, F b) { return fast_max(a, abs_of(b)); }
QK_INLINE uint32_t lane_bits(I m) {
    uint32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits |= (static_cast<uint32_t>(m[i]) & 1u) << i;
    return bits;
}
#endif

// q = 2*level + 1 of field i of a word.
template <int DIM>
QK_INLINE F level_value(I word, int i) {
#if defined(__AVX512F__)
    if constexpr (DIM == 8)
        return reinterpret_cast<F>(_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_setr_ps(1, 3, 5, 5)),
                                                        reinterpret_cast<__m512i>(word >> (2 * i))));
    else
        return reinterpret_cast<F>(
            _mm512_permutexvar_ps(reinterpret_cast<__m512i>(word >> (4 * i)),
                                  _mm512_setr_ps(1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15)));
#elif defined(__AVX2__)
    if constexpr (DIM == 8)
        return reinterpret_cast<F>(
            _mm256_permutevar_ps(_mm256_setr_ps(1, 3, 5, 5, 1, 3, 5, 5), reinterpret_cast<__m256i>(word >> (2 * i))));
    else
        return reinterpret_cast<F>(_mm256_permutevar8x32_ps(_mm256_setr_ps(1, 3, 5, 7, 9, 11, 13, 15),
                                                            reinterpret_cast<__m256i>(word >> (4 * i))));
#else
    constexpr int FIELD = DIM == 8 ? 2 : 4;
    return to_float((((word >> (FIELD * i)) & ((1 << FIELD) - 1)) << 1) + 1);
#endif
}

// A word in the search's results: the grid point, whether it was the rounded levels themselves, or as the step before.
constexpr int32_t ON_GRID = 1 << 16;
constexpr int32_t AS_BEFORE = -1;

// What a group is searched again for at the scale found: every point, every point if one was off the grid, or the
// points that were off the grid.
enum class Redo { ALL, ALL_IF_OFF_GRID, OFF_GRID };

// 32 values of one type T. T has: DIM (levels of a grid point), GROUP (values to a scale), FIRST, LAST and STEP (the
// scales tried), REDO, and START_ON_GRID (whether a group counts as on the grid before any step is accepted).
template <typename T>
struct Slab {
    static constexpr int DIM = T::DIM, K = SLAB / DIM, G = SLAB / T::GROUP, STEPS = T::LAST - T::FIRST + 1;
    static constexpr int LEVELS = DIM == 8 ? 3 : 8;
    static constexpr int TOP = 2 * LEVELS - 1;  // the greatest q
    static constexpr int CELLS = DIM == 8 ? 6561 : 4096;
    static constexpr int FINAL = STEPS;         // the step of the scale found
    static constexpr int W = Ends<DIM>::W;
    static constexpr int UNROLLED = W == 4 ? 6 : 4;  // lists of up to so many vectors have a queue of their own
    static constexpr int QUEUE = 512;                // a queue is worked off when it might overflow
    static constexpr int MOST = LANES * (STEPS + 1);  // pushed between two looks at it

    // One search: steps a..b of a group of a lane have the same cell. Packed, since there are many.
    struct Item {
        uint64_t what;   // list: 32 bits, its length: 16, a: 8, b: 8
        uint64_t where;  // offsets, 16 bits each: in `rows`, `scale` and `inverse`, `word` and `margin`

        QK_INLINE size_t list() const { return what & 0xffffffff; }
        QK_INLINE int n() const { return static_cast<int>((what >> 32) & 0xffff); }
        QK_INLINE size_t a() const { return (what >> 48) & 0xff; }
        QK_INLINE size_t b() const { return what >> 56; }
        QK_INLINE Item inner() const { return {what + (uint64_t{1} << 48) - (uint64_t{1} << 56), where}; }
    };
    // Steps a and b of an item are won by different points: where they cross is to be found.
    struct Probe {
        uint32_t item;
        uint16_t point_a, point_b;
        float behind_a, behind_b;
    };

    const Grid* grid;
    const uint16_t* words;  // of the grid
    F x[SLAB], w[SLAB], root[SLAB];  // values without sign, weights, their square roots
    F scale[STEPS + 1][G], inverse[STEPS + 1][G];
    F margin[K];
    I word[STEPS + 1][K];
    alignas(64) float rows[LANES][2][SLAB];  // x and root
    // runs of equal cells of one k: where in grid->cells; lane | first step << 8 | last step << 16
    alignas(64) uint32_t run_cell[LANES * (STEPS + 1) + LANES], run_at[LANES * (STEPS + 1) + LANES];
    Item queue[UNROLLED + 2][2 * (QUEUE + MOST)];  // by the number of vectors of the list; 0 takes what needs no search
    Probe probes[QUEUE + MOST];
    uint32_t again[QUEUE + MOST];
    size_t count[UNROLLED + 2];

    static constexpr int group_of(int k) { return k / (K / G); }

    static QK_INLINE int32_t lane_of(const I& v, int lane) { return reinterpret_cast<const int32_t*>(&v)[lane]; }

    // Appends the lanes of `m` to a list of n runs of equal cells.
    static QK_INLINE size_t append(uint32_t* cells, uint32_t* ats, size_t n, uint32_t m, I cell, I at) {
#if defined(__AVX512F__)
        const __mmask16 mask = static_cast<__mmask16>(m);
        _mm512_storeu_si512(cells + n, _mm512_maskz_compress_epi32(mask, reinterpret_cast<__m512i>(cell)));
        _mm512_storeu_si512(ats + n, _mm512_maskz_compress_epi32(mask, reinterpret_cast<__m512i>(at)));
        return n + static_cast<size_t>(__builtin_popcount(m));
#elif defined(__AVX2__)
        const __m256i from = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(COMPRESS.lanes[m])));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(cells + n),
                            _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(cell), from));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(ats + n),
                            _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(at), from));
        return n + static_cast<size_t>(__builtin_popcount(m));
#else
        for (; m; m &= m - 1, ++n) {
            const int lane = __builtin_ctz(m);
            cells[n] = static_cast<uint32_t>(lane_of(cell, lane));
            ats[n] = static_cast<uint32_t>(lane_of(at, lane));
        }
        return n;
#endif
    }

    // The cells of n runs: those on the grid are done, the others go to the queues.
    QK_INLINE void take_runs(int k, size_t n) {
        const uint64_t where = (static_cast<uint64_t>(k) * DIM) | (static_cast<uint64_t>(group_of(k)) * LANES << 16) |
                               (static_cast<uint64_t>(k) * LANES << 32);
        constexpr uint64_t PER_LANE = 2 * SLAB | (1 << 16) | (uint64_t{1} << 32);
        int32_t* const to = reinterpret_cast<int32_t*>(word) + k * LANES;
        for (size_t r = 0; r < n; ++r) {
            const uint32_t cell = run_cell[r], at = run_at[r], lane = at & 0xff;
            const Cell c = grid->cells[cell];
            to[((at >> 8) & 0xff) * K * LANES + lane] = c.word() | ON_GRID;
            const size_t n_vectors = (static_cast<size_t>(c.n()) + W - 1) / W;
            const size_t q = n_vectors <= UNROLLED ? n_vectors : UNROLLED + 1;
            queue[q][count[q]] = {c.list_and_n() | (static_cast<uint64_t>(at >> 8) << 48), where + lane * PER_LANE};
            count[q] += q != 0;
        }
    }

    // The search at steps a and b of an item's group.
    template <int N_VECTORS>
    QK_INLINE Found search_at(const Item& it, size_t a, size_t b) const {
        const float* const scales = reinterpret_cast<const float*>(scale) + ((it.where >> 16) & 0xffff);
        const float* const row = rows[0][0] + (it.where & 0xffff);
        const Ends<DIM> ends(row, row + SLAB, scales[a * G * LANES], scales[b * G * LANES]);
        const float m = reinterpret_cast<const float*>(margin)[it.where >> 32];
        if constexpr (N_VECTORS > UNROLLED)
            return nearest_of_many<DIM>(ends, words + it.list(), it.n(), m);
        else
            return nearest<DIM, N_VECTORS>(ends, words + it.list(), it.n(), m);
    }

    // The winner of two neighbouring steps, where the lines c_g/s^2 of the winners at a and b are expected to cross.
    // Whether all steps between are known then.
    template <int N_VECTORS>
    QK_INLINE bool probe(const Item& it, const Probe& p) {
        const float* const inverses = reinterpret_cast<const float*>(inverse) + ((it.where >> 16) & 0xffff);
        const size_t a = it.a(), b = it.b();
        const float id_a = inverses[a * G * LANES], id_b = inverses[b * G * LANES];
        const float line_a = p.behind_a * id_a * id_a, line_b = p.behind_b * id_b * id_b;
        float part = line_a / (line_a + line_b);
        part = part > 0.0f ? part : 0.0f;  // NaN too
        part = part < 1.0f ? part : 1.0f;
        size_t m = a + static_cast<size_t>(static_cast<int>(part * static_cast<float>(static_cast<int>(b - a))));
        m = m < b ? m : b - 1;
        const Found f = search_at<N_VECTORS>(it, m, m + 1);
        int32_t* const to = reinterpret_cast<int32_t*>(word) + (it.where >> 32);
        const int as_a = static_cast<int>(f.clear) & static_cast<int>(f.a == p.point_a);
        const int as_b = static_cast<int>(f.clear) & static_cast<int>(f.b == p.point_b);
        to[(m + 1) * K * LANES] = f.b;
        to[m * K * LANES] = f.a | -(as_a & static_cast<int>(m > a));
        return ((as_a | static_cast<int>(m - a <= 1)) & (as_b | static_cast<int>(b - m <= 2))) != 0;
    }

    template <int N_VECTORS>
    __attribute__((noinline)) void work_off() {
        Item* const items = queue[N_VECTORS];
        size_t n = count[N_VECTORS];
        while (n) {
            size_t n_again = 0, n_probes = 0;
            for (size_t i = 0; i < n; ++i) {
                const Item it = items[i];
                const size_t a = it.a(), b = it.b();
                const Found f = search_at<N_VECTORS>(it, a, b);
                int32_t* const to = reinterpret_cast<int32_t*>(word) + (it.where >> 32);
                const int same = static_cast<int>(f.clear) & static_cast<int>(f.a == f.b);
                to[b * K * LANES] = f.b | -same;  // AS_BEFORE
                to[a * K * LANES] = f.a;
                const int inner = static_cast<int>(b - a >= 2);
                // no branch: whether the ends differ is not predictable
                probes[n_probes] = {static_cast<uint32_t>(i), f.a, f.b, f.behind_a, f.behind_b};
                n_probes += static_cast<size_t>(inner & static_cast<int>(f.clear) & (same ^ 1));
                if (__builtin_expect(!f.clear, 0)) {  // rare
                    again[n_again] = static_cast<uint32_t>(i);
                    n_again += static_cast<size_t>(inner);
                }
            }
            for (size_t i = 0; i < n_probes; ++i) {
                const Probe p = probes[i];
                again[n_again] = p.item;
                n_again += !probe<N_VECTORS>(items[p.item], p);
            }
            // too close to call, or not as expected: the steps between anew. Items are taken in any order, so those
            // that go on are copied aside first.
            for (size_t i = 0; i < n_again; ++i) items[n + i] = items[again[i]].inner();
            std::memmove(static_cast<void*>(items), items + n, n_again * sizeof(Item));
            n = n_again;
        }
        count[N_VECTORS] = 0;
    }

    template <int N_VECTORS = 1>
    QK_INLINE void work_off_all(size_t above) {
        if (count[N_VECTORS] > above) work_off<N_VECTORS>();
        if constexpr (N_VECTORS <= UNROLLED) work_off_all<N_VECTORS + 1>(above);
    }

    // The cells of group k at one inverse scale, and whether each is risky (see 2 above).
    template <bool SAFE>
    QK_INLINE I cell_of(int k, F id, I* risky) const {
        constexpr float MAGIC = 25165824.0f;  // adding it rounds to even numbers, the half of ggml's rounding
        if constexpr (SAFE) {
            F cell{}, off{};
            float digit = 0.5f;
            for (int i = 0; i < DIM; ++i, digit *= LEVELS) {
                F z = id * x[k * DIM + i] - 1.0f;
                z = fast_min(fast_max(z, F{}), splat(static_cast<float>(TOP - 1)));
                const F l = (z + MAGIC) - MAGIC;
                cell += l * digit;
                off = max_size(off, z - l);
            }
            *risky = I(off > 0.9998f);
            return __builtin_convertvector(cell, I);
        } else {
            I cell{};
            int digit = 1;
            for (int i = 0; i < DIM; ++i, digit *= LEVELS) {
                const I l = nearest_int(0.5f * (id * x[k * DIM + i] - 1.0f));
                cell += max_of(I{}, min_of(splat(LEVELS - 1), l)) * digit;
            }
            *risky = splat(-1);
            return cell;
        }
    }

    template <bool SAFE>
    QK_INLINE void all_steps(const I* alive) {
        I lane_numbers;
        for (int lane = 0; lane < LANES; ++lane) lane_numbers[lane] = lane;
        for (int k = 0; k < K; ++k) {
            const int g = group_of(k);
            const uint32_t live = lane_bits(alive[g]);
            I risky, run_risky;
            I run = cell_of<SAFE>(k, inverse[0][g], &run_risky), at = lane_numbers;
            word[0][k] = splat(ON_GRID);  // for lanes that are not alive
            size_t n = 0;
            for (int is = 1; is < STEPS; ++is) {
                const I cell = cell_of<SAFE>(k, inverse[is][g], &risky);
                const I changed = I(cell != run);
                word[is][k] = splat(AS_BEFORE);
                n = append(run_cell, run_at, n, lane_bits(changed) & live, run + (run_risky & CELLS),
                           at | ((is - 1) << 16));
                at = select(changed, lane_numbers | (is << 8), at);
                run_risky = (run_risky & ~changed) | risky;
                run = cell;
            }
            n = append(run_cell, run_at, n, live, run + (run_risky & CELLS), at | ((STEPS - 1) << 16));
            take_runs(k, n);
            work_off_all(QUEUE);
        }
        work_off_all(0);
    }

    // sumqx and sumq2 of all groups with the grid points `at`, for N steps at once.
    template <int N>
    QK_INLINE void sums(const I (*at)[K], const F* wx, F (*qx)[G], F (*q2)[G]) const {
        for (int n = 0; n < N; ++n)
            for (int g = 0; g < G; ++g) qx[n][g] = q2[n][g] = F{};
        for (int j = 0; j < K / G; ++j)
#pragma GCC unroll 8
            for (int i = 0; i < DIM; ++i)
#pragma GCC unroll 2
                for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
                    for (int n = 0; n < N; ++n) {
                        const int k = g * (K / G) + j;
                        const F q = level_value<DIM>(at[n][k], i);
                        qx[n][g] += wx[k * DIM + i] * q;
                        q2[n][g] += w[k * DIM + i] * q * q;
                    }
    }

    // Fits each group: the steps' inverse scales are (TOP + i*STEP) / fit. `x` and `w` are set; `found` holds the
    // scale to start from and becomes the scale found (negative possible), `point` the grid points. Lanes of groups
    // that are not alive keep `found` and get the lowest point; their `fit` must leave fit's steps finite.
    QK_INLINE void search(const Grid& type_grid, const F* fit, const I* alive, F* found, I* point) {
        grid = &type_grid;
        words = type_grid.words;
        uint8_t* rows_x[LANES];
        uint8_t* rows_root[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            rows_x[lane] = reinterpret_cast<uint8_t*>(rows[lane][0]);
            rows_root[lane] = reinterpret_cast<uint8_t*>(rows[lane][1]);
        }
        F wx[SLAB], top[G];
        for (int g = 0; g < G; ++g) {
            top[g] = F{};
            for (int i = g * T::GROUP; i < (g + 1) * T::GROUP; ++i) {
                root[i] = sqrt_of(w[i]);
                wx[i] = w[i] * x[i];
                top[g] = fast_max(top[g], abs_of(x[i]));
            }
        }
        store_lanes<SLAB>(reinterpret_cast<const I*>(x), rows_x, 0);
        store_lanes<SLAB>(reinterpret_cast<const I*>(root), rows_root, 0);
        for (int is = 0; is < STEPS; ++is)
            for (int g = 0; g < G; ++g) {
                const float most = static_cast<float>(TOP) + static_cast<float>(T::FIRST + is) * T::STEP;
                inverse[is][g] = most / fit[g];
                scale[is][g] = 1.0f / inverse[is][g];
            }
        for (int k = 0; k < K; ++k) {
            const F widest = scale[0][group_of(k)] * static_cast<float>(TOP);
            F t{}, sum{};
            for (int i = k * DIM; i < (k + 1) * DIM; ++i) {
                const F span = widest + abs_of(x[i]);
                sum += span;
                t += root[i] * span * span;
            }
            margin[k] = 8e-6f * t + 1e-36f * (1.0f + sum);
        }
        I unsafe[G], any_unsafe{};
        for (int g = 0; g < G; ++g) {
            unsafe[g] = ~I(top[g] * inverse[STEPS - 1][g] < 1e6f);
            any_unsafe |= unsafe[g];
        }
        for (size_t& c : count) c = 0;
        if (any(any_unsafe))
            all_steps<false>(alive);
        else
            all_steps<true>(alive);

        // the best step
        F best[G];
        I current[2][K];
        for (int g = 0; g < G; ++g) best[g] = F{};
        for (int k = 0; k < K; ++k) point[k] = current[1][k] = splat(T::START_ON_GRID ? ON_GRID : 0);
        for (int is = 0; is < STEPS; is += 2) {
            const int n = is + 1 < STEPS ? 2 : 1;
            for (int k = 0; k < K; ++k) {
                current[0][k] = select(I(word[is][k] == AS_BEFORE), current[1][k], word[is][k]);
                if (n == 2) current[1][k] = select(I(word[is + 1][k] == AS_BEFORE), current[0][k], word[is + 1][k]);
            }
            F qx[2][G], q2[2][G];
            if (n == 2)
                sums<2>(current, wx, qx, q2);
            else
                sums<1>(current, wx, qx, q2);
            for (int m = 0; m < n; ++m)
                for (int g = 0; g < G; ++g) {
                    const I better = alive[g] & I(q2[m][g] > 0.0f) & I(qx[m][g] * qx[m][g] > best[g] * q2[m][g]);
                    found[g] = select(better, qx[m][g] / q2[m][g], found[g]);
                    best[g] = select(better, found[g] * qx[m][g], best[g]);
                    for (int k = g * (K / G); k < (g + 1) * (K / G); ++k)
                        point[k] = select(better, current[m][k], point[k]);
                }
        }

        // once more at the scale found
        I redo[G], need[K], open[K], any_open{};
        for (int g = 0; g < G; ++g) {
            redo[g] = I{};
            for (int k = g * (K / G); k < (g + 1) * (K / G); ++k) {
                need[k] = T::REDO == Redo::ALL ? splat(-1) : I((point[k] & ON_GRID) == 0);
                redo[g] |= need[k];
            }
            redo[g] &= alive[g] & I(found[g] > 0.0f);
            inverse[FINAL][g] = 1.0f / found[g];
            scale[FINAL][g] = found[g];
            unsafe[g] = ~I(top[g] * inverse[FINAL][g] < 1e6f) | unsafe[g];
            for (int k = g * (K / G); k < (g + 1) * (K / G); ++k) {
                need[k] = T::REDO == Redo::OFF_GRID ? need[k] & redo[g] : redo[g];
                open[k] = need[k];
                word[FINAL][k] = point[k];
            }
        }
        // between two steps of the same cell and winner nothing changes (see 1 above)
        for (int k = 0; k < K; ++k) {
            const int g = group_of(k);
            I now = word[0][k];
            for (int is = 1; is < STEPS; ++is) {
                const I same = I(word[is][k] == AS_BEFORE);
                const I here = same & ~unsafe[g] & I(scale[is][g] <= found[g]) & I(found[g] <= scale[is - 1][g]) &
                               I(inverse[is - 1][g] <= inverse[FINAL][g]) & I(inverse[FINAL][g] <= inverse[is][g]);
                word[FINAL][k] = select(here & open[k], now, word[FINAL][k]);
                open[k] &= ~here;
                now = select(same, now, word[is][k]);
            }
            any_open |= open[k];
        }
        if (any(any_open))
            for (int k = 0; k < K; ++k) {
                const uint32_t m = lane_bits(open[k]);
                if (!m) continue;
                const int g = group_of(k);
                I risky;
                const I cell = any(unsafe[g] & alive[g]) ? cell_of<false>(k, inverse[FINAL][g], &risky)
                                              : cell_of<true>(k, inverse[FINAL][g], &risky);
                I lane_numbers;
                for (int lane = 0; lane < LANES; ++lane) lane_numbers[lane] = lane;
                take_runs(k, append(run_cell, run_at, 0, m, cell + (risky & CELLS),
                                    lane_numbers | (FINAL << 8) | (FINAL << 16)));
                work_off_all(QUEUE);
            }
        work_off_all(0);
        I last[1][K];
        for (int k = 0; k < K; ++k) last[0][k] = point[k] = select(need[k], word[FINAL][k], point[k]);
        F qx[1][G], q2[1][G];
        sums<1>(last, wx, qx, q2);
        for (int g = 0; g < G; ++g) found[g] = select(redo[g] & I(q2[0][g] > 0.0f), qx[0][g] / q2[0][g], found[g]);
    }
};

// A tile's values in place: x without sign, w the weights; `signs` a byte for each eight values.
template <bool PARITY>
QK_INLINE void take_signs(F* x, const F* w, I* signs) {
    for (int b = 0; b < QK_K / 8; ++b) {
        F* const xb = x + 8 * b;
        I s{}, odd{};
        F least{};
        I at{};
        for (int i = 0; i < 8; ++i) {
            const I negative = ~I(xb[i] >= 0.0f);
            if constexpr (PARITY) {
                const F ax = w[8 * b + i] * xb[i] * xb[i];
                const I less = i ? I(ax < least) : splat(-1);
                least = select(less, ax, least);
                at = select(less, splat(1 << i), at);
                odd ^= negative;
            }
            xb[i] = select(negative, -xb[i], xb[i]);
            s |= negative & (1 << i);
        }
        if constexpr (PARITY) {
            at &= odd;
            for (int i = 0; i < 8; ++i) xb[i] = select(I((at & (1 << i)) != 0), -xb[i], xb[i]);
            s = (s ^ at) & 127;
        }
        signs[b] = s;
    }
}

QK_INLINE F sum_of_squares(const F* x) {
    F sum{};
    for (int k = 0; k < QK_K; ++k) sum += x[k] * x[k];
    return sum;
}

// The block's scale and the groups' four bits: d * fudge as half (0 where all scales are), level = clamp(scale / d).
template <int N>
QK_INLINE I block_scale(const F* scales, float fudge, I* levels, I* empty) {
    F top{};
    for (int i = 0; i < N; ++i) top = max_of(top, scales[i]);
    *empty = I(top == 0.0f);
    const F d = top / 31.0f;
    const F id = 1.0f / d;
    for (int i = 0; i < N; ++i) {
        const I l = max_of(I{}, min_of(splat(15), nearest_int(0.5f * (id * scales[i] - 1.0f))));
        levels[i] = select(*empty, I{}, l);
    }
    return select(*empty, I{}, to_half(d * fudge));
}

}  // namespace quantkit::QK_ISA
