// The table of one instruction set: compiled once for each, with its flags and its name in QK_ISA.
#include "kernels.h"
#include "tables.h"

namespace quantkit::QK_ISA {

extern const Kernel KERNELS[] = {
    {"Q2_K", 256, 84, quantize_q2_k},   {"Q3_K", 256, 110, quantize_q3_k}, {"Q4_K", 256, 144, quantize_q4_k},
    {"Q5_K", 256, 176, quantize_q5_k}, {"Q6_K", 256, 210, quantize_q6_k},
    {"IQ1_S", 256, 50, quantize_iq1_s}, {"IQ1_M", 256, 56, quantize_iq1_m},
};
extern const size_t N_KERNELS = sizeof KERNELS / sizeof *KERNELS;

}  // namespace quantkit::QK_ISA
