// The factor of a covariance, in double and in one order of operations, so that it is the same on every machine.
//
// With both axes flipped, H = V V^T with V upper triangular is an ordinary Cholesky: R^T R of the flipped H with R
// upper triangular, V[i][j] = R[n-1-j][n-1-i], and U = V^-1 has U[i][j] = R^-1[n-1-j][n-1-i].
#include "feedback_product.h"
#include "feedback_tables.h"

#include <cmath>

namespace quantkit::QK_ISA {

namespace {

constexpr size_t STEP = 64;  // rows at a time

// a [n, stride], the part on and above the diagonal: to R in place. n, or the row where it is not positive definite.
size_t cholesky(double* a, size_t n, size_t stride, double* packed) {
    for (size_t i0 = 0; i0 < n; i0 += STEP) {
        const size_t i1 = std::min(n, i0 + STEP);
        for (size_t i = i0; i < i1; ++i) {
            double* row = a + i * stride;
            for (size_t k = i0; k < i; ++k) {
                const double* above = a + k * stride;
                const double f = above[i];
                for (size_t j = i; j < n; ++j) row[j] -= f * above[j];
            }
            const double pivot = row[i];
            if (!(pivot > 0.0) || !std::isfinite(pivot)) return i;
            const double root = std::sqrt(pivot);
            row[i] = root;
            for (size_t j = i + 1; j < n; ++j) row[j] = row[j] / root;
        }
        // what the rows below lose: a row block at a time, from the diagonal's tile on
        for (size_t r = i1; r < n; r += STEP) {
            const size_t rows = std::min(STEP, n - r);
            subtract_product<double>(a + r * stride + r, stride, rows, stride - r, {a + i0 * stride + r, 1, stride},
                                     a + i0 * stride + r, stride, i1 - i0, packed);
        }
    }
    return n;
}

// R to R^-1 in place. What is below the diagonal is 0 afterwards, whatever it was.
void invert(double* a, size_t n, size_t stride, double* packed) {
    Aligned<double> left(STEP * stride);
    for (size_t end = n; end > 0;) {
        const size_t i0 = (end - 1) / STEP * STEP, i1 = end, rows = i1 - i0;
        for (size_t i = i0; i < i1; ++i)
            std::memcpy(&left[(i - i0) * stride], a + i * stride, stride * sizeof(double));
        // to the right of the diagonal block: - R_I,later X_later,later
        for (size_t i = i0; i < i1; ++i) std::fill(a + i * stride + i1, a + (i + 1) * stride, 0.0);
        for (size_t j = i1; j < stride; j += STEP) {
            const size_t width = std::min(STEP, stride - j), last = std::min(n, j + width);
            subtract_product<double>(a + i0 * stride + j, stride, rows, width, {left.get() + i1, stride, 1},
                                     a + i1 * stride + j, stride, last - i1, packed);
        }
        // the diagonal block's own rows, from the last
        for (size_t i = i1; i-- > i0;) {
            double* row = a + i * stride;
            const double* r = &left[(i - i0) * stride];
            std::fill(row, row + i1, 0.0);
            row[i] = 1.0;
            for (size_t k = i + 1; k < i1; ++k) {
                const double* below = a + k * stride;
                const double f = r[k];
                for (size_t j = k; j < n; ++j) row[j] -= f * below[j];
            }
            for (size_t j = i; j < n; ++j) row[j] = row[j] / r[i];
        }
        end = i0;
    }
}

}  // namespace

size_t feedback_factor(const float* h, size_t n, double damp, int exponent, float* u) {
    const size_t stride = (n + STEP - 1) / STEP * STEP;
    Aligned<double> a(n * stride), packed(PRODUCT_PACKED);
    std::fill(a.get(), a.get() + n * stride, 0.0);
    for (size_t i = 0; i < n; ++i)
        for (size_t j = i; j < n; ++j)
            a[i * stride + j] = std::ldexp(static_cast<double>(h[(n - 1 - i) * n + n - 1 - j]), exponent);
    for (size_t i = 0; i < n; ++i) a[i * stride + i] += damp;
    const size_t bad = cholesky(a.get(), n, stride, packed.get());
    if (bad < n) return n - 1 - bad;
    invert(a.get(), n, stride, packed.get());
    for (size_t i = 0; i < n; ++i)
        for (size_t j = 0; j < n; ++j)
            u[i * n + j] = j < i ? 0.0f : static_cast<float>(a[(n - 1 - j) * stride + n - 1 - i]);
    return n;
}

void feedback_products(const float* w, const float* q, size_t n_rows, size_t n, const float* h, double* out) {
    constexpr size_t ROWS = 64;
    const size_t stride = (n + STEP - 1) / STEP * STEP;
    // h with its rows padded, a few at a time; -w h of some rows
    Aligned<float> made(ROWS * stride), packed(PRODUCT_PACKED), padded(PRODUCT_K * stride);
    for (size_t i = 0; i < n_rows; i += ROWS) {
        const size_t rows = std::min(ROWS, n_rows - i);
        std::fill(made.get(), made.get() + rows * stride, 0.0f);
        for (size_t k = 0; k < n; k += PRODUCT_K) {
            const size_t n_k = std::min(PRODUCT_K, n - k);
            for (size_t r = 0; r < n_k; ++r) {
                std::memcpy(&padded[r * stride], h + (k + r) * n, n * sizeof(float));
                std::fill(&padded[r * stride] + n, &padded[r * stride] + stride, 0.0f);
            }
            subtract_product<float>(made.get(), stride, rows, stride, {w + i * n + k, n, 1}, padded.get(), stride, n_k,
                                    packed.get());
        }
        for (size_t r = 0; r < rows; ++r) {
            double ww = 0.0, wq = 0.0;
            for (size_t j = 0; j < n; ++j) {
                const double wh = -static_cast<double>(made[r * stride + j]);
                ww += wh * static_cast<double>(w[(i + r) * n + j]);
                wq += wh * static_cast<double>(q[(i + r) * n + j]);
            }
            out[2 * (i + r)] = ww;
            out[2 * (i + r) + 1] = wq;
        }
    }
}

}  // namespace quantkit::QK_ISA
