// What the searches of IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S look up: for every vector of rounded levels (a
// cell), whether it is a point of the type's grid, and if not, which grid points ggml compares for it (its
// "neighbours", iq2xs_init_impl and iq3xs_init_impl of ggml/src/ggml-quants.c).
//
// A grid point is a word: its levels in 2-bit fields (IQ2, eight levels 0..2) or 4-bit fields (IQ3, four levels 0..7),
// first level lowest. A cell is numbered by its levels as digits to the base of the number of levels, first lowest.
// Plain types only: this header is included by sources compiled for one instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quantkit {

// Packed: where its neighbours start in `words` (32 bits; a multiple of GRID_CHUNK), how many (16 bits; 0: the cell is
// a grid point itself), the grid point it is (16 bits).
struct Cell {
    uint64_t packed;

    uint64_t list_and_n() const { return packed & 0xffffffffffff; }
    int n() const { return static_cast<int>((packed >> 32) & 0xffff); }
    int word() const { return static_cast<int>(packed >> 48); }
};

// Lists are filled up to a multiple of this with their last word; each starts on 2 * GRID_CHUNK bytes.
constexpr int GRID_CHUNK = 8;

struct Grid {
    // Twice levels^dim: first without the neighbours that another one beats for all values that round to the cell;
    // then with all of ggml's. Both in its order: by distance, then by index.
    const Cell* cells;
    const uint16_t* words;  // of both
    const uint16_t* index;  // word of a grid point -> its index
};

enum class GridType { IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S };
constexpr int N_GRID_TYPES = 5;

// This thread's own, kept until it ends: made from the type's codebook at first use by any, copied at first use by
// another. Thread-safe. Throws std::logic_error while there is no codebook.
const Grid& grid(GridType type);

}  // namespace quantkit
