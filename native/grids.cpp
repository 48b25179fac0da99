// See grids.h. Compiled for the lowest processor. For each cell ggml sorts all grid points by distance (seconds);
// here the shells of equal distance are picked from a table of distances.
#include "grids.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "codebooks.h"

namespace quantkit {

namespace {

struct Shape {
    const char* name;
    int points, dim, levels, shells;  // `shells`: how many distances are kept (ggml's nwant)
};

// Levels of an entry, one byte each.
using Levels = std::array<uint8_t, 8>;

uint64_t packed(const Levels& l) {
    uint64_t u;
    std::memcpy(&u, l.data(), sizeof u);
    return u;
}

// Whether h is at least as near as g in every coordinate of the cell, for all values that round to it: each
// coordinate is the same, or h is fewer levels away. `h`, `g`: levels; `dh`, `dg`: levels away; one byte each.
bool beats(uint64_t h, uint64_t dh, uint64_t g, uint64_t dg) {
    constexpr uint64_t HIGH = 0x8080808080808080u;
    const uint64_t not_nearer = ((dh | HIGH) - dg) & HIGH;
    const uint64_t differs = ((h ^ g) + ~HIGH) & HIGH;
    return (not_nearer & differs) == 0;
}

// The data of a grid; see Grid.
struct Tables {
    std::vector<Cell> cells;
    std::vector<uint16_t> words, index;
};

// A copy of the tables for one thread. Cores that read the same memory fetch it from each other instead of
// their own caches, which made two threads slower than two processes.
class OwnGrid {
public:
    explicit OwnGrid(const Tables& t) : cells_(t.cells), index_(t.index), storage_(t.words.size() + GRID_CHUNK) {
        // align the lists to their chunks
        uint16_t* start = storage_.data();
        while (reinterpret_cast<uintptr_t>(start) % (2 * GRID_CHUNK) != 0) ++start;
        std::copy(t.words.begin(), t.words.end(), start);
        grid_ = {cells_.data(), start, index_.data()};
    }
    OwnGrid(const OwnGrid&) = delete;
    OwnGrid& operator=(const OwnGrid&) = delete;

