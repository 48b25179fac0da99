// c -= a b, the product under everything that error feedback does, in one order: each element of c has the products
// of k = 0, 1, … taken from it one after the other, each rounded once (fused.h), whatever the tiles, so every set makes
// the same numbers.
#pragma once
#include <algorithm>
#include <memory>
#include <new>

#include "fused.h"

namespace quantkit::QK_ISA {

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef F type;
};
template <>
struct VectorOf<double> {
    typedef D type;
};

// Values at a cache line's start.
template <typename T>
class Aligned {
public:
    explicit Aligned(size_t n)
        : data_(static_cast<T*>(::operator new(std::max<size_t>(n, 1) * sizeof(T), LINE))) {}
    T* get() const { return data_.get(); }
    T& operator[](size_t i) const { return data_.get()[i]; }

private:
    static constexpr std::align_val_t LINE{64};
    struct Delete {
        void operator()(T* p) const { ::operator delete(p, LINE); }
    };
    std::unique_ptr<T, Delete> data_;
};

namespace {

// a [n_rows, n_k]: a[i][k] = at[i * row + k * col].
template <typename T>
struct Left {
    const T* at;
    size_t row, col;
};

// R rows and V vectors of columns of c -= a b, b [n_k][V vectors] packed.
template <typename T, int R, int V>
QK_INLINE void product_tile(T* c, size_t stride, Left<T> a, const T* b, size_t n_k) {
    typedef typename VectorOf<T>::type Vector;
    constexpr size_t N = sizeof(Vector) / sizeof(T);
    Vector sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) std::memcpy(&sum[r][v], c + r * stride + v * N, sizeof(Vector));
    for (size_t k = 0; k < n_k; ++k, b += V * N) {
        Vector right[V];
        for (int v = 0; v < V; ++v) std::memcpy(&right[v], b + v * N, sizeof(Vector));
        for (int r = 0; r < R; ++r) {
            const Vector left = a.at[r * a.row + k * a.col] - Vector{};
            for (int v = 0; v < V; ++v) sum[r][v] = minus_product(sum[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) std::memcpy(c + r * stride + v * N, &sum[r][v], sizeof(Vector));
}

// All rows of a tile of V vectors of columns.
template <typename T, int V>
void product_columns(T* c, size_t stride, size_t n_rows, Left<T> a, const T* b, size_t n_k) {
    constexpr int R = LANES == 16 ? 6 : 4;
    size_t i = 0;
    for (; i + R <= n_rows; i += R, a.at += R * a.row) product_tile<T, R, V>(c + i * stride, stride, a, b, n_k);
    for (; i < n_rows; ++i, a.at += a.row) product_tile<T, 1, V>(c + i * stride, stride, a, b, n_k);
}

constexpr size_t PRODUCT_K = 256;                        // of a and b at a time
constexpr int PRODUCT_VECTORS = LANES == 16 ? 4 : 2;     // of columns at a time
constexpr size_t PRODUCT_PACKED = PRODUCT_K * 4 * LANES;  // values of scratch that `subtract_product` needs

// c [n_rows, n_cols] -= a [n_rows, n_k] b [n_k, n_cols]; n_cols a multiple of a vector.
template <typename T>
void subtract_product(T* c, size_t c_stride, size_t n_rows, size_t n_cols, Left<T> a, const T* b, size_t b_stride,
                      size_t n_k, T* packed) {
    typedef typename VectorOf<T>::type Vector;
    constexpr size_t N = sizeof(Vector) / sizeof(T), WIDE = PRODUCT_VECTORS * N;
    for (size_t k0 = 0; k0 < n_k; k0 += PRODUCT_K) {
        const size_t n = std::min(PRODUCT_K, n_k - k0);
        const Left<T> left{a.at + k0 * a.col, a.row, a.col};
        for (size_t j = 0; j < n_cols;) {
            const size_t width = n_cols - j >= WIDE ? WIDE : N;
            for (size_t k = 0; k < n; ++k)
                std::memcpy(packed + k * width, b + (k0 + k) * b_stride + j, width * sizeof(T));
            if (width == WIDE)
                product_columns<T, PRODUCT_VECTORS>(c + j, c_stride, n_rows, left, packed, n);
            else
                product_columns<T, 1>(c + j, c_stride, n_rows, left, packed, n);
            j += width;
        }
    }
}

}  // namespace

}  // namespace quantkit::QK_ISA
