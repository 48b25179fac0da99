// Which kernel sets this build has, and which of them this processor can run. Compiled for the lowest processor:
// nothing here may need an instruction set whose presence was not checked.
#include "kernels.h"

#include <cstring>

#include "feedback.h"
#include "rows.h"

namespace quantkit {

#define QK_SET(ISA)                     \
    namespace ISA {                     \
    extern const Kernel KERNELS[];      \
    extern const size_t N_KERNELS;      \
    extern const RowKernels ROWS;       \
    extern FeedbackSet feedback_set(bool (*supported)()); \
    }
#if defined(__x86_64__)
QK_SET(avx512)
QK_SET(avx2)
#elif defined(__aarch64__)
QK_SET(neon)
#endif
#undef QK_SET
namespace plain {
extern FeedbackSet feedback_set(bool (*supported)());
}

#if defined(__x86_64__)
static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
static bool always() { return true; }

const KernelSet* kernel_sets(size_t* n) {
#if defined(__x86_64__)
    static const KernelSet sets[] = {
        {"avx512", has_avx512, avx512::KERNELS, avx512::N_KERNELS, &avx512::ROWS},
        {"avx2", has_avx2, avx2::KERNELS, avx2::N_KERNELS, &avx2::ROWS},
    };
    *n = 2;
    return sets;
#elif defined(__aarch64__)
    static const KernelSet sets[] = {{"neon", always, neon::KERNELS, neon::N_KERNELS, &neon::ROWS}};
    *n = 1;
    return sets;
#else
    *n = 0;
    return nullptr;
#endif
}

const KernelSet* find_set(const char* name) {
    size_t n = 0;
    const KernelSet* sets = kernel_sets(&n);
    for (size_t i = 0; i < n; ++i)
        if (std::strcmp(name, sets[i].name) == 0 && sets[i].supported()) return &sets[i];
    return nullptr;
}

const Kernel* find_kernel(const KernelSet& set, const char* type) {
    for (size_t k = 0; k < set.n_kernels; ++k)
        if (std::strcmp(type, set.kernels[k].type) == 0) return &set.kernels[k];
    return nullptr;
}

const FeedbackSet* feedback_sets(size_t* n) {
    static const FeedbackSet sets[] = {
#if defined(__x86_64__)
        avx512::feedback_set(has_avx512),
        avx2::feedback_set(has_avx2),
#elif defined(__aarch64__)
        neon::feedback_set(always),
#endif
        plain::feedback_set(always),
    };
    *n = sizeof sets / sizeof *sets;
    return sets;
}

const FeedbackSet* find_feedback_set(const char* name) {
    size_t n = 0;
    const FeedbackSet* sets = feedback_sets(&n);
    for (size_t i = 0; i < n; ++i)
        if (std::strcmp(name, sets[i].name) == 0 && sets[i].supported()) return &sets[i];
    return nullptr;
}

const FeedbackKernel* find_feedback_kernel(const FeedbackSet& set, const char* type) {
    for (size_t k = 0; k < set.n_kernels; ++k)
        if (std::strcmp(type, set.kernels[k].type) == 0) return &set.kernels[k];
    return nullptr;
}

const RowKernels& best_rows() {
    static const RowKernels& best = []() -> const RowKernels& {
        size_t n = 0;
        const KernelSet* sets = kernel_sets(&n);
        for (size_t i = 0; i < n; ++i)
            if (sets[i].supported()) return *sets[i].rows;
        return PLAIN_ROWS;
    }();
    return best;
}

}  // namespace quantkit
