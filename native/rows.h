// Rows of a checkpoint to float32. Plain C++ for the lowest processor; no Python in here.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quantkit {

// The value of every E4M3 code (OCP FP8, "fn": no infinities, 0x7f and 0xff are NaN).
//   bit 7 sign | bits 6..3 exponent, bias 7 | bits 2..0 mantissa
//   exponent 0: mantissa * 2^-9 (subnormal); otherwise (1 + mantissa/8) * 2^(exponent-7)
const float* e4m3_values();

// float32 -> bfloat16, round to nearest even; a NaN stays a NaN (quiet, sign kept).
uint16_t f32_to_bf16(float x);

// A rectangle of a block-scaled E4M3 matrix, dequantized: out[r][c] = value(src[r][c]) * scale of its block.
//   src        n_rows x n_cols bytes, rows `src_stride` bytes apart
//   scale      the scales of the whole matrix, `scale_stride` of them in a row of blocks
//   row0       the matrix row that src starts at (blocks are counted from the matrix's row 0); columns start at 0
//   block_*    128 x 128 in DeepSeek-V3; blocks at the edges may be partial
//   round_bf16 round every product to bfloat16, as a converter to a BF16 file does
void e4m3_to_f32(const uint8_t* src, size_t n_rows, size_t n_cols, size_t src_stride, const float* scale,
                 size_t scale_stride, size_t row0, size_t block_rows, size_t block_cols, bool round_bf16, float* out);

void bf16_to_f32(const uint16_t* src, size_t n, float* out);
void f16_to_f32(const uint16_t* src, size_t n, bool round_bf16, float* out);
void f32_to_f32(const float* src, size_t n, bool round_bf16, float* out);

// Index of the first value that is NaN or Inf, or n when all are finite.
size_t first_nonfinite(const float* x, size_t n);

}  // namespace quantkit
