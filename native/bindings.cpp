// The kernels as Python sees them: checks shapes, releases the GIL, calls. Only quantkit/kernels/ imports this.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "codebooks.h"
#include "feedback.h"
#include "kernels.h"
#include "rows.h"

namespace nb = nanobind;
using namespace nb::literals;

template <typename T, int N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <typename T, int N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

// more than the rows or columns of any matrix, and small enough that the sum of two cannot wrap
static constexpr size_t MAX_BLOCK = size_t{1} << 31;

static void require(bool ok, const char* what) {
    if (!ok) throw nb::value_error(what);
}

static size_t blocks(size_t n, size_t block) { return n / block + (n % block != 0); }

static const quantkit::KernelSet& set_of(const std::string& name) {
    const quantkit::KernelSet* set = quantkit::find_set(name.c_str());
    require(set != nullptr, "no such kernels");
    return *set;
}

// Row kernels by the name of their set; the best ones if the name is empty.
static const quantkit::RowKernels& rows_of(const std::string& set) {
    if (set.empty()) return quantkit::best_rows();
    return set == "plain" ? quantkit::PLAIN_ROWS : *set_of(set).rows;
}

static void e4m3_to_f32(In<uint8_t, 2> src, In<float, 2> scale, uint64_t row0, size_t block_rows, size_t block_cols,
                        bool round_bf16, Out<float, 2> out, const std::string& set) {
    const size_t n_rows = src.shape(0), n_cols = src.shape(1);
    require(block_rows > 0 && block_cols > 0, "e4m3_to_f32: the blocks are empty");
    require(block_rows <= MAX_BLOCK && block_cols <= MAX_BLOCK, "e4m3_to_f32: the blocks are too large");
    require(out.shape(0) == n_rows && out.shape(1) == n_cols, "e4m3_to_f32: out has not the shape of src");
    require(scale.shape(1) == blocks(n_cols, block_cols), "e4m3_to_f32: scale has not a column for each block");
    require(row0 <= SIZE_MAX - n_rows && blocks(row0 + n_rows, block_rows) <= scale.shape(0),
            "e4m3_to_f32: scale has too few rows");
    const quantkit::RowKernels& kernels = rows_of(set);
    nb::gil_scoped_release release;
    quantkit::decode(kernels,
                     {quantkit::Stored::E4M3, src.data(), n_rows, n_cols, round_bf16, &row0, 1, scale.data(),
                      scale.shape(1), block_rows, block_cols},
                     out.data());
}

static void bf16_to_f32(In<uint16_t, 1> src, Out<float, 1> out, const std::string& set) {
    require(out.shape(0) == src.shape(0), "bf16_to_f32: out has not the length of src");
    const quantkit::RowKernels& kernels = rows_of(set);
    nb::gil_scoped_release release;
    kernels.bf16(reinterpret_cast<const uint8_t*>(src.data()), src.shape(0), false, out.data());
}

static void f16_to_f32(In<uint16_t, 1> src, bool round_bf16, Out<float, 1> out, const std::string& set) {
    require(out.shape(0) == src.shape(0), "f16_to_f32: out has not the length of src");
    const quantkit::RowKernels& kernels = rows_of(set);
    nb::gil_scoped_release release;
    kernels.f16(reinterpret_cast<const uint8_t*>(src.data()), src.shape(0), round_bf16, out.data());
}

static void f32_to_f32(In<float, 1> src, bool round_bf16, Out<float, 1> out, const std::string& set) {
    require(out.shape(0) == src.shape(0), "f32_to_f32: out has not the length of src");
    const quantkit::RowKernels& kernels = rows_of(set);
    nb::gil_scoped_release release;
    kernels.f32(reinterpret_cast<const uint8_t*>(src.data()), src.shape(0), round_bf16, out.data());
}

static size_t first_nonfinite(In<float, 1> x, const std::string& set) {
    const quantkit::RowKernels& kernels = rows_of(set);
    nb::gil_scoped_release release;
    return quantkit::first_nonfinite(kernels, x.data(), x.shape(0));
}

// [(set, [types])] of the kernel sets that this processor can run, best first.
static nb::list kernel_sets() {
    nb::list out;
    size_t n = 0;
    const quantkit::KernelSet* sets = quantkit::kernel_sets(&n);
    for (size_t i = 0; i < n; ++i) {
        if (!sets[i].supported()) continue;
        nb::list types;
        for (size_t k = 0; k < sets[i].n_kernels; ++k) types.append(sets[i].kernels[k].type);
        out.append(nb::make_tuple(sets[i].name, types));
    }
    return out;
}

// Returns the kernel, if its blocks divide rows of this length and `out` has the right shape.
static const quantkit::Kernel& kernel_of(const quantkit::KernelSet& set, const std::string& type, size_t n_rows,
                                         size_t n_cols, const std::optional<In<float, 1>>& importance,
                                         const Out<uint8_t, 2>& out) {
    const quantkit::Kernel* kernel = quantkit::find_kernel(set, type.c_str());
    require(kernel != nullptr, "quantize: no such kernel");
    require(n_cols > 0 && n_cols % kernel->block == 0, "quantize: the columns do not divide into blocks");
    require(out.shape(0) == n_rows && out.shape(1) == n_cols / kernel->block * kernel->block_bytes,
            "quantize: out has not the shape of the blocks");
    require(!importance || importance->shape(0) == n_cols, "quantize: not an importance for each column");
    return *kernel;
}

