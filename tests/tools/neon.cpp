// The kernels without Python, for processors that are only emulated here: see tests/tools/neon.py, which writes the cases.
//
//   neon SET                     prints the set's types, one a line
//   neon SET CASES RESULTS       runs the cases of a file
//   neon SET CASES RESULTS fault the same, with one bit of the first result turned over
//
// CASES: records of a Head and what `run` reads behind it. RESULTS: what `run` writes, one after the other.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "codebooks.h"
#include "feedback.h"
#include "kernels.h"
#include "rows.h"

namespace {

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(3);
}

struct Head {
    char op[16], type[16], dtype[16];
    uint64_t n_rows, n_cols, has_importance;
    // of stored rows
    uint64_t round_bf16, n_runs, scale_rows, block_rows, block_cols;
    double largest_weight, largest_product;
};

std::vector<uint8_t> read_file(const char* path) {
    std::FILE* file = std::fopen(path, "rb");
    if (!file) fail(std::string("cannot read ") + path);
    std::vector<uint8_t> all;
    uint8_t some[1 << 16];
    for (size_t n; (n = std::fread(some, 1, sizeof some, file)) > 0;) all.insert(all.end(), some, some + n);
    std::fclose(file);
    return all;
}

// Copies, each aligned as its type wants, out of the cases.
class Reader {
public:
    explicit Reader(std::vector<uint8_t> data) : data_(std::move(data)) {}
    bool at_end() const { return at_ == data_.size(); }
    template <typename T>
    std::vector<T> next(size_t n) {
        if (n > (data_.size() - at_) / sizeof(T)) fail("the cases end too soon");
        std::vector<T> out(n);
        if (n) std::memcpy(out.data(), data_.data() + at_, n * sizeof(T));
        at_ += n * sizeof(T);
        return out;
    }

private:
    std::vector<uint8_t> data_;
    size_t at_ = 0;
};

// Room for a result, between bytes that must stay.
class Guarded {
public:
    explicit Guarded(size_t n) : n_(n), whole_(n + 2 * GUARD, 0xa5) {}
    uint8_t* out() { return whole_.data() + GUARD; }
    void check(const Head& head) const {
        for (size_t i = 0; i < GUARD; ++i)
            if (whole_[i] != 0xa5 || whole_[GUARD + n_ + i] != 0xa5)
                fail(std::string(head.op) + " " + head.type + ": wrote beside its output");
    }

private:
    static constexpr size_t GUARD = 128;
    size_t n_;
    std::vector<uint8_t> whole_;
};

class Results {
public:
    Results(const char* path, bool fault) : file_(std::fopen(path, "wb")), fault_(fault) {
        if (!file_) fail(std::string("cannot write ") + path);
    }
    void put(uint8_t* data, size_t n) {
        if (fault_ && n) data[n / 2] ^= 1;
        fault_ = fault_ && n == 0;
        if (std::fwrite(data, 1, n, file_) != n) fail("cannot write the results");
    }
    void put(uint64_t number) { put(reinterpret_cast<uint8_t*>(&number), sizeof number); }
    void close() {
        if (std::fclose(file_) != 0) fail("cannot write the results");
    }

private:
    std::FILE* file_;
    bool fault_;
};

quantkit::Stored stored_of(const std::string& dtype) {
    using quantkit::Stored;
    if (dtype == "F8_E4M3") return Stored::E4M3;
    if (dtype == "BF16") return Stored::BF16;
    if (dtype == "F16") return Stored::F16;
    if (dtype != "F32") fail("no stored type " + dtype);
    return Stored::F32;
}

