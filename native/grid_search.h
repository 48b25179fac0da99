// What IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S share: LANES super-blocks of 256 values at once, a slab of 32 values
// at a time. Weights, signs, rounded levels, sums and scales are computed in lanes. The neighbour searches in between,
// one for each group of DIM values and each scale tried, are collected and done one after another.
//
// ggml tries STEPS scales for each group. Most of its neighbour searches can be skipped:
//
// 1. Steps with the same rounded levels (the cell) have the same neighbours. The cost of neighbour g at scale s
//    is c_g(s) = sum w*(s*q - x)^2, and c_g/s^2 is linear in 1/s plus a term that all neighbours share. If the same g
//    wins at the first and the last step of a run of equal cells, by more than the rounding error of all
//    floats involved, it wins at all scales between. The error: with T(s) = sum w*(q_max*s + |x|)^2 each float cost
//    is within E = 14 * 2^-24 * T(s) of the exact one (4 roundings in each term, counted against (q_max*s + |x|)^2,
//    and DIM - 1 in the sum). A lead D > 2E(s') at the ends s' of a run leaves f = (c_h - c_g)/s^2 at least
//    (D - 2E(s'))/s'^2 there and between; the float costs at s keep their order if s^2*f > 2E(s). Since
//    T(s)/s^2 <= (r/s')^2 * T(s'), where r is the ratio of the largest scale to the smallest,
//    D >= 2E(s') + 2r^2*E(s') suffices. r^2 <= 2.25 for all types, so D = 4 * 2.25 * 14 * 2^-24 * T < 8e-6 * T, and
//    the T of the largest scale serves for all. Underflow adds at most 2^-149 * (q_max*s + |x|) per term, far less than
//    the code allows for it.
// 2. A neighbour never wins if another one is, in every coordinate, either equal to it or fewer levels away from the
//    cell's level (grids.cpp leaves such neighbours out): where they differ, its |s*q - x| is greater, float rounding
//    is monotone, and among equals the nearer one comes first in ggml's order. This holds for values that clearly round
//    to the cell. If a value is within 1e-4 of rounding otherwise, or rounding may wrap, ggml's full list is searched.
#pragma once
#include <memory>

#include "blocks.h"
#include "grid_queue.h"

namespace quantkit::QK_ISA {

// Which points of a group are searched again at the scale found: every point, every point if one was off the grid, or
// only those off the grid.
enum class Redo { ALL, ALL_IF_OFF_GRID, OFF_GRID };

// 32 values of one type T. T has: DIM (levels in a grid point), GROUP (values per scale), FIRST, LAST and STEP (the
// scales tried), REDO, and START_ON_GRID (whether a group counts as on the grid before any step is accepted).
template <typename T>
struct Slab : Searches<T> {
    typedef Searches<T> S;
    using S::DIM, S::K, S::G, S::STEPS, S::LEVELS, S::TOP, S::CELLS, S::FINAL, S::QUEUE;
    using S::append, S::count, S::grid, S::group_of, S::inverse, S::margin, S::root, S::rows, S::run_at, S::run_cell;
    using S::scale, S::take_runs, S::w, S::word, S::words, S::work_off_all, S::x;

    // The cells of group k at one inverse scale, and whether each is risky (see 2 above).
    template <bool SAFE>
    QK_INLINE I cell_of(int k, F id, I* risky) const {
        constexpr float MAGIC = 25165824.0f;  // adding it rounds to even numbers, instead of ggml's factor 0.5
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

    // Computes sumqx and sumq2 of all groups with the grid points `at`, for N steps at once.
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

    // Fits each group: the steps' inverse scales are (TOP + i*STEP) / fit. `x` and `w` are set. `found` holds the
    // scale to start from and receives the scale found (possibly negative), `point` receives the grid points. Lanes of
    // groups that are not alive keep `found` and get the lowest point; their `fit` must keep fit's steps finite.
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

        // search again at the scale found
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
        // between two steps with the same cell and winner nothing changes (see 1 above)
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

// This thread's slab for a type, created at first use and kept until the thread ends: a few 100 KB, which does not fit
// some threads' stacks.
template <typename T>
Slab<T>& own_slab() {
    static thread_local std::unique_ptr<Slab<T>> slab;
    if (!slab) slab.reset(new Slab<T>);
    return *slab;
}

}  // namespace quantkit::QK_ISA
