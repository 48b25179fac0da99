// Which kernel sets this build has, and which of them this processor can run. Compiled for the lowest processor:
// nothing here may need an instruction set that has not been asked for.
#include "kernels.h"

namespace quantkit {

#define QK_SET(ISA)                     \
    namespace ISA {                     \
    extern const Kernel KERNELS[];      \
    extern const size_t N_KERNELS;      \
    }
#if defined(__x86_64__)
QK_SET(avx512)
QK_SET(avx2)
#elif defined(__aarch64__)
QK_SET(neon)
#endif
#undef QK_SET

#if defined(__x86_64__)
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#elif defined(__aarch64__)
static bool always() { return true; }
#endif

const KernelSet* kernel_sets(size_t* n) {
#if defined(__x86_64__)
    static const KernelSet sets[] = {
        {"avx512", has_avx512, avx512::KERNELS, avx512::N_KERNELS},
        {"avx2", has_avx2, avx2::KERNELS, avx2::N_KERNELS},
    };
    *n = 2;
    return sets;
#elif defined(__aarch64__)
    static const KernelSet sets[] = {{"neon", always, neon::KERNELS, neon::N_KERNELS}};
    *n = 1;
    return sets;
#else
    *n = 0;
    return nullptr;
#endif
}

}  // namespace quantkit
