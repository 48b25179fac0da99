// Multiply and add with one rounding, lane by lane, for what error feedback makes of sums of products: twice as fast as
// two operations, and every set of instructions has it or a function that gives the same.
#pragma once
#include "lanes.h"

namespace quantkit::QK_ISA {

typedef double D __attribute__((vector_size(LANES * 4)));

#if defined(__AVX512F__)
QK_INLINE F plus_product(F c, F a, F b) {
    return reinterpret_cast<F>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
}
QK_INLINE F minus_product(F c, F a, F b) {
    return reinterpret_cast<F>(
        _mm512_fnmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
}
QK_INLINE D minus_product(D c, D a, D b) {
    return reinterpret_cast<D>(
        _mm512_fnmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
}
#elif defined(__FMA__)
QK_INLINE F plus_product(F c, F a, F b) {
    return reinterpret_cast<F>(
        _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
}
QK_INLINE F minus_product(F c, F a, F b) {
    return reinterpret_cast<F>(
        _mm256_fnmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
}
QK_INLINE D minus_product(D c, D a, D b) {
    return reinterpret_cast<D>(
        _mm256_fnmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
}
#elif defined(__aarch64__)
QK_INLINE F plus_product(F c, F a, F b) {
    float32x4_t u[2], v[2], w[2];
    std::memcpy(u, &a, sizeof a);
    std::memcpy(v, &b, sizeof b);
    std::memcpy(w, &c, sizeof c);
    for (int i = 0; i < 2; ++i) w[i] = vfmaq_f32(w[i], u[i], v[i]);
    std::memcpy(&c, w, sizeof c);
    return c;
}
QK_INLINE F minus_product(F c, F a, F b) { return plus_product(c, -a, b); }
QK_INLINE D minus_product(D c, D a, D b) {
    float64x2_t u[2], v[2], w[2];
    std::memcpy(u, &a, sizeof a);
    std::memcpy(v, &b, sizeof b);
    std::memcpy(w, &c, sizeof c);
    for (int i = 0; i < 2; ++i) w[i] = vfmsq_f64(w[i], u[i], v[i]);
    std::memcpy(&c, w, sizeof c);
    return c;
}
#else
QK_INLINE F plus_product(F c, F a, F b) {
    for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
QK_INLINE F minus_product(F c, F a, F b) { return plus_product(c, -a, b); }
QK_INLINE D minus_product(D c, D a, D b) {
    for (int i = 0; i < LANES / 2; ++i) c[i] = __builtin_fma(-a[i], b[i], c[i]);
    return c;
}
#endif

}  // namespace quantkit::QK_ISA