    const Grid& grid() const { return grid_; }

private:
    std::vector<Cell> cells_;
    std::vector<uint16_t> index_, storage_;
    Grid grid_;
};

uint32_t append(std::vector<uint16_t>& words, const std::vector<uint16_t>& list) {
    const size_t at = words.size();
    words.insert(words.end(), list.begin(), list.end());
    while (words.size() % GRID_CHUNK != 0) words.push_back(list.back());
    return static_cast<uint32_t>(at);
}

// Returns the levels of a codebook's entries: the rank of each value among all values that occur.
std::vector<Levels> levels_of(const Codebook& book, const Shape& shape) {
    bool seen[256] = {};
    for (size_t i = 0; i < book.n * book.k; ++i) seen[book.values[i] + 128] = true;
    int rank[256], n = 0;
    for (int v = 0; v < 256; ++v) rank[v] = seen[v] ? n++ : 0;
    if (n != shape.levels)
        throw std::logic_error(std::string("quantize: the codebook ") + shape.name + " has wrong values");
    std::vector<Levels> out(book.n, Levels{});
    for (size_t j = 0; j < book.n; ++j)
        for (size_t i = 0; i < book.k; ++i) out[j][i] = static_cast<uint8_t>(rank[book.values[j * book.k + i] + 128]);
    return out;
}

const Tables* build(const Shape& shape) {
    const int dim = shape.dim, half = dim / 2, bits = dim == 8 ? 2 : 4;
    const size_t points = static_cast<size_t>(shape.points);
    const std::vector<Levels> point = levels_of(codebook(shape.name, points, static_cast<size_t>(dim)), shape);
    size_t n_half = 1;
    for (int i = 0; i < half; ++i) n_half *= static_cast<size_t>(shape.levels);
    const size_t n_cells = n_half * n_half;

    // squared distances of all points from both halves of all cells
    std::vector<uint8_t> low(n_half * points), high(n_half * points);
    for (size_t h = 0; h < n_half; ++h)
        for (size_t j = 0; j < points; ++j) {
            int lo = 0, hi = 0;
            size_t digits = h;
            for (int i = 0; i < half; ++i, digits /= static_cast<size_t>(shape.levels)) {
                const int level = static_cast<int>(digits % static_cast<size_t>(shape.levels));
                lo += (point[j][i] - level) * (point[j][i] - level);
                hi += (point[j][i + half] - level) * (point[j][i + half] - level);
            }
            low[h * points + j] = static_cast<uint8_t>(lo);
            high[h * points + j] = static_cast<uint8_t>(hi);
        }

    Tables* const t = new Tables;  // never destroyed: kernels may run while the process ends
    std::vector<uint16_t> word(points);
    t->index.assign(size_t{1} << 16, 0);
    for (size_t j = 0; j < points; ++j) {
        unsigned w = 0;
        for (int i = 0; i < dim; ++i) w |= static_cast<unsigned>(point[j][i]) << (bits * i);
        word[j] = static_cast<uint16_t>(w);
        t->index[w] = static_cast<uint16_t>(j);
    }
    t->cells.assign(2 * n_cells, Cell{0});
    std::vector<uint16_t>& words = t->words;
    std::vector<uint16_t> full_list, list;
    std::vector<uint8_t> dist(points);
    std::vector<uint64_t> kept, kept_away;
    for (size_t c = 0; c < n_cells; ++c) {
        const uint8_t* const a = &low[c % n_half * points];
        const uint8_t* const b = &high[c / n_half * points];
        uint8_t nearest = 255;
        for (size_t j = 0; j < points; ++j) {
            dist[j] = static_cast<uint8_t>(a[j] + b[j]);
            nearest = std::min(nearest, dist[j]);
        }
        if (nearest == 0) {
            const size_t j = static_cast<size_t>(std::find(dist.begin(), dist.end(), 0) - dist.begin());
            t->cells[c] = t->cells[n_cells + c] = Cell{static_cast<uint64_t>(word[j]) << 48};
            continue;
        }
        Levels center{};
        size_t digits = c;
        for (int i = 0; i < dim; ++i, digits /= static_cast<size_t>(shape.levels))
            center[i] = static_cast<uint8_t>(digits % static_cast<size_t>(shape.levels));
        full_list.clear();
        list.clear();
        kept.clear();
        kept_away.clear();
        for (int shell = 0; shell < shape.shells && nearest != 255; ++shell) {
            const uint8_t here = nearest;
            nearest = 255;
            for (size_t j = 0; j < points; ++j) {
                if (dist[j] > here) nearest = std::min(nearest, dist[j]);
                if (dist[j] != here) continue;
                full_list.push_back(word[j]);
                Levels away{};
                for (int i = 0; i < dim; ++i)
                    away[i] = static_cast<uint8_t>(std::abs(point[j][i] - center[i]));
                const uint64_t g = packed(point[j]), dg = packed(away);
                bool beaten = false;
                for (size_t i = 0; i < kept.size() && !beaten; ++i) beaten = beats(kept[i], kept_away[i], g, dg);
                if (beaten) continue;
                kept.push_back(g);
                kept_away.push_back(dg);
                list.push_back(word[j]);
            }
        }
        const uint64_t all = append(words, full_list);
        const uint64_t some = list.size() == full_list.size() ? all : append(words, list);
        t->cells[n_cells + c] = Cell{all | static_cast<uint64_t>(full_list.size()) << 32};
        t->cells[c] = Cell{some | static_cast<uint64_t>(list.size()) << 32};
    }
    return t;
}

const Tables& tables(GridType type) {
    switch (type) {
        case GridType::IQ2_XXS: {
            static const Tables* const one = build({"IQ2_XXS", 256, 8, 3, 2});
            return *one;
        }
        case GridType::IQ2_XS: {
            static const Tables* const one = build({"IQ2_XS", 512, 8, 3, 2});
            return *one;
        }
        case GridType::IQ2_S: {
            static const Tables* const one = build({"IQ2_S", 1024, 8, 3, 1});
            return *one;
        }
        case GridType::IQ3_XXS: {
            static const Tables* const one = build({"IQ3_XXS", 256, 4, 8, 2});
            return *one;
        }
        default: {
            static const Tables* const one = build({"IQ3_S", 512, 4, 8, 3});
            return *one;
        }
    }
}

}  // namespace

const Grid& grid(GridType type) {
    static thread_local std::unique_ptr<const OwnGrid> own[N_GRID_TYPES];
    std::unique_ptr<const OwnGrid>& mine = own[static_cast<size_t>(type)];
    if (!mine) mine.reset(new OwnGrid(tables(type)));
    return mine->grid();
}

}  // namespace quantkit
