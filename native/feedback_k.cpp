// Error feedback for the types of super-blocks of 256 values whose groups have a scale (and a minimum) in steps of the
// super-block's: Q2_K to Q6_K (layouts: k_quants.cpp) and IQ4_XS (iq4.cpp).
//
// Plain: ggml's scales of the current weights, then the levels, column by column. With search: the super-block's scale
// and minimum times a few factors; for each the group's scale and minimum a few steps up and down, and on from where
// that was best, with the errors passed on within the group. The least sum of e^2 of the group is kept, and at last
// that of the super-block.
#include <type_traits>

#include "feedback_lanes.h"
#include "feedback_tables.h"
#include "iq4_round.h"
#include "k_blocks.h"
#include "k_scales.h"

namespace quantkit::QK_ISA {

namespace {

struct NoCodebook {};

// A super-block's scales. Of a group: s * d its scale, m * dm its minimum.
template <int GROUPS>
struct Scales {
    I hd, hdm;           // halves
    F d, dm;             // as read back from them
    I s[GROUPS], m[GROUPS];
};

template <int GROUPS>
QK_INLINE void set_halves(Scales<GROUPS>* scales, F d, F dm) {
    scales->hd = to_half(d);
    scales->hdm = to_half(dm);
    scales->d = from_half(scales->hd);
    scales->dm = from_half(scales->hdm);
}

template <int NMAX>
struct K45 {
    static constexpr int N = 32, BYTES = NMAX == 15 ? 144 : 176, LOW = 0, HIGH = 63, MOST_MINIMUM = 63;
    typedef AffineRound<NMAX> Round;
    typedef NoCodebook Book;

    static QK_INLINE void find(const Book&, const F* x, F* w, F sum_x2, Scales<8>* out) {
        Affine found[8];
        F d, dm;
        search_k45_weighted<NMAX>(x, w, sum_x2, found, out->s, out->m, &d, &dm);
        I head[3];
        pack_scales(out->s, out->m, head);
        set_halves(out, d, dm);
    }
    static QK_INLINE void store(Scales<8>* a, const F* level, uint8_t* const* y) {
        I head[3];
        pack_scales(a->s, a->m, head);
        const auto levels = [&](int j, I* l) QK_LAMBDA {
            for (int i = 0; i < 32; ++i) l[i] = __builtin_convertvector(level[32 * j + i], I);
        };
        store_k45<NMAX>(a->hd, a->hdm, head, levels, y);
    }
};

struct Q2K {
    static constexpr int N = 16, BYTES = 84, LOW = 0, HIGH = 15, MOST_MINIMUM = 15;
    typedef AffineRound<3> Round;
    typedef NoCodebook Book;

    static QK_INLINE void find(const Book&, const F* x, F* w, F sum_x2, Scales<16>* out) {
        Affine found[16];
        F d, dm;
        search_q2_k_weighted(x, w, sum_x2, found, out->s, out->m, &d, &dm);
        for (int j = 0; j < 16; ++j) {
            out->s[j] &= 15;
            out->m[j] &= 15;
        }
        set_halves(out, d, dm);
    }
    static QK_INLINE void store(Scales<16>* a, const F* level, uint8_t* const* y) {
        I q[16], levels[QK_K];
        for (int j = 0; j < 16; ++j) q[j] = a->s[j] | (a->m[j] << 4);
        for (int k = 0; k < QK_K; ++k) levels[k] = __builtin_convertvector(level[k], I);
        store_q2_k(a->hd, a->hdm, q, levels, y);
    }
};

struct Q3K {
    static constexpr int N = 16, BYTES = 110, LOW = -32, HIGH = 31, MOST_MINIMUM = 0;
    typedef SymmetricRound<4> Round;
    typedef NoCodebook Book;

