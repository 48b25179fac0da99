// Error feedback within a block, LANES rows at once, one a lane: a group of columns under some scales, and what the
// columns after it lose. `t` is the block's part of U transposed: t[j * BLOCK + i] = U[i][j].
#pragma once
#include "feedback.h"
#include "fused.h"

namespace quantkit::QK_ISA {

namespace {

// not inlined: compiled once, however often it is called
#define QK_ONCE __attribute__((noinline))

template <int BLOCK>
void transpose_u(const FeedbackBlock& block, void* prepared) {
    float* t = static_cast<float*>(prepared);
    for (int j = 0; j < BLOCK; ++j)
        for (int i = 0; i < BLOCK; ++i) t[j * BLOCK + i] = i <= j ? block.u[i * block.stride + j] : 0.0f;
}

// What a group of N columns became.
template <int N>
struct Rounded {
    F level[N];  // as Round has it
    F e[N];
    F loss;  // sum of e^2
};

// Rounds N columns x, the first of which is column `first` of the block, one after the other, for C ways to round side
// by side: round[c](x, &level) gives the value.
template <int BLOCK, int N, int C, typename Round>
QK_ONCE void feed(const F* x, const float* t, const float* reciprocal, int first, const Round* round,
                    Rounded<N>* out) {
    constexpr int SIDE = C <= 2 ? LANES / 2 : LANES / 4;  // columns side by side, so that sums need not wait
    t += first * BLOCK + first;
    reciprocal += first;
    for (int c = 0; c < C; ++c) out[c].loss = F{};
    for (int j = 0; j < N; j += SIDE, t += SIDE * BLOCK) {
        F now[SIDE][C];
        for (int s = 0; s < SIDE; ++s)
            for (int c = 0; c < C; ++c) now[s][c] = x[j + s];
        for (int k = 0; k < j; ++k) {
#pragma GCC unroll 8
            for (int s = 0; s < SIDE; ++s) {
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) now[s][c] = minus_product(now[s][c], out[c].e[k], splat(t[s * BLOCK + k]));
            }
        }
#pragma GCC unroll 8
        for (int s = 0; s < SIDE; ++s) {
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) {
                const F e = (now[s][c] - round[c](now[s][c], &out[c].level[j + s])) * reciprocal[j + s];
                out[c].e[j + s] = e;
                out[c].loss = plus_product(out[c].loss, e, e);
#pragma GCC unroll 8
                for (int l = s + 1; l < SIDE; ++l)
                    now[l][c] = minus_product(now[l][c], e, splat(t[l * BLOCK + j + s]));
            }
        }
    }
}

// What the columns of the block after a group of N lose by its errors.
template <int BLOCK, int N>
QK_ONCE void pass_on(F* x, const float* t, int first, const F* e) {
    constexpr int SIDE = 8;  // columns side by side
    for (int j = first + N; j < BLOCK; j += SIDE) {
        F sum[SIDE];
        const float* u = t + j * BLOCK + first;
        for (int s = 0; s < SIDE; ++s) sum[s] = x[j + s];
        for (int k = 0; k < N; ++k) {
            const F ek = e[k];
            for (int s = 0; s < SIDE; ++s) sum[s] = minus_product(sum[s], ek, splat(u[s * BLOCK + k]));
        }
        for (int s = 0; s < SIDE; ++s) x[j + s] = sum[s];
    }
}

// Levels 0..NMAX of `scale` each, and `minimum` below.
template <int NMAX>
struct AffineRound {
    F scale, inverse, minimum;

    QK_INLINE void set(F s, F m) {
        scale = s;
        inverse = select(I(s == 0.0f), F{}, 1.0f / s);
        minimum = m;
    }
    QK_INLINE F operator()(F x, F* level) const {
        constexpr float MAGIC = 12582912.0f;
        const F l = min_of(max_of(inverse * (x + minimum), F{}), splat(static_cast<float>(NMAX)));
        *level = (l + MAGIC) - MAGIC;
        return scale * *level - minimum;
    }
};

// Levels -NMAX..NMAX - 1 of `scale` each.
template <int NMAX>
struct SymmetricRound {
    F scale, inverse;

    QK_INLINE void set(F s, F) {
        scale = s;
        inverse = select(I(s == 0.0f), F{}, 1.0f / s);
    }
    QK_INLINE F operator()(F x, F* level) const {
        constexpr float MAGIC = 12582912.0f, LOW = -NMAX, HIGH = NMAX - 1;
        const F l = min_of(max_of(inverse * x, splat(LOW)), splat(HIGH));
        *level = (l + MAGIC) - MAGIC;
        return scale * *level;
    }
};

// The lanes of some rows of a block: past the end they repeat the last row and write to a scratch place.
template <int BLOCK, int BYTES, typename Tile>
QK_INLINE void for_each_lanes(const FeedbackRows& rows, Tile tile) {
    alignas(64) uint8_t spare[BYTES];
    alignas(64) float spare_e[BLOCK];
    for (size_t i = 0; i < rows.n; i += LANES) {
        const float* x[LANES];
        uint8_t* y[LANES];
        uint8_t* e[LANES];
        float mean_square[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            const bool real = i + lane < rows.n;
            const size_t at = real ? i + lane : rows.n - 1;
            x[lane] = rows.x[at];
            y[lane] = real ? rows.y[at] : spare;
            e[lane] = reinterpret_cast<uint8_t*>(real ? rows.e[at] : spare_e);
            mean_square[lane] = rows.mean_square[at];
        }
        F mean;
        std::memcpy(&mean, mean_square, sizeof mean);
        alignas(64) F v[BLOCK];
        load_lanes<BLOCK>(x, v);
        alignas(64) F errors[BLOCK];
        tile(v, mean, errors, y);
        store_lanes<BLOCK>(reinterpret_cast<const I*>(errors), e, 0);
    }
}

}  // namespace

}  // namespace quantkit::QK_ISA