static void quantize(const std::string& set, const std::string& type, In<float, 2> rows,
                     std::optional<In<float, 1>> importance, Out<uint8_t, 2> out) {
    const size_t n_rows = rows.shape(0), n_cols = rows.shape(1);
    const quantkit::Kernel& kernel = kernel_of(set_of(set), type, n_rows, n_cols, importance, out);
    const float* w = importance ? importance->data() : nullptr;
    nb::gil_scoped_release release;
    kernel.quantize(rows.data(), out.data(), n_rows, n_cols, w);
}

static quantkit::Stored stored_of(const std::string& dtype) {
    using quantkit::Stored;
    if (dtype == "F8_E4M3") return Stored::E4M3;
    if (dtype == "BF16") return Stored::BF16;
    if (dtype == "F16") return Stored::F16;
    require(dtype == "F32", "quantize_rows: no such stored type");
    return Stored::F32;
}

static bool quantize_rows(const std::string& set, const std::string& type, const std::string& dtype,
                          In<uint8_t, 2> stored, size_t n_cols, bool round_bf16, In<uint64_t, 1> first_rows,
                          std::optional<In<float, 2>> scale, size_t block_rows, size_t block_cols,
                          std::optional<In<float, 1>> importance, double largest_weight, double largest_product,
                          Out<uint8_t, 2> out) {
    const size_t n_rows = stored.shape(0), n_runs = first_rows.shape(0);
    const quantkit::KernelSet& kernels = set_of(set);
    const quantkit::Kernel& kernel = kernel_of(kernels, type, n_rows, n_cols, importance, out);
    quantkit::StoredRows rows{stored_of(dtype), stored.data(), n_rows, n_cols, round_bf16, first_rows.data(), n_runs,
                              nullptr,          0,             1,      1};
    require(n_runs > 0, "quantize_rows: no runs");
    require(n_cols <= SIZE_MAX / 4 && stored.shape(1) == rows.row_bytes(),
            "quantize_rows: stored has not the bytes of the columns");
    if (rows.dtype == quantkit::Stored::E4M3) {
        require(scale.has_value(), "quantize_rows: no scales");
        require(block_rows > 0 && block_cols > 0, "quantize_rows: the blocks are empty");
        require(block_rows <= MAX_BLOCK && block_cols <= MAX_BLOCK, "quantize_rows: the blocks are too large");
        require(scale->shape(1) == blocks(n_cols, block_cols), "quantize_rows: scale has not a column for each block");
        const size_t longest = blocks(n_rows, n_runs);
        for (size_t run = 0; run < n_runs; ++run) {
            const uint64_t row = first_rows.data()[run];
            require(row <= SIZE_MAX - longest && blocks(row + n_rows / n_runs + (run < n_rows % n_runs), block_rows) <=
                                                     scale->shape(0),
                    "quantize_rows: scale has too few rows");
        }
        rows.scale = scale->data();
        rows.scale_stride = scale->shape(1);
        rows.block_rows = block_rows;
        rows.block_cols = block_cols;
    }
    const float* w = importance ? importance->data() : nullptr;
    nb::gil_scoped_release release;
    return quantkit::quantize(*kernels.rows, rows, kernel, w, {largest_weight, largest_product}, out.data());
}

static void set_codebook(const std::string& name, In<int8_t, 2> values) {
    quantkit::set_codebook(name.c_str(), values.data(), values.shape(0), values.shape(1));
}

// [(set, [types])] of the sets of error feedback that this processor can run, best first.
static nb::list feedback_sets() {
    nb::list out;
    size_t n = 0;
    const quantkit::FeedbackSet* sets = quantkit::feedback_sets(&n);
    for (size_t i = 0; i < n; ++i) {
        if (!sets[i].supported()) continue;
        nb::list types;
        for (size_t k = 0; k < sets[i].n_kernels; ++k) types.append(sets[i].kernels[k].type);
        out.append(nb::make_tuple(sets[i].name, types));
    }
    return out;
}

static const quantkit::FeedbackSet& feedback_set_of(const std::string& name) {
    const quantkit::FeedbackSet* set = quantkit::find_feedback_set(name.c_str());
    require(set != nullptr, "no such set of error feedback");
    return *set;
}

