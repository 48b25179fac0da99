// Python's view of the kernels: checks shapes, releases the GIL, calls. quantkit/kernels.py is its only importer.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "codebooks.h"
#include "kernels.h"
#include "rows.h"

namespace nb = nanobind;
using namespace nb::literals;

template <typename T, int N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <typename T, int N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

// more than any matrix has rows or columns, and small enough that sums of two cannot wrap
static constexpr size_t MAX_BLOCK = size_t{1} << 31;

static void require(bool ok, const char* what) {
    if (!ok) throw nb::value_error(what);
}

static size_t blocks(size_t n, size_t block) { return n / block + (n % block != 0); }

static void e4m3_to_f32(In<uint8_t, 2> src, In<float, 2> scale, size_t row0, size_t block_rows, size_t block_cols,
                        bool round_bf16, Out<float, 2> out) {
    const size_t n_rows = src.shape(0), n_cols = src.shape(1);
    require(block_rows > 0 && block_cols > 0, "e4m3_to_f32: the blocks are empty");
    require(block_rows <= MAX_BLOCK && block_cols <= MAX_BLOCK, "e4m3_to_f32: the blocks are too large");
    require(out.shape(0) == n_rows && out.shape(1) == n_cols, "e4m3_to_f32: out has not the shape of src");
    require(scale.shape(1) == blocks(n_cols, block_cols), "e4m3_to_f32: scale has not a column for each block");
    require(row0 <= SIZE_MAX - n_rows && blocks(row0 + n_rows, block_rows) <= scale.shape(0),
            "e4m3_to_f32: scale has too few rows");
    nb::gil_scoped_release release;
    quantkit::e4m3_to_f32(src.data(), n_rows, n_cols, n_cols, scale.data(), scale.shape(1), row0, block_rows,
                          block_cols, round_bf16, out.data());
}

static void bf16_to_f32(In<uint16_t, 1> src, Out<float, 1> out) {
    require(out.shape(0) == src.shape(0), "bf16_to_f32: out has not the length of src");
    nb::gil_scoped_release release;
    quantkit::bf16_to_f32(src.data(), src.shape(0), out.data());
}

static void f16_to_f32(In<uint16_t, 1> src, bool round_bf16, Out<float, 1> out) {
    require(out.shape(0) == src.shape(0), "f16_to_f32: out has not the length of src");
    nb::gil_scoped_release release;
    quantkit::f16_to_f32(src.data(), src.shape(0), round_bf16, out.data());
}

static void f32_to_f32(In<float, 1> src, bool round_bf16, Out<float, 1> out) {
    require(out.shape(0) == src.shape(0), "f32_to_f32: out has not the length of src");
    nb::gil_scoped_release release;
    quantkit::f32_to_f32(src.data(), src.shape(0), round_bf16, out.data());
}

static size_t first_nonfinite(In<float, 1> x) {
    nb::gil_scoped_release release;
    return quantkit::first_nonfinite(x.data(), x.shape(0));
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

static void quantize(const std::string& set, const std::string& type, In<float, 2> rows,
                     std::optional<In<float, 1>> importance, Out<uint8_t, 2> out) {
    size_t n = 0;
    const quantkit::KernelSet* sets = quantkit::kernel_sets(&n);
    for (size_t i = 0; i < n; ++i) {
        if (set != sets[i].name || !sets[i].supported()) continue;
        for (size_t k = 0; k < sets[i].n_kernels; ++k) {
            const quantkit::Kernel& kernel = sets[i].kernels[k];
            if (type != kernel.type) continue;
            const size_t n_rows = rows.shape(0), n_cols = rows.shape(1);
            require(n_cols > 0 && n_cols % kernel.block == 0, "quantize: the columns do not divide into blocks");
            require(out.shape(0) == n_rows && out.shape(1) == n_cols / kernel.block * kernel.block_bytes,
                    "quantize: out has not the shape of the blocks");
            require(!importance || importance->shape(0) == n_cols, "quantize: not an importance for each column");
            const float* w = importance ? importance->data() : nullptr;
            nb::gil_scoped_release release;
            kernel.quantize(rows.data(), out.data(), n_rows, n_cols, w);
            return;
        }
    }
    throw nb::value_error("quantize: no such kernel");
}

static void set_codebook(const std::string& name, In<int8_t, 2> values) {
    quantkit::set_codebook(name.c_str(), values.data(), values.shape(0), values.shape(1));
}

NB_MODULE(_native, m) {
    m.doc() = "quantkit's compiled kernels; use quantkit.kernels";
    // noconvert: nanobind would copy an array of another type or order, and the results would go to the copy
    const auto array = [](const char* name) { return nb::arg(name).noconvert(); };
    m.def("e4m3_to_f32", &e4m3_to_f32, array("src"), array("scale"), "row0"_a, "block_rows"_a, "block_cols"_a,
          "round_bf16"_a, array("out"));
    m.def("bf16_to_f32", &bf16_to_f32, array("src"), array("out"));
    m.def("f16_to_f32", &f16_to_f32, array("src"), "round_bf16"_a, array("out"));
    m.def("f32_to_f32", &f32_to_f32, array("src"), "round_bf16"_a, array("out"));
    m.def("kernel_sets", &kernel_sets);
    m.def("quantize", &quantize, "set"_a, "type"_a, array("rows"), array("importance").none(), array("out"));
    m.def("set_codebook", &set_codebook, "name"_a, array("values"));
    m.def("first_nonfinite", &first_nonfinite, array("x"));
}
