// How ggml chooses the scales and minima of K types with importance, LANES super-blocks at once: first for each group,
// then in steps of the super-block's scale and minimum. Shared by k_quants.cpp and error feedback.
#pragma once
#include "k_search.h"

namespace quantkit::QK_ISA {

namespace {

constexpr int QK_K = 256;
constexpr int SIDE = 4;  // groups searched side by side

// Turns the importance of N values into weights: w = w * sqrt(sigma2 + x*x). Returns their sum.
template <int N>
QK_INLINE F weigh(const F* x, F* w, F sigma2) {
    F sum{};
    for (int k = 0; k < N; ++k) {
        w[k] = w[k] * sqrt_of(sigma2 + x[k] * x[k]);
        sum += w[k];
    }
    return sum;
}

// Loads a tile's importance into w; returns the sum of squares of x, whose long chain of additions runs alongside.
QK_INLINE F load_importance(const float* const* ws, F* w, const F* x) {
    F sum{};
    for (int j = 0; j < QK_K; j += 16) {
        load_lanes<16>(ws, w + j, j);
        for (int k = j; k < j + 16; ++k) sum += x[k] * x[k];
    }
    return sum;
}

// ---------------------------------------------------------------- Q4_K, Q5_K

// With importance: make_qkx3 searches, then make_qp for scales and minima.
template <int NMAX>
QK_INLINE void search_k45_weighted(const F* x, F* w, F sum_x2, Affine* found, I* ls, I* lm, F* d, F* dm) {
    F sw[8], scales[8], mins[8];
    for (int j = 0; j < 8; ++j) sw[j] = weigh<32>(x + 32 * j, w + 32 * j, 2.0f * sum_x2 / 256.0f);
    for (int j = 0; j < 8; j += SIDE)
        search_affine<32, NMAX, true, false, SIDE>(x + 32 * j, w + 32 * j, -0.9f, 0.05f, 36, found + j);
    for (int j = 0; j < 8; ++j) scales[j] = found[j].scale, mins[j] = found[j].minimum;
    *d = search_positive<8, 63>(scales, ls, sw);
    *dm = search_positive<8, 63>(mins, lm, sw);
    if constexpr (NMAX == 31)
        for (int j = 0; j < 8; ++j) ls[j] = min_of(splat(63), ls[j]), lm[j] = min_of(splat(63), lm[j]);
}

// ---------------------------------------------------------------- Q2_K

// make_qkx3 searches, then make_qp for scales and minima.
QK_INLINE void search_q2_k_weighted(const F* x, F* w, F sum_x2, Affine* found, I* ls, I* lm, F* d, F* dm) {
    F sw[16], scales[16], mins[16];
    for (int j = 0; j < 16; ++j) sw[j] = weigh<16>(x + 16 * j, w + 16 * j, sum_x2 / 256.0f);
    for (int j = 0; j < 16; j += SIDE)
        search_affine<16, 3, true, false, SIDE>(x + 16 * j, w + 16 * j, -0.9f, 0.05f, 36, found + j);
    for (int j = 0; j < 16; ++j) scales[j] = found[j].scale, mins[j] = found[j].minimum;
    *d = search_positive<16, 15>(scales, ls, sw);
    *dm = search_positive<16, 15>(mins, lm, sw);
}

// ---------------------------------------------------------------- Q3_K

QK_INLINE void search_q3_k_weighted(const F* x, F* w, F sum_x2, Symmetric* found, F* scales, I* ls, F* d) {
    F sw[16];
    for (int j = 0; j < 16; ++j) {
        sw[j] = weigh<16>(x + 16 * j, w + 16 * j, 2.0f * sum_x2 / 256.0f);
        found[j] = search_symmetric<16, 4, true>(x + 16 * j, w + 16 * j);
        scales[j] = found[j].scale;
    }
    const Symmetric block = all_finite<16>(scales) ? search_symmetric<16, 32, true>(scales, sw)
                                                   : search_symmetric<16, 32, true, false>(scales, sw);
    for (int j = 0; j < 16; ++j) ls[j] = levels_of<32>(block, scales[j]);
    *d = block.scale;
}

// ---------------------------------------------------------------- Q6_K

// Finds the scales of the groups, and the largest one by magnitude; w is read only with WEIGHTS.
template <bool WEIGHTS>
QK_INLINE void search_q6_k(const F* x, const F* w, Symmetric* found, F* scales, F* amax, F* max_scale) {
    F most{}, signed_most{};
    for (int j = 0; j < 16; ++j) {
        found[j] = search_symmetric<16, 32, WEIGHTS>(x + 16 * j, WEIGHTS ? w + 16 * j : nullptr);
        scales[j] = found[j].scale;
        const F a = abs_of(scales[j]);
        const I more = I(a > most);
        most = select(more, a, most);
        signed_most = select(more, scales[j], signed_most);
    }
    *amax = most;
    *max_scale = signed_most;
}

}  // namespace

}  // namespace quantkit::QK_ISA
