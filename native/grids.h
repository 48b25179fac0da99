// What the searches of IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S look up: for every vector of rounded levels (a
// cell), whether it is a point of the type's grid, and if not, which grid points ggml compares (its
// "neighbours", iq2xs_init_impl and iq3xs_init_impl of ggml/src/ggml-quants.c).
//
// A grid point is a word: its levels in 2-bit fields (IQ2, eight levels 0..2) or 4-bit fields (IQ3, four levels 0..7),
// first level lowest. A cell's number has its levels as digits in the base of the number of levels, first lowest.
// Only plain types: sources compiled for one instruction set include this header.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quantkit {

// Packed: where the neighbours start in `words` (32 bits; a multiple of GRID_CHUNK), their number (16 bits; 0: the cell
// is itself a grid point), the grid point (16 bits).
struct Cell {
    uint64_t packed;

    uint64_t list_and_n() const { return packed & 0xffffffffffff; }
    int n() const { return static_cast<int>((packed >> 32) & 0xffff); }
    int word() const { return static_cast<int>(packed >> 48); }
};

// Lists are padded to a multiple of this with their last word; each starts at a multiple of 2 * GRID_CHUNK bytes.
constexpr int GRID_CHUNK = 8;

struct Grid {
    // 2 * levels^dim cells: first without neighbours that another one beats for all values that round to the cell,
    // then with all of ggml's neighbours. Both are in its order: by distance, then by index.
    const Cell* cells;
    const uint16_t* words;  // of both halves
    const uint16_t* index;  // word of a grid point -> its index
};

enum class GridType { IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S };
constexpr int N_GRID_TYPES = 5;

// Returns this thread's own grid, kept until the thread ends. The first thread makes it from the type's codebook,
// others copy it at first use. Thread-safe. Throws std::logic_error if the codebook is not set.
const Grid& grid(GridType type);

}  // namespace quantkit
