// Converts a slab of stored rows to float32, or straight to blocks: a few rows at a time become float32, and stay
// in the nearest caches until the kernel has read them.
#include <algorithm>
#include <cfloat>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>

#include "rows.h"

namespace quantkit {

namespace {

// Floats that a thread keeps from slab to slab, aligned to a cache line.
class Buffer {
public:
    float* of(size_t n) {
        if (n > size_) {
            size_ = 0;
            data_.reset(static_cast<float*>(::operator new(n * sizeof(float), LINE)));
            size_ = n;
        }
        return data_.get();
    }

private:
    static constexpr std::align_val_t LINE{64};
    struct Delete {
        void operator()(float* p) const { ::operator delete(p, LINE); }
    };
    std::unique_ptr<float, Delete> data_;
    size_t size_ = 0;
};

// Where row i is: its run, number `at` in the run, number `row` in the data.
struct Place {
    size_t run, at, row;
};

Place place(const StoredRows& rows, size_t i) {
    const size_t run = i % rows.n_runs, at = i / rows.n_runs;
    // the first n_rows % n_runs runs have one more row
    const size_t before = run * (rows.n_rows / rows.n_runs) + std::min(run, rows.n_rows % rows.n_runs);
    return {run, at, before + at};
}

const float* scales_of(const StoredRows& rows, size_t run, size_t at) {
    return rows.scale + (rows.first_rows[run] + at) / rows.block_rows * rows.scale_stride;
}

uint32_t decode_row(const RowKernels& kernels, const StoredRows& rows, size_t i, float* out, bool stream = false) {
    const Place from = place(rows, i);
    const uint8_t* src = rows.data + from.row * rows.row_bytes();
    switch (rows.dtype) {
        case Stored::E4M3: {
            const float* scale = scales_of(rows, from.run, from.at);
            if (kernels.e4m3_to_file) {
                const FileFloat type = rows.round_bf16 ? FileFloat::F32_ROUNDED : FileFloat::F32;
                const uint32_t bits = kernels.e4m3_to_file(src, 1, rows.n_cols, scale, rows.block_cols, type, stream,
                                                           reinterpret_cast<uint8_t*>(out));
                if (bits < INF_BITS) return bits;
            }
            return kernels.e4m3(src, rows.n_cols, scale, rows.block_cols, rows.round_bf16, out);
        }
        case Stored::BF16: return kernels.bf16(src, rows.n_cols, rows.round_bf16, out);
        case Stored::F16: return kernels.f16(src, rows.n_cols, rows.round_bf16, out);
        case Stored::F32: break;
    }
    return kernels.f32(src, rows.n_cols, rows.round_bf16, out);
}

// Whether rows should be written past the caches: if they are more than a reader would still find there.
bool streams(const void* out, size_t n_rows, size_t row_bytes) {
    constexpr size_t MANY = 16 << 20;
    return n_rows * row_bytes >= MANY && reinterpret_cast<uintptr_t>(out) % 16 == 0 && row_bytes % 16 == 0;
}

// E4M3 rows to a BF16 or F32 file in one step. Returns false if a row needs the long way, or must be refused there.
bool copy_e4m3(const RowKernels& kernels, const StoredRows& rows, FileFloat type, Limits limits, uint8_t* out) {
    const size_t row_bytes = rows.n_cols * (type == FileFloat::BF16 ? 2 : 4);
    const bool stream = streams(out, rows.n_rows, row_bytes);
    uint32_t bits = 0;
    for (size_t i = 0, n; i < rows.n_rows && bits < INF_BITS; i += n) {
        const Place from = place(rows, i);
        const uint8_t* src = rows.data + from.row * rows.row_bytes();
        // as many rows as have the same scales
        const size_t left = rows.block_rows - (rows.first_rows[from.run] + from.at) % rows.block_rows;
        n = rows.n_runs == 1 ? std::min(rows.n_rows - i, left) : 1;
        bits = std::max(bits, kernels.e4m3_to_file(src, n, rows.n_cols, scales_of(rows, from.run, from.at),
                                                   rows.block_cols, type, stream, out + i * row_bytes));
    }
    if (stream) kernels.streamed();
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    return bits < INF_BITS && largest <= limits.weight;
}

// Rows to do together: enough to fill a kernel's lanes (at most 16 in any set), and not much more than half a
// first-level cache. Rows too long for both fill the lanes well enough on their own.
size_t rows_a_turn(size_t n_cols, size_t block) {
    constexpr size_t few = 6 << 10, many = 64 << 10;  // values
    const size_t step = 16 / std::gcd<size_t>(n_cols / block, 16);
    if (step * n_cols <= few) return few / (step * n_cols) * step;
    return step * n_cols <= many ? step : std::max<size_t>(1, many / n_cols);
}

}  // namespace

void decode(const RowKernels& kernels, const StoredRows& rows, float* out) {
    const bool stream = kernels.streamed && streams(out, rows.n_rows, rows.n_cols * sizeof(float));
    for (size_t i = 0; i < rows.n_rows; ++i) decode_row(kernels, rows, i, out + i * rows.n_cols, stream);
    if (stream) kernels.streamed();
}

bool quantize(const RowKernels& kernels, const StoredRows& stored, const Kernel& kernel, const float* importance,
              Limits limits, uint8_t* out) {
    static thread_local Buffer buffer;
    StoredRows rows = stored;
    if (std::strcmp(kernel.type, "BF16") == 0) rows.round_bf16 = false;  // the kernel rounds; twice gives the same
    const size_t n_cols = rows.n_cols, step = rows_a_turn(n_cols, kernel.block);
    const size_t row_bytes = n_cols / kernel.block * kernel.block_bytes;
    double most = 0;
    if (importance) {
        float largest = 0;
        bool ok = true;
        for (size_t c = 0; c < n_cols; ++c) {
            ok &= importance[c] >= 0 && importance[c] <= FLT_MAX;
            largest = std::max(largest, importance[c]);
        }
        if (!ok) return false;
        most = largest;
    }
    if (stored.dtype == Stored::E4M3 && kernels.e4m3_to_file && !importance) {
        const bool bf16 = std::strcmp(kernel.type, "BF16") == 0;
        const FileFloat type = bf16 ? FileFloat::BF16 : rows.round_bf16 ? FileFloat::F32_ROUNDED : FileFloat::F32;
        if ((bf16 || std::strcmp(kernel.type, "F32") == 0) && copy_e4m3(kernels, rows, type, limits, out)) return true;
    }
    for (size_t i = 0; i < rows.n_rows; i += step) {
        const size_t n = std::min(step, rows.n_rows - i);
        float* x = buffer.of(step * n_cols);
        uint32_t bits = 0;
        for (size_t r = 0; r < n; ++r) bits = std::max(bits, decode_row(kernels, rows, i + r, x + r * n_cols));
        if (bits >= INF_BITS) return false;
        float largest;
        std::memcpy(&largest, &bits, sizeof largest);
        const double v = largest;
        if (v > limits.weight || most * v * std::max(1.0, v * v) > limits.product) return false;
        kernel.quantize(x, out + i * row_bytes, n, n_cols, importance);
    }
    return true;
}

size_t first_nonfinite(const RowKernels& kernels, const float* x, size_t n) {
    constexpr size_t chunk = 4096;
    for (size_t i = 0; i < n; i += chunk) {
        const size_t end = std::min(n, i + chunk);
        if (kernels.largest(x + i, end - i) < INF_BITS) continue;
        for (size_t j = i; j < end; ++j)
            if (kernels.largest(x + j, 1) >= INF_BITS) return j;
    }
    return n;
}

}  // namespace quantkit
