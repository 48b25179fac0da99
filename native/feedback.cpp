// The driver of error feedback: rows slab by slab from left to right, a kernel for each block, and what the later
// columns lose by each slab's errors as one product. See feedback.h.
#include "feedback.h"

#include <algorithm>

#include "feedback_product.h"
#include "feedback_tables.h"

namespace quantkit::QK_ISA {

namespace {

constexpr size_t SLAB = 256, GROUP = 8;
constexpr size_t ROWS = 256;  // at a time: many enough to be worth a walk through U, few enough to be little memory

// U_GG^-1 and its product with its transpose, of each group of 8 columns; and 1 / U_jj.
void invert_groups(const float* u, size_t n, float* reciprocal, float* inverse, float* metric) {
    for (size_t j = 0; j < n; ++j) reciprocal[j] = 1.0f / u[j * n + j];
    for (size_t g = 0; g < n; g += GROUP, inverse += GROUP * GROUP, metric += GROUP * GROUP) {
        const float* from = u + g * n + g;
        double x[GROUP][GROUP] = {};
        for (size_t i = GROUP; i-- > 0;) {
            x[i][i] = 1.0;
            for (size_t k = i + 1; k < GROUP; ++k)
                for (size_t j = k; j < GROUP; ++j) x[i][j] -= static_cast<double>(from[i * n + k]) * x[k][j];
            for (size_t j = i; j < GROUP; ++j) x[i][j] = x[i][j] / static_cast<double>(from[i * n + i]);
        }
        for (size_t i = 0; i < GROUP; ++i)
            for (size_t j = 0; j < GROUP; ++j) {
                double sum = 0.0;
                for (size_t k = 0; k < GROUP; ++k) sum += x[i][k] * x[j][k];
                inverse[i * GROUP + j] = static_cast<float>(x[i][j]);
                metric[i * GROUP + j] = static_cast<float>(sum);
            }
    }
}

bool all_finite(const float* x, size_t n) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        largest = std::max(largest, bits & 0x7fffffffu);
    }
    return largest < 0x7f800000u;
}

}  // namespace

bool feedback_quantize(const FeedbackKernel& kernel, const FeedbackMatrix& matrix, bool search, uint8_t* y) {
    const size_t n = matrix.n_cols, block = kernel.block, row_bytes = n / block * kernel.block_bytes;
    const size_t most = std::min(ROWS, matrix.n_rows);
    Aligned<float> reciprocal(n), inverse(n * GROUP), metric(n * GROUP);
    Aligned<float> x(most * n), e(most * SLAB), u(SLAB * SLAB), packed(PRODUCT_PACKED);
    Aligned<uint8_t> prepared(kernel.prepared_bytes);
    invert_groups(matrix.u, n, reciprocal.get(), inverse.get(), metric.get());
    float* xs[ROWS];
    float* es[ROWS];
    uint8_t* ys[ROWS];
    float mean_square[ROWS];
    bool finite = true;
    for (size_t row = 0; row < matrix.n_rows; row += ROWS) {
        const size_t rows = std::min(ROWS, matrix.n_rows - row);
        std::memcpy(x.get(), matrix.x + row * n, rows * n * sizeof(float));
        for (size_t i = 0; i < rows; ++i) {
            float sum = 0.0f;
            for (size_t j = 0; j < n; ++j) sum += x[i * n + j] * x[i * n + j];
            mean_square[i] = sum / static_cast<float>(n);
        }
        for (size_t slab = 0; slab < n; slab += SLAB) {
            const size_t width = std::min(SLAB, n - slab), end = slab + width;
            for (size_t k = 0; k < width; ++k)
                std::memcpy(&u[k * SLAB], matrix.u + (slab + k) * n + slab, width * sizeof(float));
            for (size_t c = slab; c < end; c += block) {
                for (size_t i = 0; i < rows; ++i) {
                    xs[i] = &x[i * n + c];
                    es[i] = &e[i * SLAB + (c - slab)];
                    ys[i] = y + (row + i) * row_bytes + c / block * kernel.block_bytes;
                }
                FeedbackBlock at{&u[(c - slab) * SLAB + (c - slab)],
                                 SLAB,
                                 &reciprocal[c],
                                 &inverse[c * GROUP],
                                 &metric[c * GROUP],
                                 matrix.importance + c,
                                 nullptr};
                if (kernel.prepare) {
                    kernel.prepare(at, prepared.get());
                    at.prepared = prepared.get();
                }
                kernel.quantize({rows, xs, ys, es, mean_square}, at, search);
                for (size_t i = 0; i < rows; ++i) finite &= all_finite(es[i], block);
                if (c + block < end)
                    subtract_product<float>(&x[c + block], n, rows, end - c - block, {&e[c - slab], SLAB, 1},
                                            &u[(c - slab) * SLAB + (c - slab) + block], SLAB, block, packed.get());
            }
            if (end < n)
                subtract_product<float>(&x[end], n, rows, n - end, {e.get(), SLAB, 1}, matrix.u + slab * n + end, n,
                                        width, packed.get());
        }
    }
    return finite;
}

void feedback_pass_on(float* x, size_t n_rows, size_t n_cols, size_t c, size_t width, const float* v, const float* u) {
    const size_t later = n_cols - c - width;
    if (later == 0) return;
    Aligned<float> e(std::min(ROWS, n_rows) * width), packed(PRODUCT_PACKED);
    for (size_t row = 0; row < n_rows; row += ROWS) {
        const size_t rows = std::min(ROWS, n_rows - row);
        for (size_t i = 0; i < rows; ++i) {
            const float* from = x + (row + i) * n_cols + c;
            const float* value = v + (row + i) * width;
            float* made = &e[i * width];
            for (size_t j = 0; j < width; ++j) made[j] = from[j] - value[j];
            for (size_t k = 0; k < width; ++k) {
                const float* uk = u + (c + k) * n_cols + c;
                made[k] = made[k] / uk[k];
                for (size_t j = k + 1; j < width; ++j) made[j] -= made[k] * uk[j];
            }
        }
        subtract_product<float>(x + row * n_cols + c + width, n_cols, rows, later, {e.get(), width, 1},
                                u + c * n_cols + c + width, n_cols, width, packed.get());
    }
}

}  // namespace quantkit::QK_ISA
