// What the object files of each instruction set contribute to its table (isa.cpp).
#pragma once
#include <cstddef>
#include <cstdint>

namespace quantkit::QK_ISA {

#define QK_DECLARE(NAME) void quantize_##NAME(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w)
QK_DECLARE(f32);
QK_DECLARE(f16);
QK_DECLARE(bf16);
QK_DECLARE(iq1_m);
QK_DECLARE(iq1_s);
QK_DECLARE(q2_k);
QK_DECLARE(q3_k);
QK_DECLARE(q4_k);
QK_DECLARE(q5_k);
QK_DECLARE(q6_k);
QK_DECLARE(q8_0);
QK_DECLARE(q4_0);
QK_DECLARE(q4_1);
QK_DECLARE(q5_0);
QK_DECLARE(q5_1);
QK_DECLARE(iq4_nl);
QK_DECLARE(iq4_xs);
QK_DECLARE(iq2_xxs);
QK_DECLARE(iq2_xs);
QK_DECLARE(iq2_s);
QK_DECLARE(iq3_xxs);
QK_DECLARE(iq3_s);
#undef QK_DECLARE

}  // namespace quantkit::QK_ISA
