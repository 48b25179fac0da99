// Rounding with error feedback: rows to blocks of which each column's rounding error is made up for by the columns
// after it, so that the output error of the matrix, and not that of its weights, is small (LDLQ, GPTQ).
//
// The inputs' covariance H [n, n] is factored as H = V V^T with V upper triangular; U = V^-1. A row x is rounded from
// left to right: column j of current weight x_j gets the value v_j, e_j = (x_j - v_j) / U_jj, and every later column
// k gets x_k -= e_j * U_jk. The row's output error is then sum e_j^2.
//
// Contract, as of lanes.h: every set gives the same bytes. All sums have one order, and products are fused with sums
// only where the source says so (fused.h), which every set then does, by instructions or a function; a row's bytes
// depend on nothing but the row, U and the importance: not on the rows beside it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quantkit {

// What one block of columns [c, c + block) of a matrix needs: the same for all its rows.
struct FeedbackBlock {
    const float* u;  // U[c + i][c + j] = u[i * stride + j]; nothing below the diagonal is to be read
    size_t stride;
    const float* reciprocal;  // [block]: 1 / U[c + i][c + i]
    const float* inverse;     // [block / 8][8][8]: U_GG^-1 of each group G of 8 columns; 0 below the diagonal
    const float* metric;      // [block / 8][8][8]: M = U_GG^-1 U_GG^-T, so that (x - v) M (x - v)^T is G's sum of e^2
    const float* importance;  // [block]: diag(H), what ggml's searches of scales take as the imatrix
    const void* prepared;     // what the kernel's own `prepare` made for this block, or null; at 64 bytes
};

// Some rows of that block. Their number is whatever the driver has; every row is on its own.
struct FeedbackRows {
    size_t n;
    float* const* x;           // [n][block]: current weights; the kernel may overwrite them. Anything, Inf and NaN too
    uint8_t* const* y;         // [n][block_bytes]: where the blocks go
    float* const* e;           // [n][block]: the errors to hand on, e = (x - v) U_BB^-1 for x as it was handed in
    const float* mean_square;  // [n]: of the whole row's weights as they were at first
};

// `search`: look for better scales under U, however long it takes; else ggml's scales of the current weights.
using FeedbackQuantize = void (*)(const FeedbackRows& rows, const FeedbackBlock& block, bool search);
using FeedbackPrepare = void (*)(const FeedbackBlock& block, void* prepared);

struct FeedbackKernel {
    const char* type;
    size_t block, block_bytes;
    size_t prepared_bytes;    // of a block; 0 for none
    FeedbackPrepare prepare;  // null for none
    FeedbackQuantize quantize;
};

// A whole matrix, or some of its rows: x [n_rows, n_cols] to y. u [n_cols, n_cols], importance [n_cols].
struct FeedbackMatrix {
    const float* x;
    size_t n_rows, n_cols;
    const float* u;
    const float* importance;
};

// The linear algebra of one instruction set.
struct FeedbackSet {
    const char* name;
    bool (*supported)();
    const FeedbackKernel* kernels;
    size_t n_kernels;

    // False where a row's errors grew to Inf or NaN; its bytes are then of no use.
    bool (*quantize)(const FeedbackKernel& kernel, const FeedbackMatrix& matrix, bool search, uint8_t* y);

    // x [n_rows, n_cols] in place, whose columns [c, c + width) have got the values v [n_rows, width]: their errors
    // to the columns after them. The columns themselves stay as they are.
    void (*pass_on)(float* x, size_t n_rows, size_t n_cols, size_t c, size_t width, const float* v, const float* u);

    // h [n, n] symmetric, of which the part on and below the diagonal is read; u [n, n] = U of 2^exponent * h with
    // `damp` added to its diagonal. Gives n, or the column at which it is not positive definite, with u unfinished.
    // In double, and in one order of operations.
    size_t (*factor)(const float* h, size_t n, double damp, int exponent, float* u);

    // For each row of w and q [n_rows, n]: out[2 * i] = w h w^T, out[2 * i + 1] = w h q^T
    void (*products)(const float* w, const float* q, size_t n_rows, size_t n, const float* h, double* out);
};

// All sets of this build, best first; `plain`, which every processor runs, last.
const FeedbackSet* feedback_sets(size_t* n);
// The one of that name if this processor can run it, else null.
const FeedbackSet* find_feedback_set(const char* name);
const FeedbackKernel* find_feedback_kernel(const FeedbackSet& set, const char* type);

}  // namespace quantkit
