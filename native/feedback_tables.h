// What each instruction set's object files offer to its table of error feedback (feedback_isa.cpp).
#pragma once
#include "feedback.h"

namespace quantkit::QK_ISA {

// feedback.cpp
bool feedback_quantize(const FeedbackKernel& kernel, const FeedbackMatrix& matrix, bool search, uint8_t* y);
void feedback_pass_on(float* x, size_t n_rows, size_t n_cols, size_t c, size_t width, const float* v, const float* u);
// feedback_factor.cpp
size_t feedback_factor(const float* h, size_t n, double damp, int exponent, float* u);
void feedback_products(const float* w, const float* q, size_t n_rows, size_t n, const float* h, double* out);

// for kernels that read U by columns (feedback_lanes.h): of 256 columns, and of 32
void feedback_transpose_256(const FeedbackBlock& block, void* prepared);
void feedback_transpose_32(const FeedbackBlock& block, void* prepared);

#define QK_DECLARE(NAME) void feedback_##NAME(const FeedbackRows& rows, const FeedbackBlock& block, bool search)
QK_DECLARE(q2_k);
QK_DECLARE(q3_k);
QK_DECLARE(q4_k);
QK_DECLARE(q5_k);
QK_DECLARE(q6_k);
QK_DECLARE(iq4_xs);
QK_DECLARE(q4_0);
QK_DECLARE(q4_1);
QK_DECLARE(q5_0);
QK_DECLARE(q5_1);
QK_DECLARE(q8_0);
QK_DECLARE(iq4_nl);
QK_DECLARE(iq1_s);
QK_DECLARE(iq1_m);
QK_DECLARE(iq2_xxs);
QK_DECLARE(iq2_xs);
QK_DECLARE(iq2_s);
QK_DECLARE(iq3_xxs);
QK_DECLARE(iq3_s);
#undef QK_DECLARE
// feedback_iq1.cpp: what both types have prepared
constexpr size_t FEEDBACK_IQ1_BYTES = 32 * 2 * 2320 * sizeof(float);
void feedback_iq1_prepare(const FeedbackBlock& block, void* prepared);

}  // namespace quantkit::QK_ISA
