// The neighbour searches of a slab: collected by the length of their lists, then done a batch at a time.
//
// Lanes find runs of steps with equal rounded levels (see grid_search.h). Each run off the grid becomes an item here,
// and is searched at its first and last step together (grid_ends.h). If different points win at the two ends, the step
// between at which the winner changes is found by probing where their costs cross.
#pragma once
#include "grid_ends.h"
#include "grid_lanes.h"
#include "grids.h"

namespace quantkit::QK_ISA {

// A word of the results: a grid point, plus ON_GRID if it is the rounded levels themselves; or AS_BEFORE: as in the
// step before.
constexpr int32_t ON_GRID = 1 << 16;
constexpr int32_t AS_BEFORE = -1;

// What to search for 32 values of one type T (see Slab), and the results.
template <typename T>
struct Searches {
    static constexpr int DIM = T::DIM, K = SLAB / DIM, G = SLAB / T::GROUP, STEPS = T::LAST - T::FIRST + 1;
    static constexpr int LEVELS = DIM == 8 ? 3 : 8;
    static constexpr int TOP = 2 * LEVELS - 1;  // the largest q
    static constexpr int CELLS = DIM == 8 ? 6561 : 4096;
    static constexpr int FINAL = STEPS;         // stands for the scale found
    static constexpr int W = Ends<DIM>::W;
    static constexpr int UNROLLED = W == 4 ? 6 : 4;  // lists of up to this many vectors have a queue per length
    static constexpr int QUEUE = 512;                // a queue is processed when it might overflow
    static constexpr int MOST = LANES * (STEPS + 1);  // most items pushed between two checks for that

    // One search: steps a..b of a group in a lane have the same cell. Packed, since there are many.
    struct Item {
        uint64_t what;   // list: 32 bits, its length: 16, a: 8, b: 8
        uint64_t where;  // offsets, 16 bits each: in `rows`, `scale` and `inverse`, `word` and `margin`

        QK_INLINE size_t list() const { return what & 0xffffffff; }
        QK_INLINE int n() const { return static_cast<int>((what >> 32) & 0xffff); }
        QK_INLINE size_t a() const { return (what >> 48) & 0xff; }
        QK_INLINE size_t b() const { return what >> 56; }
        QK_INLINE Item part(size_t a, size_t b) const { return {(what & 0xffffffffffff) | a << 48 | b << 56, where}; }
        QK_INLINE Item inner() const { return {what + (uint64_t{1} << 48) - (uint64_t{1} << 56), where}; }
    };
    // Different points win at steps a and b of an item, and the crossing must be found.
    struct Probe {
        uint32_t item;
        uint16_t point_a, point_b;
        float behind_a, behind_b;
    };

    const Grid* grid;
    const uint16_t* words;  // the grid's
    F x[SLAB], w[SLAB], root[SLAB];  // values without sign, weights, their square roots
    F scale[STEPS + 1][G], inverse[STEPS + 1][G];
    F margin[K];
    I word[STEPS + 1][K];
    alignas(64) float rows[LANES][2][SLAB];  // x and root
    // runs of equal cells for one k: position in grid->cells; lane | first step << 8 | last step << 16
    alignas(64) uint32_t run_cell[LANES * (STEPS + 1) + LANES], run_at[LANES * (STEPS + 1) + LANES];
    Item queue[UNROLLED + 2][2 * (QUEUE + MOST)];  // by the list's number of vectors; 0 is for items without a search
    Probe probes[QUEUE + MOST];
    uint32_t again[QUEUE + MOST];
    size_t count[UNROLLED + 2];
    static constexpr size_t BATCH = 16;  // items searched together
    alignas(64) float costs[BATCH][UNROLLED * 2 * W];

    static constexpr int group_of(int k) { return k / (K / G); }

    static QK_INLINE int32_t lane_of(const I& v, int lane) { return reinterpret_cast<const int32_t*>(&v)[lane]; }

    // Appends the lanes in `m` to a list of n runs of equal cells; returns the new n.
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

    // Handles the cells of n runs: those on the grid are done, the others go to the queues.
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

    // The terms of an item's group at its first and last step.
    QK_INLINE Ends<DIM> ends_of(const Item& it) const {
        const float* const scales = reinterpret_cast<const float*>(scale) + ((it.where >> 16) & 0xffff);
        const float* const row = rows[0][0] + (it.where & 0xffff);
        return Ends<DIM>(row, row + SLAB, scales[it.a() * G * LANES], scales[it.b() * G * LANES]);
    }
    QK_INLINE float margin_of(const Item& it) const { return reinterpret_cast<const float*>(margin)[it.where >> 32]; }

