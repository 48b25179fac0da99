// What each instruction set's object files offer to its table (isa.cpp).
#pragma once
#include <cstddef>
#include <cstdint>

namespace quantkit::QK_ISA {

#define QK_DECLARE(NAME) void quantize_##NAME(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w)
QK_DECLARE(iq1_m);
QK_DECLARE(iq1_s);
QK_DECLARE(q2_k);
QK_DECLARE(q3_k);
QK_DECLARE(q4_k);
QK_DECLARE(q5_k);
QK_DECLARE(q6_k);
#undef QK_DECLARE

}  // namespace quantkit::QK_ISA