// codebook: int8 values [n_rows, n_cols] -> nothing
// quantize: float rows, importance if it has one -> blocks
// feedback, feedback search: float rows, u [n_cols, n_cols], importance, by the set that `dtype` names -> blocks
// rows:     uint64 first rows, stored rows, float scales, importance if it has one
//           -> float rows, and the uint64 index of the first that is NaN or Inf, when there is no type;
//              else uint64 1 and the blocks when done, or uint64 0
void run(const Head& head, const quantkit::KernelSet& set, Reader& in, Results& results) {
    const std::string op = head.op;
    const size_t n = head.n_rows * head.n_cols;
    if (op == "codebook") {
        quantkit::set_codebook(head.type, in.next<int8_t>(n).data(), head.n_rows, head.n_cols);
        return;
    }
    if (op == "feedback" || op == "feedback search") {
        const quantkit::FeedbackSet* by = quantkit::find_feedback_set(head.dtype);
        const quantkit::FeedbackKernel* kernel = by ? quantkit::find_feedback_kernel(*by, head.type) : nullptr;
        if (!kernel) fail(std::string("no error feedback for ") + head.type + " by " + head.dtype);
        const std::vector<float> x = in.next<float>(n);
        const std::vector<float> u = in.next<float>(head.n_cols * head.n_cols);
        const std::vector<float> w = in.next<float>(head.n_cols);
        Guarded room(n / kernel->block * kernel->block_bytes);
        if (!by->quantize(*kernel, {x.data(), head.n_rows, head.n_cols, u.data(), w.data()}, op != "feedback", room.out()))
            fail(std::string("the errors of ") + head.type + " grew beyond float32");
        room.check(head);
        results.put(room.out(), n / kernel->block * kernel->block_bytes);
        return;
    }
    const quantkit::Kernel* kernel = *head.type ? quantkit::find_kernel(set, head.type) : nullptr;
    if (*head.type && !kernel) fail(std::string("no kernel for ") + head.type);
    const size_t out_bytes = kernel ? n / kernel->block * kernel->block_bytes : n * sizeof(float);
    Guarded room(out_bytes);
    if (op == "quantize") {
        if (!kernel) fail("quantize: no type");
        const std::vector<float> x = in.next<float>(n);
        const std::vector<float> w = in.next<float>(head.has_importance ? head.n_cols : 0);
        kernel->quantize(x.data(), room.out(), head.n_rows, head.n_cols, head.has_importance ? w.data() : nullptr);
        room.check(head);
        results.put(room.out(), out_bytes);
        return;
    }
    if (op != "rows") fail("no such case: " + op);
    quantkit::StoredRows rows{};
    rows.dtype = stored_of(head.dtype);
    rows.n_rows = head.n_rows;
    rows.n_cols = head.n_cols;
    rows.round_bf16 = head.round_bf16 != 0;
    rows.n_runs = head.n_runs;
    rows.block_rows = head.block_rows;
    rows.block_cols = head.block_cols;
    rows.scale_stride = (head.n_cols + head.block_cols - 1) / head.block_cols;
    const std::vector<uint64_t> first_rows = in.next<uint64_t>(head.n_runs);
    const std::vector<uint8_t> stored = in.next<uint8_t>(head.n_rows * rows.row_bytes());
    const std::vector<float> scale = in.next<float>(head.scale_rows * rows.scale_stride);
    const std::vector<float> w = in.next<float>(head.has_importance ? head.n_cols : 0);
    rows.first_rows = first_rows.data();
    rows.data = stored.data();
    rows.scale = scale.data();
    if (kernel) {
        const bool done = quantkit::quantize(*set.rows, rows, *kernel, head.has_importance ? w.data() : nullptr,
                                             {head.largest_weight, head.largest_product}, room.out());
        room.check(head);
        results.put(done ? 1 : 0);
        if (done) results.put(room.out(), out_bytes);
        return;
    }
    std::vector<float> x(n);
    quantkit::decode(*set.rows, rows, x.data());
    results.put(reinterpret_cast<uint8_t*>(x.data()), out_bytes);
    results.put(quantkit::first_nonfinite(*set.rows, x.data(), n));
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2 && argc != 4 && argc != 5) fail("neon SET [CASES RESULTS [fault]]");
    const quantkit::KernelSet* set = quantkit::find_set(argv[1]);
    if (!set) fail(std::string("no kernels ") + argv[1]);
    if (argc == 2) {
        for (size_t k = 0; k < set->n_kernels; ++k) std::puts(set->kernels[k].type);
        return 0;
    }
    Reader in(read_file(argv[2]));
    Results results(argv[3], argc == 5 && std::strcmp(argv[4], "fault") == 0);
    while (!in.at_end()) run(in.next<Head>(1)[0], *set, in, results);
    results.close();
    return 0;
}
