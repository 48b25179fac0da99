// Error feedback for the types of 32 values a block: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (layouts: legacy.cpp) and IQ4_NL
// (iq4.cpp).
//
// Plain: ggml's scale (and minimum) of the current weights, then the levels, column by column. With search: the scale
// times each of a few factors, then around the best of them, then the minimum a part of a step up and down; the least
// sum of e^2 is kept.
#include "blocks32.h"
#include "feedback_lanes.h"
#include "feedback_tables.h"
#include "iq4_round.h"
#include "k_search.h"

namespace quantkit::QK_ISA {

namespace {

constexpr int BLOCK = 32;

struct Found {
    F scale, minimum;
};

template <int NMAX, bool FIVE>
struct Symmetric32 {
    static constexpr int BYTES = FIVE ? 22 : 18;
    static constexpr bool MINIMUM = false;
    typedef SymmetricRound<NMAX> Round;

    static QK_INLINE Found find(const Round&, const F* x, const F* w) {
        return {search_symmetric<BLOCK, NMAX, true>(x, w).scale, F{}};
    }
    static QK_INLINE void store(I scale, I, const F* level, uint8_t* const* y) {
        I l[BLOCK];
        for (int j = 0; j < BLOCK; ++j) l[j] = __builtin_convertvector(level[j] + static_cast<float>(NMAX), I);
        store_blocks32<2, FIVE>(l, scale, y);
    }
};

template <int NMAX>
struct Affine32 {
    static constexpr bool FIVE = NMAX == 31, MINIMUM = true;
    static constexpr int BYTES = FIVE ? 24 : 20;
    typedef AffineRound<NMAX> Round;

    static QK_INLINE Found find(const Round&, const F* x, const F* w) {
        Affine found;
        search_affine<BLOCK, NMAX, true, false, 1>(x, w, -0.9f, 0.05f, 36, &found);
        return {found.scale, found.minimum};
    }
    // the file has the lowest value, of which the minimum is the negative
    static QK_INLINE void store(I scale, I minimum, const F* level, uint8_t* const* y) {
        I l[BLOCK];
        for (int j = 0; j < BLOCK; ++j) l[j] = __builtin_convertvector(level[j], I);
        store_blocks32<4, FIVE>(l, scale | ((minimum ^ 0x8000) << 16), y);
    }
};

struct Eight {
    static constexpr int BYTES = 34;
    static constexpr bool MINIMUM = false;
    typedef SymmetricRound<128> Round;

    static QK_INLINE Found find(const Round&, const F* x, const F*) {
        F most{};
        for (int j = 0; j < BLOCK; ++j) most = max_of(abs_of(x[j]), most);
        return {most / 127.0f, F{}};
    }
    static QK_INLINE void store(I scale, I, const F* level, uint8_t* const* y) {
        I words[8];
        for (int t = 0; t < 8; ++t) {
            words[t] = I{};
            for (int i = 0; i < 4; ++i) words[t] |= (__builtin_convertvector(level[4 * t + i], I) & 255) << (8 * i);
        }
        store_word(scale, y, 0, 2);
        for (int t = 0; t < 8; ++t) store_word(words[t], y, 2 + 4 * t);
    }
};

struct Iq4Nl {
    static constexpr int BYTES = 18;
    static constexpr bool MINIMUM = false;
    typedef Iq4Round Round;

    static QK_INLINE Found find(const Round& round, const F* x, const F* w) {
        return {scale_of(*round.levels, x, w), F{}};
    }
    static QK_INLINE void store(I scale, I, const F* level, uint8_t* const* y) {
        I l[BLOCK];
        for (int j = 0; j < BLOCK; ++j) l[j] = __builtin_convertvector(level[j], I);
        store_blocks32<2, false>(l, scale, y);
    }
};

// A block's halves, and what they read back as.
struct Halves {
    I scale, minimum;