    // Searches up to BATCH items at their first and last steps, and calls take(i, found) for each. Costs and winners
    // have separate loops: a search is one long chain of operations, and half of it at a time is faster (presumably
    // since a processor's scheduler holds little more than a whole one).
    template <int N_VECTORS, typename Take>
    QK_INLINE void search_each(const Item* items, size_t n, const Take& take) {
        if constexpr (N_VECTORS > UNROLLED) {
            for (size_t i = 0; i < n; ++i) {
                const Item& it = items[i];
                take(i, nearest_of_many<DIM>(ends_of(it), words + it.list(), it.n(), margin_of(it)));
            }
        } else {
            for (size_t i = 0; i < n; ++i) {
                const Ends<DIM> ends = ends_of(items[i]);
                const uint16_t* const list = words + items[i].list();
                for (int v = 0; v < N_VECTORS; ++v) Ends<DIM>::store(ends.costs(list + v * W), costs[i] + v * 2 * W);
            }
            for (size_t i = 0; i < n; ++i) {
                const Item& it = items[i];
                take(i, nearest<DIM, N_VECTORS>(costs[i], words + it.list(), it.n(), margin_of(it)));
            }
        }
    }

    // Returns the steps m and m + 1 where the lines c_g/s^2 of the winners at a and b should cross, as an item.
    QK_INLINE Item middle(const Item& it, float behind_a, float behind_b) const {
        const float* const inverses = reinterpret_cast<const float*>(inverse) + ((it.where >> 16) & 0xffff);
        const size_t a = it.a(), b = it.b();
        const float id_a = inverses[a * G * LANES], id_b = inverses[b * G * LANES];
        const float line_a = behind_a * id_a * id_a, line_b = behind_b * id_b * id_b;
        float part = line_a / (line_a + line_b);
        part = part > 0.0f ? part : 0.0f;  // also for NaN
        part = part < 1.0f ? part : 1.0f;
        size_t m = a + static_cast<size_t>(static_cast<int>(part * static_cast<float>(static_cast<int>(b - a))));
        m = m < b ? m : b - 1;
        return it.part(m, m + 1);
    }

    // Stores the winners at steps m and m + 1 of an item with different winners at its ends. Returns whether all steps
    // between are then known.
    QK_INLINE bool settle(const Item& it, size_t m, const Probe& p, const Found& f) {
        const size_t a = it.a(), b = it.b();
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
            for (size_t start = 0; start < n; start += BATCH) {
                const size_t m = n - start < BATCH ? n - start : BATCH;
                search_each<N_VECTORS>(items + start, m, [&](size_t i, const Found& f) QK_LAMBDA {
                    const Item it = items[start + i];
                    const size_t a = it.a(), b = it.b();
                    int32_t* const to = reinterpret_cast<int32_t*>(word) + (it.where >> 32);
                    const int same = static_cast<int>(f.clear) & static_cast<int>(f.a == f.b);
                    to[b * K * LANES] = f.b | -same;  // AS_BEFORE
                    to[a * K * LANES] = f.a;
                    const int inner = static_cast<int>(b - a >= 2);
                    // no branch: whether the ends differ is unpredictable
                    probes[n_probes] = {static_cast<uint32_t>(start + i), f.a, f.b, f.behind_a, f.behind_b};
                    n_probes += static_cast<size_t>(inner & static_cast<int>(f.clear) & (same ^ 1));
                    if (__builtin_expect(!f.clear, 0)) {  // rare
                        again[n_again] = static_cast<uint32_t>(start + i);
                        n_again += static_cast<size_t>(inner);
                    }
                });
            }
            for (size_t start = 0; start < n_probes; start += BATCH) {
                const size_t m = n_probes - start < BATCH ? n_probes - start : BATCH;
                Item between[BATCH];
                for (size_t i = 0; i < m; ++i) {
                    const Probe& p = probes[start + i];
                    between[i] = middle(items[p.item], p.behind_a, p.behind_b);
                }
                search_each<N_VECTORS>(between, m, [&](size_t i, const Found& f) QK_LAMBDA {
                    const Probe& p = probes[start + i];
                    again[n_again] = p.item;
                    n_again += !settle(items[p.item], between[i].a(), p, f);
                });
            }
            // too close to call, or not as expected: search the steps between. Items are processed in any order, so
            // those that continue are first copied aside.
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
};

}  // namespace quantkit::QK_ISA
