// Rows of a checkpoint, in any stored format, to float32, and from there to blocks. No Python in here.
//
//   E4M3 (OCP FP8, "fn": no infinities, 0x7f and 0xff are NaN), with a float32 scale for each block of the matrix
//     bit 7 sign | bits 6..3 exponent, bias 7 | bits 2..0 mantissa
//     exponent 0: mantissa * 2^-9 (subnormal); otherwise (1 + mantissa/8) * 2^(exponent-7)
//   BF16, F16 (IEEE binary16), F32: little-endian
//
// The arithmetic is that of the reference converter: float32(weight) * scale, rounded once, then (for tensors that
// pass through a BF16 file) rounded to nearest even bfloat16.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace quantkit {

enum class FileFloat { BF16, F32, F32_ROUNDED };  // the last: rounded to bfloat16

// Convert a row, or n values of it, to float32. Each returns the largest magnitude of its results, as bits: INF_BITS or
// more means that there is an infinity or a NaN. With `round_bf16` every value is rounded to bfloat16. A NaN stays one.
struct RowKernels {
    // scale: of the row's blocks, of `block_cols` columns each; the last may be partial
    uint32_t (*e4m3)(const uint8_t* src, size_t n, const float* scale, size_t block_cols, bool round_bf16, float* out);
    uint32_t (*bf16)(const uint8_t* src, size_t n, bool round_bf16, float* out);
    uint32_t (*f16)(const uint8_t* src, size_t n, bool round_bf16, float* out);
    uint32_t (*f32)(const uint8_t* src, size_t n, bool round_bf16, float* out);
    // The largest magnitude of n float32 values, unchanged.
    uint32_t (*largest)(const float* x, size_t n);
    // E4M3 straight to rows of a file, as bfloat16, or as float32 like e4m3: n_rows rows of n codes that share their
    // scales. Returns the largest magnitude (before rounding for BF16); INF_BITS, leaving the rows unfinished, if a
    // code is NaN or a scale times 256 is not finite: then call e4m3. `stream`: writes past the caches; `out` and rows
    // must be at multiples of 16 bytes, and `streamed` be called afterwards. Null if the set has no such kernel.
    uint32_t (*e4m3_to_file)(const uint8_t* src, size_t n_rows, size_t n, const float* scale, size_t block_cols,
                             FileFloat type, bool stream, uint8_t* out);
    void (*streamed)();
};

constexpr uint32_t INF_BITS = 0x7f800000u;

// Plain C++: the reference for the others, and used if none of them can run.
extern const RowKernels PLAIN_ROWS;

enum class Stored { E4M3, BF16, F16, F32 };

// Rows as a source stores them, interleaved from `n_runs` runs of consecutive source rows (usually one):
// row i is number i / n_runs of run i % n_runs. `data` holds the runs one after another.
struct StoredRows {
    Stored dtype;
    const uint8_t* data;
    size_t n_rows, n_cols;
    bool round_bf16;
    const uint64_t* first_rows;  // of each run, in the matrix, at whose row 0 the blocks of scales begin
    size_t n_runs;
    // E4M3 only: the scales of the whole matrix, `scale_stride` of them for a row of blocks
    const float* scale;
    size_t scale_stride, block_rows, block_cols;

    size_t row_bytes() const { return n_cols * (dtype == Stored::E4M3 ? 1 : dtype == Stored::F32 ? 4 : 2); }
};

// Decodes all rows to float32 out [n_rows, n_cols].
void decode(const RowKernels& kernels, const StoredRows& rows, float* out);

// What values a kernel may be called with: finite, at most `weight`, and with |x| and the largest importance
// w, w * |x| * max(1, |x|^2) at most `product`.
struct Limits {
    double weight, product;
};

// Quantizes all rows to blocks, a few rows at a time. Returns false, leaving the blocks unfinished, if a value is not
// within the limits or an importance is negative, NaN or Inf.
bool quantize(const RowKernels& kernels, const StoredRows& rows, const Kernel& kernel, const float* importance,
              Limits limits, uint8_t* out);

// Returns the index of the first value that is NaN or Inf, or n if all are finite.
size_t first_nonfinite(const RowKernels& kernels, const float* x, size_t n);

}  // namespace quantkit