    static QK_INLINE void find(const Book&, const F* x, F* w, F sum_x2, Scales<16>* out) {
        Symmetric found[16];
        F scales[16], d;
        search_q3_k_weighted(x, w, sum_x2, found, scales, out->s, &d);
        for (int j = 0; j < 16; ++j) {
            out->s[j] = (out->s[j] & 63) - 32;
            out->m[j] = I{};
        }
        set_halves(out, d, F{});
    }
    static QK_INLINE void store(Scales<16>* a, const F* level, uint8_t* const* y) {
        I s[16];
        for (int j = 0; j < 16; ++j) s[j] = a->s[j] + 32;
        const auto words = [&](int j, I* out) QK_LAMBDA {
            for (int t = 0; t < 4; ++t) {
                I l[4];
                for (int i = 0; i < 4; ++i) l[i] = __builtin_convertvector(level[16 * j + 4 * t + i] + 4.0f, I);
                out[t] = bytes(l[0], l[1], l[2], l[3]);
            }
        };
        store_q3_k(a->hd, s, words, y);
    }
};

struct Q6K {
    static constexpr int N = 16, BYTES = 210, LOW = -128, HIGH = 127, MOST_MINIMUM = 0;
    typedef SymmetricRound<32> Round;
    typedef NoCodebook Book;

    static QK_INLINE void find(const Book&, const F* x, F* w, F, Scales<16>* out) {
        Symmetric found[16];
        F scales[16], amax, max_scale;
        search_q6_k<true>(x, w, found, scales, &amax, &max_scale);
        const I zero = I(amax < GROUP_MAX_EPS);
        const F iscale = -128.0f / max_scale;
        for (int j = 0; j < 16; ++j) {
            const I s = (min_of(splat(127), nearest_int(iscale * scales[j])) << 24) >> 24;
            out->s[j] = select(zero, I{}, s);
            out->m[j] = I{};
        }
        set_halves(out, select(zero, F{}, 1.0f / iscale), F{});
    }
    static QK_INLINE void store(Scales<16>* a, const F* level, uint8_t* const* y) {
        I levels[QK_K];
        for (int k = 0; k < QK_K; ++k) levels[k] = __builtin_convertvector(level[k] + 32.0f, I);
        store_q6_k(a->hd, a->s, levels, y);
    }
};

struct Iq4Xs {
    static constexpr int N = 32, BYTES = 136, LOW = -32, HIGH = 31, MOST_MINIMUM = 0;
    typedef Iq4Round Round;
    typedef Levels Book;

