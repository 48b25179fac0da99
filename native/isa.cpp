// The table of one instruction set: compiled once for each, with its compiler flags and its name in QK_ISA.
#include "kernels.h"
#include "tables.h"

namespace quantkit::QK_ISA {

extern const Kernel KERNELS[] = {
    {"F32", 1, 4, quantize_f32},
    {"F16", 1, 2, quantize_f16},
    {"BF16", 1, 2, quantize_bf16},
    {"Q4_0", 32, 18, quantize_q4_0},
    {"Q4_1", 32, 20, quantize_q4_1},
    {"Q5_0", 32, 22, quantize_q5_0},
    {"Q5_1", 32, 24, quantize_q5_1},
    {"Q8_0", 32, 34, quantize_q8_0},
    {"Q2_K", 256, 84, quantize_q2_k},
    {"Q3_K", 256, 110, quantize_q3_k},
    {"Q4_K", 256, 144, quantize_q4_k},
    {"Q5_K", 256, 176, quantize_q5_k},
    {"Q6_K", 256, 210, quantize_q6_k},
    {"IQ1_S", 256, 50, quantize_iq1_s},
    {"IQ1_M", 256, 56, quantize_iq1_m},
    {"IQ2_XXS", 256, 66, quantize_iq2_xxs},
    {"IQ2_XS", 256, 74, quantize_iq2_xs},
    {"IQ2_S", 256, 82, quantize_iq2_s},
    {"IQ3_XXS", 256, 98, quantize_iq3_xxs},
    {"IQ3_S", 256, 110, quantize_iq3_s},
    {"IQ4_NL", 32, 18, quantize_iq4_nl},
    {"IQ4_XS", 256, 136, quantize_iq4_xs},
};
extern const size_t N_KERNELS = sizeof KERNELS / sizeof *KERNELS;

}  // namespace quantkit::QK_ISA
