// See iq1_grid.h. Compiled for the lowest processor.
//
// ggml's lists hold, for each point outside the grid, all grid entries sorted by (squared distance, index), up to
// the end of the third distinct distance. Here each list is made by counting: one pass finds the distances, then
// the entries at each of the three smallest follow in index order.
#include "iq1_grid.h"

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "codebooks.h"

namespace quantkit {

namespace {

constexpr int N_WANTED = 3;

// Levels 0, 1, 2 as 00, 01, 11: the xor of two codes has a bit for each step between the levels.
uint32_t steps_code(uint32_t pattern) { return pattern | ((pattern >> 1) & 0x5555); }

uint8_t squared_distance(uint32_t x) {
    const uint32_t two = x & (x >> 1) & 0x5555;
    return static_cast<uint8_t>(__builtin_popcount(x) + 2 * __builtin_popcount(two));
}

Iq1Grid::List add(std::vector<uint16_t>& pool, const std::vector<uint16_t>& list) {
    const Iq1Grid::List out = {static_cast<uint32_t>(pool.size()), static_cast<uint32_t>(list.size())};
    pool.insert(pool.end(), list.begin(), list.end());
    while (pool.size() % Iq1Grid::STEP != 0) pool.push_back(list[0]);
    return out;
}

// A grid and its lists. Each thread reads its own copy (see OwnGrid in grids.cpp for the reason).
class OwnGrid {
public:
    OwnGrid() = default;
    OwnGrid(const OwnGrid& other) : grid(other.grid) { keep(other.grid.neighbours, other.n_); }
    OwnGrid& operator=(const OwnGrid&) = delete;
    ~OwnGrid() { operator delete(own_, ALIGNMENT); }

    // Copies the lists.
    void keep(const uint16_t* neighbours, size_t n) {
        own_ = static_cast<uint16_t*>(operator new(n * sizeof(uint16_t), ALIGNMENT));
        std::copy(neighbours, neighbours + n, own_);
        grid.neighbours = own_;
        n_ = n;
    }

    Iq1Grid grid;

private:
    static constexpr std::align_val_t ALIGNMENT{64};
    uint16_t* own_ = nullptr;
    size_t n_ = 0;
};

const OwnGrid* make() {
    const Codebook& book = codebook("IQ1_S", Iq1Grid::N, 8);
    OwnGrid& made = *new OwnGrid;  // never destroyed: kernels may still run while the process ends
    Iq1Grid& grid = made.grid;
    for (int byte = 0; byte < 256; ++byte) {
        int t = 0, power = 1;
        for (int i = 0; i < 4; ++i, power *= 3) t += power * ((byte >> 2 * i) & 3);
        grid.ternary_of_byte[byte] = static_cast<uint8_t>(t < 81 ? t : 0);  // no level is 3
    }
    std::fill_n(grid.index, Iq1Grid::N_TERNARY, int16_t{-1});
    std::fill_n(grid.near, Iq1Grid::N_TERNARY, Iq1Grid::List{0, 0});
    std::fill_n(grid.all, Iq1Grid::N_TERNARY, Iq1Grid::List{0, 0});
    std::vector<uint16_t> pattern(Iq1Grid::N), code(Iq1Grid::N);
    for (int j = 0; j < Iq1Grid::N; ++j) {
        uint32_t p = 0;
        for (int i = 0; i < 8; ++i) {
            const int level = book.values[8 * j + i] + 1;
            if (level < 0 || level > 2)
                throw std::logic_error("quantize: the codebook IQ1_S has values other than -1, 0, 1");
            p |= static_cast<uint32_t>(level) << 2 * i;
        }
        pattern[j] = static_cast<uint16_t>(p);
        code[j] = static_cast<uint16_t>(steps_code(p));
        grid.index[grid.ternary(p)] = static_cast<int16_t>(j);
    }
    uint8_t distance_of[256];
    for (uint32_t x = 0; x < 256; ++x) distance_of[x] = squared_distance(x);
    std::vector<uint16_t> pool_near, pool_all, all, near, near_steps;
    std::vector<uint8_t> distance(Iq1Grid::N);
    for (int t = 0; t < Iq1Grid::N_TERNARY; ++t) {
        if (grid.index[t] >= 0) continue;
        uint32_t p = 0;
        for (int i = 0, rest = t; i < 8; ++i, rest /= 3) p |= static_cast<uint32_t>(rest % 3) << 2 * i;
        const uint32_t here = steps_code(p);
        bool present[33] = {};
        for (int j = 0; j < Iq1Grid::N; ++j) {
            const uint32_t steps = here ^ code[j];
            distance[j] = static_cast<uint8_t>(distance_of[steps & 255] + distance_of[steps >> 8]);
            present[distance[j]] = true;
        }
        all.clear(), near.clear(), near_steps.clear();
        for (int d = 0, have = 0; d <= 32 && have < N_WANTED; ++d) {
            if (!present[d]) continue;
            ++have;
            for (int j = 0; j < Iq1Grid::N; ++j) {
                if (distance[j] != d) continue;
                all.push_back(pattern[j]);
                const uint32_t steps = here ^ code[j];
                const bool beyond = std::any_of(near_steps.begin(), near_steps.end(),
                                                [steps](uint32_t other) { return (other & ~steps) == 0; });
                if (beyond) continue;
                near.push_back(pattern[j]);
                near_steps.push_back(static_cast<uint16_t>(steps));
            }
        }
        grid.all[t] = add(pool_all, all);
        grid.near[t] = add(pool_near, near);
    }
    for (Iq1Grid::List& list : grid.all) list.begin += static_cast<uint32_t>(pool_near.size());
    pool_near.insert(pool_near.end(), pool_all.begin(), pool_all.end());
    made.keep(pool_near.data(), pool_near.size());
    return &made;
}

}  // namespace

const Iq1Grid& iq1_grid() {
    static const OwnGrid* const first = make();
    static thread_local std::unique_ptr<const OwnGrid> own;
    if (!own) own.reset(new OwnGrid(*first));
    return own->grid;
}

}  // namespace quantkit
