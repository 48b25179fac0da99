// One instruction set's table of error feedback: compiled once for each, with its flags and its name in QK_ISA.
#include "feedback_tables.h"

namespace quantkit::QK_ISA {

constexpr size_t U_256 = 256 * 256 * sizeof(float), U_32 = 32 * 32 * sizeof(float);

extern const FeedbackKernel FEEDBACK_KERNELS[] = {
    {"Q2_K", 256, 84, U_256, feedback_transpose_256, feedback_q2_k},
    {"Q3_K", 256, 110, U_256, feedback_transpose_256, feedback_q3_k},
    {"Q4_K", 256, 144, U_256, feedback_transpose_256, feedback_q4_k},
    {"Q5_K", 256, 176, U_256, feedback_transpose_256, feedback_q5_k},
    {"Q6_K", 256, 210, U_256, feedback_transpose_256, feedback_q6_k},
    {"IQ4_XS", 256, 136, U_256, feedback_transpose_256, feedback_iq4_xs},
    {"IQ4_NL", 32, 18, U_32, feedback_transpose_32, feedback_iq4_nl},
    {"Q4_0", 32, 18, U_32, feedback_transpose_32, feedback_q4_0},
    {"Q4_1", 32, 20, U_32, feedback_transpose_32, feedback_q4_1},
    {"Q5_0", 32, 22, U_32, feedback_transpose_32, feedback_q5_0},
    {"Q5_1", 32, 24, U_32, feedback_transpose_32, feedback_q5_1},
    {"Q8_0", 32, 34, U_32, feedback_transpose_32, feedback_q8_0},
    {"IQ1_S", 256, 50, FEEDBACK_IQ1_BYTES, feedback_iq1_prepare, feedback_iq1_s},
    {"IQ1_M", 256, 56, FEEDBACK_IQ1_BYTES, feedback_iq1_prepare, feedback_iq1_m},
    {"IQ2_XXS", 256, 66, 0, nullptr, feedback_iq2_xxs},
    {"IQ2_XS", 256, 74, 0, nullptr, feedback_iq2_xs},
    {"IQ2_S", 256, 82, 0, nullptr, feedback_iq2_s},
    {"IQ3_XXS", 256, 98, 0, nullptr, feedback_iq3_xxs},
    {"IQ3_S", 256, 110, 0, nullptr, feedback_iq3_s},
};
extern const size_t N_FEEDBACK_KERNELS = sizeof FEEDBACK_KERNELS / sizeof *FEEDBACK_KERNELS;

#define QK_STRING_OF(X) #X
#define QK_STRING(X) QK_STRING_OF(X)

extern FeedbackSet feedback_set(bool (*supported)()) {
    return {QK_STRING(QK_ISA),  supported,        FEEDBACK_KERNELS, N_FEEDBACK_KERNELS,
            feedback_quantize, feedback_pass_on, feedback_factor,  feedback_products};
}

}  // namespace quantkit::QK_ISA