static bool feedback_quantize(const std::string& set, const std::string& type, In<float, 2> rows, In<float, 2> u,
                              In<float, 1> importance, bool search, Out<uint8_t, 2> out) {
    const size_t n_rows = rows.shape(0), n_cols = rows.shape(1);
    const quantkit::FeedbackSet& kernels = feedback_set_of(set);
    const quantkit::FeedbackKernel* kernel = quantkit::find_feedback_kernel(kernels, type.c_str());
    require(kernel != nullptr, "feedback_quantize: no such kernel");
    require(n_cols > 0 && n_cols % kernel->block == 0, "feedback_quantize: the columns do not divide into blocks");
    require(u.shape(0) == n_cols && u.shape(1) == n_cols, "feedback_quantize: u has not the shape of the columns");
    require(importance.shape(0) == n_cols, "feedback_quantize: not an importance for each column");
    require(out.shape(0) == n_rows && out.shape(1) == n_cols / kernel->block * kernel->block_bytes,
            "feedback_quantize: out has not the shape of the blocks");
    nb::gil_scoped_release release;
    return kernels.quantize(*kernel, {rows.data(), n_rows, n_cols, u.data(), importance.data()}, search, out.data());
}

static void feedback_pass_on(const std::string& set, Out<float, 2> x, size_t column, In<float, 2> values,
                             In<float, 2> u) {
    const size_t n_rows = x.shape(0), n_cols = x.shape(1), width = values.shape(1);
    const quantkit::FeedbackSet& kernels = feedback_set_of(set);
    require(values.shape(0) == n_rows, "feedback_pass_on: not values for each row");
    require(column <= n_cols && width <= n_cols - column, "feedback_pass_on: the values end past the columns");
    require(n_cols % 32 == 0 && column % 32 == 0 && width % 32 == 0, "feedback_pass_on: not multiples of 32 columns");
    require(u.shape(0) == n_cols && u.shape(1) == n_cols, "feedback_pass_on: u has not the shape of the columns");
    nb::gil_scoped_release release;
    kernels.pass_on(x.data(), n_rows, n_cols, column, width, values.data(), u.data());
}

// Returns the column at which h is not positive definite, or n.
static size_t feedback_factor(const std::string& set, In<float, 2> h, double damp, int exponent, Out<float, 2> u) {
    const size_t n = h.shape(0);
    const quantkit::FeedbackSet& kernels = feedback_set_of(set);
    require(n > 0 && h.shape(1) == n, "feedback_factor: h is not square");
    require(u.shape(0) == n && u.shape(1) == n, "feedback_factor: u has not the shape of h");
    nb::gil_scoped_release release;
    return kernels.factor(h.data(), n, damp, exponent, u.data());
}

static void feedback_products(const std::string& set, In<float, 2> w, In<float, 2> q, In<float, 2> h,
                              Out<double, 2> out) {
    const size_t n_rows = w.shape(0), n = w.shape(1);
    const quantkit::FeedbackSet& kernels = feedback_set_of(set);
    require(q.shape(0) == n_rows && q.shape(1) == n, "feedback_products: q has not the shape of w");
    require(h.shape(0) == n && h.shape(1) == n, "feedback_products: h has not the shape of the columns");
    require(out.shape(0) == n_rows && out.shape(1) == 2, "feedback_products: out has not two columns");
    nb::gil_scoped_release release;
    kernels.products(w.data(), q.data(), n_rows, n, h.data(), out.data());
}

NB_MODULE(_native, m) {
    m.doc() = "quantkit's compiled kernels; use quantkit.kernels";
    // noconvert: nanobind would copy an array of another type or order, and the results would be lost with the copy
    const auto array = [](const char* name) { return nb::arg(name).noconvert(); };
    m.def("e4m3_to_f32", &e4m3_to_f32, array("src"), array("scale"), "row0"_a, "block_rows"_a, "block_cols"_a,
          "round_bf16"_a, array("out"), "set"_a = "");
    m.def("bf16_to_f32", &bf16_to_f32, array("src"), array("out"), "set"_a = "");
    m.def("f16_to_f32", &f16_to_f32, array("src"), "round_bf16"_a, array("out"), "set"_a = "");
    m.def("f32_to_f32", &f32_to_f32, array("src"), "round_bf16"_a, array("out"), "set"_a = "");
    m.def("kernel_sets", &kernel_sets);
    m.def("quantize", &quantize, "set"_a, "type"_a, array("rows"), array("importance").none(), array("out"));
    m.def("quantize_rows", &quantize_rows, "set"_a, "type"_a, "dtype"_a, array("stored"), "n_cols"_a, "round_bf16"_a,
          array("first_rows"), array("scale").none(), "block_rows"_a, "block_cols"_a, array("importance").none(),
          "largest_weight"_a, "largest_product"_a, array("out"));
    m.def("set_codebook", &set_codebook, "name"_a, array("values"));
    m.def("feedback_sets", &feedback_sets);
    m.def("feedback_quantize", &feedback_quantize, "set"_a, "type"_a, array("rows"), array("u"), array("importance"),
          "search"_a, array("out"));
    m.def("feedback_pass_on", &feedback_pass_on, "set"_a, array("x"), "column"_a, array("values"), array("u"));
    m.def("feedback_factor", &feedback_factor, "set"_a, array("h"), "damp"_a, "exponent"_a, array("u"));
    m.def("feedback_products", &feedback_products, "set"_a, array("w"), array("q"), array("h"), array("out"));
    m.def("first_nonfinite", &first_nonfinite, array("x"), "set"_a = "");
}
