// See iq1_grid.h. Compiled for the lowest processor.
//
// ggml's lists: for each point that is not in the grid, all grid entries sorted by (squared distance, index), up to
// the end of the third different distance. Here each list is made by counting: one pass finds the distances, then
// the entries of each of the three smallest follow in index order.
#include "iq1_grid.h"

#include <new>
#include <stdexcept>
#include <vector>

#include "codebooks.h"

namespace quantkit {

namespace {

constexpr int N_WANTED = 3;

// Levels 0, 1, 2 as 00, 01, 11: the squared distance of two levels is a function of the xor.
uint32_t thermometer(uint32_t pattern) { return pattern | ((pattern >> 1) & 0x5555); }

uint8_t squared_distance(uint32_t a, uint32_t b) {
    const uint32_t x = a ^ b, two = x & (x >> 1) & 0x5555;
    return static_cast<uint8_t>(__builtin_popcount(x) + 2 * __builtin_popcount(two));
}

const Iq1Grid* make() {
    const Codebook& book = codebook("IQ1_S", Iq1Grid::N, 8);
    Iq1Grid& grid = *new Iq1Grid;  // never destroyed: kernels may still run while the process ends
    for (int byte = 0; byte < 256; ++byte) {
        int t = 0, power = 1;
        for (int i = 0; i < 4; ++i, power *= 3) t += power * ((byte >> 2 * i) & 3);
        grid.ternary_of_byte[byte] = static_cast<uint8_t>(t < 81 ? t : 0);  // no level is 3
    }
    for (int t = 0; t < Iq1Grid::N_TERNARY; ++t) {
        grid.index[t] = -1;
        grid.begin[t] = 0;
        grid.n_neighbours[t] = 0;
    }
    std::vector<uint16_t> pattern(Iq1Grid::N), code(Iq1Grid::N);
    for (int j = 0; j < Iq1Grid::N; ++j) {
        uint32_t p = 0;
        for (int i = 0; i < 8; ++i) {
            const int level = book.values[8 * j + i] + 1;
            if (level < 0 || level > 2) throw std::logic_error("quantize: the codebook IQ1_S has values other than -1, 0, 1");
            p |= static_cast<uint32_t>(level) << 2 * i;
        }
        pattern[j] = static_cast<uint16_t>(p);
        code[j] = static_cast<uint16_t>(thermometer(p));
        grid.index[grid.ternary(p)] = static_cast<int16_t>(j);
    }
    uint8_t of_xor[256];
    for (uint32_t x = 0; x < 256; ++x) of_xor[x] = squared_distance(x, 0);
    std::vector<uint16_t> pool;
    pool.reserve(Iq1Grid::N_TERNARY * 64);
    std::vector<uint8_t> distance(Iq1Grid::N);
    for (int t = 0; t < Iq1Grid::N_TERNARY; ++t) {
        if (grid.index[t] >= 0) continue;
        uint32_t p = 0;
        for (int i = 0, rest = t; i < 8; ++i, rest /= 3) p |= static_cast<uint32_t>(rest % 3) << 2 * i;
        const uint32_t here = thermometer(p);
        bool present[33] = {};
        for (int j = 0; j < Iq1Grid::N; ++j) {
            const uint32_t x = here ^ code[j];
            distance[j] = static_cast<uint8_t>(of_xor[x & 255] + of_xor[x >> 8]);
            present[distance[j]] = true;
        }
        grid.begin[t] = static_cast<uint32_t>(pool.size());
        for (int d = 0, have = 0; d <= 32 && have < N_WANTED; ++d) {
            if (!present[d]) continue;
            ++have;
            for (int j = 0; j < Iq1Grid::N; ++j)
                if (distance[j] == d) pool.push_back(pattern[j]);
        }
        while (pool.size() % Iq1Grid::STEP != 0) pool.push_back(pool[grid.begin[t]]);
        grid.n_neighbours[t] = static_cast<uint16_t>(pool.size() - grid.begin[t]);
    }
    uint16_t* all = static_cast<uint16_t*>(operator new(pool.size() * sizeof(uint16_t), std::align_val_t{64}));
    for (size_t i = 0; i < pool.size(); ++i) all[i] = pool[i];
    grid.neighbours = all;
    return &grid;
}

}  // namespace

const Iq1Grid& iq1_grid() {
    static const Iq1Grid* const grid = make();
    return *grid;
}

}  // namespace quantkit