    static QK_INLINE void find(const Book& book, const F* x, F* w, F sum_x2, Scales<8>* out) {
        const F sigma2 = sum_x2 * (2.0f / 256.0f);
        for (int k = 0; k < QK_K; ++k) w[k] = w[k] * sqrt_of(sigma2 + x[k] * x[k]);
        F scales[8];
        const F d = scale_iq4_xs(book, x, w, scales), id = inverse_of(d);
        for (int j = 0; j < 8; ++j) {
            out->s[j] = max_of(splat(-32), min_of(splat(31), nearest_int(id * scales[j])));
            out->m[j] = I{};
        }
        set_halves(out, d, F{});
    }
    static QK_INLINE void store(Scales<8>* a, const F* level, uint8_t* const* y) {
        I words[32], high{}, low{};
        for (int j = 0; j < 8; ++j) {
            low |= ((a->s[j] + 32) & 15) << (4 * j);
            high |= ((a->s[j] + 32) >> 4) << (2 * j);
            for (int t = 0; t < 4; ++t) {
                I word{};
                for (int i = 0; i < 4; ++i) {
                    const F* l = level + 32 * j + 4 * t + i;
                    word |= (__builtin_convertvector(l[0], I) | (__builtin_convertvector(l[16], I) << 4)) << (8 * i);
                }
                words[4 * j + t] = word;
            }
        }
        store_word(a->hd | (high << 16), y, 0);
        store_word(low, y, 4);
        store_lanes<32>(words, y, 8);
    }
};

// A way to round, set up for a scale and a minimum.
template <typename T>
QK_INLINE void set_round(const typename T::Book& book, F scale, F minimum, typename T::Round* round) {
    if constexpr (std::is_same_v<typename T::Book, Levels>) round->levels = &book;
    round->set(scale, minimum);
}

// Whole steps of d that a group's scale or minimum is, clamped.
QK_INLINE I steps_of(F scale, F d, int low, int high) {
    const F steps = select(I(d == 0.0f), F{}, scale / d);
    return nearest_int(min_of(max_of(steps, splat(static_cast<float>(low))), splat(static_cast<float>(high))));
}

// The groups of a super-block one after the other, in x, which is used up; loss: the sum of e^2.
template <typename T, bool SEARCH>
QK_ONCE void run_groups(const typename T::Book& book, F* x, const float* t, const float* reciprocal,
                        Scales<QK_K / T::N>* a, F* level, F* errors, F* loss) {
    constexpr int N = T::N, C = SEARCH ? 5 : 1;
    constexpr bool MINIMUM = T::MOST_MINIMUM > 0;
    F total{};
    for (int g = 0; g < QK_K / N; ++g) {
        const int first = g * N;
        Rounded<N> made[C];
        typename T::Round round[C];
        // tries of scale and minimum to made[from] and after; of these and made[0] the one of the least loss to made[0]
        const auto tries = [&](auto from, const I* s, const I* m) QK_LAMBDA {
            constexpr int FROM = decltype(from)::value, TO = FROM == 0 || MINIMUM ? C : 3;
            for (int c = FROM; c < TO; ++c)
                set_round<T>(book, a->d * to_float(s[c]), a->dm * to_float(m[c]), round + c);
            feed<QK_K, N, TO - FROM>(x + first, t, reciprocal, first, round + FROM, made + FROM);
            I best_s = s[0], best_m = m[0];
            for (int c = 1; c < TO; ++c) {
                const I better = I(made[c].loss < made[0].loss);
                best_s = select(better, s[c], best_s);
                best_m = select(better, m[c], best_m);
                made[0].loss = select(better, made[c].loss, made[0].loss);
                for (int j = 0; j < N; ++j) {
                    made[0].level[j] = select(better, made[c].level[j], made[0].level[j]);
                    made[0].e[j] = select(better, made[c].e[j], made[0].e[j]);
                }
            }
            a->s[g] = best_s;
            a->m[g] = best_m;
        };
        constexpr int AROUND[] = {0, -1, 1, -2, 2};
        const auto scale_at = [&](I s) QK_LAMBDA { return max_of(splat(T::LOW), min_of(splat(T::HIGH), s)); };
        constexpr std::integral_constant<int, 0> ALL{};
        constexpr std::integral_constant<int, 1> MORE{};
        const I s0 = a->s[g];
        I s[C], m[C];
        for (int c = 0; c < C; ++c) s[c] = c == 0 ? s0 : scale_at(s0 + AROUND[c]), m[c] = a->m[g];
        tries(ALL, s, m);
        if constexpr (SEARCH && MINIMUM) {
            for (int c = 0; c < C; ++c) {
                s[c] = a->s[g];
                m[c] = max_of(I{}, min_of(splat(T::MOST_MINIMUM), a->m[g] + AROUND[c]));
            }
            tries(MORE, s, m);
            for (int c = 0; c < C; ++c) s[c] = scale_at(a->s[g] + AROUND[c]), m[c] = a->m[g];
            tries(MORE, s, m);
        } else if constexpr (SEARCH) {  // the way that was better, on
            const I turn = I(a->s[g] > s0) - I(a->s[g] < s0);  // -1 for up
            s[0] = a->s[g];
            s[1] = scale_at(s0 - 3 * turn), s[2] = scale_at(s0 - 4 * turn);
            tries(MORE, s, m);
        }
        total += made[0].loss;
        std::memcpy(level + first, made[0].level, sizeof made[0].level);
        std::memcpy(errors + first, made[0].e, sizeof made[0].e);
        pass_on<QK_K, N>(x, t, first, made[0].e);
    }
    *loss = total;
}

template <typename T>
QK_ONCE void tile(const typename T::Book& book, const FeedbackBlock& block, bool search, F* x, F* errors,
                  uint8_t* const* y) {
    constexpr int GROUPS = QK_K / T::N;
    const float* t = static_cast<const float*>(block.prepared);
    alignas(64) F w[QK_K], level[QK_K];
    F sum_x2{};
    for (int k = 0; k < QK_K; ++k) {
        w[k] = splat(block.importance[k]);
        sum_x2 += x[k] * x[k];
    }
    Scales<GROUPS> best;
    T::find(book, x, w, sum_x2, &best);
    if (!search) {
        F loss;
        run_groups<T, false>(book, x, t, block.reciprocal, &best, level, errors, &loss);
        T::store(&best, level, y);
        return;
    }
    F loss;
    Scales<GROUPS> base = best;
    // the scales of `base`, its super-block's times so much; where they are better they become `best`
    const auto attempt = [&](float times, float minimum_times, bool first) {
        alignas(64) F now[QK_K], made[QK_K], e[QK_K];
        std::memcpy(now, x, sizeof now);
        Scales<GROUPS> tried = base;
        if (times != 1.0f) {
            set_halves(&tried, base.d * times, base.dm);
            for (int g = 0; g < GROUPS; ++g) tried.s[g] = steps_of(base.d * to_float(base.s[g]), tried.d, T::LOW, T::HIGH);
        }
        if (minimum_times != 1.0f) {
            set_halves(&tried, base.d, base.dm * minimum_times);
            for (int g = 0; g < GROUPS; ++g)
                tried.m[g] = steps_of(base.dm * to_float(base.m[g]), tried.dm, 0, T::MOST_MINIMUM);
        }
        F sum;
        run_groups<T, true>(book, now, t, block.reciprocal, &tried, made, e, &sum);
        const I better = first ? ~I{} : I(sum < loss);
        loss = select(better, sum, loss);
        best.hd = select(better, tried.hd, best.hd);
        best.hdm = select(better, tried.hdm, best.hdm);
        best.d = select(better, tried.d, best.d);
        best.dm = select(better, tried.dm, best.dm);
        for (int g = 0; g < GROUPS; ++g) {
            best.s[g] = select(better, tried.s[g], best.s[g]);
            best.m[g] = select(better, tried.m[g], best.m[g]);
        }
        for (int k = 0; k < QK_K; ++k) {
            level[k] = select(better, made[k], level[k]);
            errors[k] = select(better, e[k], errors[k]);
        }
    };
    attempt(1.0f, 1.0f, true);
    for (const float times : {0.93f, 1.07f}) attempt(times, 1.0f, false);
    if constexpr (T::MOST_MINIMUM > 0) {
        base = best;
        for (const float times : {0.93f, 1.07f}) attempt(1.0f, times, false);
    }
    base = best;
    for (const float times : {0.97f, 1.03f}) attempt(times, 1.0f, false);
    T::store(&best, level, y);
}

template <typename T>
QK_INLINE void run(const typename T::Book& book, const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    for_each_lanes<QK_K, T::BYTES>(
        rows, [&](F* x, F, F* errors, uint8_t* const* y) { tile<T>(book, block, search, x, errors, y); });
}

}  // namespace

void feedback_transpose_256(const FeedbackBlock& block, void* prepared) { transpose_u<QK_K>(block, prepared); }

void feedback_q2_k(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    run<Q2K>({}, rows, block, search);
}

void feedback_q3_k(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    run<Q3K>({}, rows, block, search);
}

void feedback_q4_k(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    run<K45<15>>({}, rows, block, search);
}

void feedback_q5_k(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    run<K45<31>>({}, rows, block, search);
}

void feedback_q6_k(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    run<Q6K>({}, rows, block, search);
}

void feedback_iq4_xs(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    const Levels levels(codebook("IQ4_NL", 1, 16));
    run<Iq4Xs>(levels, rows, block, search);
}

}  // namespace quantkit::QK_ISA