    QK_INLINE F fscale() const { return from_half(scale); }
    QK_INLINE F fminimum() const { return from_half(minimum); }
};

template <typename T>
QK_ONCE void tile(const typename T::Round& first, const FeedbackBlock& block, bool search, const F* x,
                  const F* mean_square, F* errors, uint8_t* const* y) {
    constexpr int C = 5;
    const float* t = static_cast<const float*>(block.prepared);
    alignas(64) F w[BLOCK];
    F sigma2 = *mean_square;
    if constexpr (std::is_same_v<T, Iq4Nl>) {  // here ggml takes twice the block's own
        sigma2 = F{};
        for (int j = 0; j < BLOCK; ++j) sigma2 += x[j] * x[j];
        sigma2 *= 2.0f / static_cast<float>(BLOCK);
    }
    for (int j = 0; j < BLOCK; ++j) w[j] = block.importance[j] * sqrt_of(sigma2 + x[j] * x[j]);
    const Found found = T::find(first, x, w);
    Rounded<BLOCK> best;
    Halves kept{to_half(found.scale), to_half(found.minimum)};
    {
        typename T::Round round = first;
        round.set(kept.fscale(), kept.fminimum());
        feed<BLOCK, BLOCK, 1>(x, t, block.reciprocal, 0, &round, &best);
    }
    // what is better than `best` becomes it
    const auto tries = [&](const Halves* h) QK_LAMBDA {
        Rounded<BLOCK> made[C];
        typename T::Round round[C];
        for (int c = 0; c < C; ++c) {
            round[c] = first;
            round[c].set(h[c].fscale(), h[c].fminimum());
        }
        feed<BLOCK, BLOCK, C>(x, t, block.reciprocal, 0, round, made);
        for (int c = 0; c < C; ++c) {
            const I better = I(made[c].loss < best.loss);
            kept.scale = select(better, h[c].scale, kept.scale);
            kept.minimum = select(better, h[c].minimum, kept.minimum);
            best.loss = select(better, made[c].loss, best.loss);
            for (int j = 0; j < BLOCK; ++j) {
                best.level[j] = select(better, made[c].level[j], best.level[j]);
                best.e[j] = select(better, made[c].e[j], best.e[j]);
            }
        }
    };
    if (search) {
        constexpr float FAR[C] = {0.88f, 0.92f, 0.96f, 1.04f, 1.08f}, NEAR[C] = {0.98f, 0.99f, 1.01f, 1.02f, 0.97f};
        constexpr float PARTS[C] = {-0.5f, -0.25f, 0.25f, 0.5f, 0.125f};
        Halves h[C];
        for (const float* factors : {FAR, NEAR}) {
            const F scale = kept.fscale();
            for (int c = 0; c < C; ++c) h[c] = {to_half(scale * factors[c]), kept.minimum};
            tries(h);
        }
        if constexpr (T::MINIMUM) {
            const F scale = kept.fscale(), minimum = kept.fminimum();
            for (int c = 0; c < C; ++c) h[c] = {kept.scale, to_half(minimum + scale * PARTS[c])};
            tries(h);
        }
    }
    T::store(kept.scale, kept.minimum, best.level, y);
    std::memcpy(errors, best.e, sizeof best.e);
}

template <typename T>
QK_INLINE void run(const typename T::Round& first, const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    for_each_lanes<BLOCK, T::BYTES>(rows, [&](F* x, F mean_square, F* errors, uint8_t* const* y) {
        tile<T>(first, block, search, x, &mean_square, errors, y);
    });
}

template <typename T>
QK_INLINE void run(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    const typename T::Round first{};
    run<T>(first, rows, block, search);
}

}  // namespace

void feedback_transpose_32(const FeedbackBlock& block, void* prepared) { transpose_u<BLOCK>(block, prepared); }

void feedback_q4_0(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    run<Symmetric32<8, false>>(rows, block, search);
}

void feedback_q4_1(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    run<Affine32<15>>(rows, block, search);
}

void feedback_q5_0(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    run<Symmetric32<16, true>>(rows, block, search);
}

void feedback_q5_1(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    run<Affine32<31>>(rows, block, search);
}

void feedback_q8_0(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    run<Eight>(rows, block, search);
}

void feedback_iq4_nl(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    const Levels levels(codebook("IQ4_NL", 1, 16));
    Iq4Round first{};
    first.levels = &levels;
    run<Iq4Nl>(first, rows, block, search);
}

}  // namespace quantkit::QK_ISA
