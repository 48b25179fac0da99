// Error feedback for IQ2_XXS, IQ2_XS and IQ2_S (layouts: iq2.cpp).
#include <array>

#include "feedback_grid.h"
#include "feedback_tables.h"
#include "tables.h"

namespace quantkit::QK_ISA {

namespace {

constexpr int HALVES = 81;
constexpr float SIZE[3] = {8.0f, 25.0f, 43.0f};

constexpr int CANDIDATES = 4;  // under the diagonal

// A grid by halves: points of the same first four levels follow each other. Codes are numbers in this order.
template <int POINTS>
struct Points {
    int start[HALVES + 1];
    uint8_t high[POINTS];                   // number of the last four levels
    int32_t levels[POINTS], index[POINTS];  // in fields of two bits; ggml's number
    int32_t place[128 * 128];               // of the halves' numbers, the first in the lower bits
};

template <int POINTS>
const Points<POINTS>* make_points(const char* name) {
    const Codebook& book = codebook(name, POINTS, 8);
    std::array<int32_t, HALVES * HALVES> number;
    number.fill(-1);
    for (int j = 0; j < POINTS; ++j) {
        int at = 0;
        for (int i = 8; i-- > 0;) {
            const int8_t value = book.values[8 * j + i];
            at = 3 * at + (value == 8 ? 0 : value == 25 ? 1 : 2);
        }
        number[static_cast<size_t>(at)] = j;
    }
    Points<POINTS>* const p = new Points<POINTS>();  // never destroyed: kernels may still run while the process ends
    int n = 0;
    for (int low = 0; low < HALVES; ++low) {
        p->start[low] = n;
        for (int high = 0; high < HALVES; ++high) {
            const int at = low + HALVES * high;
            if (number[static_cast<size_t>(at)] < 0) continue;
            p->levels[n] = 0;
            for (int i = 0, t = at; i < 8; ++i, t /= 3) p->levels[n] |= (t % 3) << (2 * i);
            p->high[n] = static_cast<uint8_t>(high);
            p->place[low | high << 7] = n;
            p->index[n++] = number[static_cast<size_t>(at)];
        }
    }
    p->start[HALVES] = n;
    return p;
}

// The size of a level in the two lowest bits.
QK_INLINE F size_of(I level) {
#if defined(__AVX512F__)
    return reinterpret_cast<F>(_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_setr_ps(SIZE[0], SIZE[1], SIZE[2], SIZE[2])),
                                                    reinterpret_cast<__m512i>(level)));
#elif defined(__AVX2__)
    const __m128 sizes = _mm_setr_ps(SIZE[0], SIZE[1], SIZE[2], SIZE[2]);
    return reinterpret_cast<F>(_mm256_permutevar_ps(_mm256_set_m128(sizes, sizes), reinterpret_cast<__m256i>(level)));
#else
    const I l = level & 3;
    return select(I(l == 0), splat(SIZE[0]), select(I(l == 1), splat(SIZE[1]), splat(SIZE[2])));
#endif
}

template <int POINTS, bool PARITY>
struct Grid2 {
    const Points<POINTS>& p;

    QK_INLINE void sizes(I code, F s, F* size) const {
        const I levels = look_up(p.levels, code & (POINTS - 1));
        for (int i = 0; i < 8; ++i) size[i] = s * size_of(levels >> (2 * i));
    }

    template <typename Take>
    QK_INLINE void candidates(const Target& t, const float* m, F s, const Take& take) const {
        constexpr int N = CANDIDATES;
        F cost[2][HALVES], flip[2][HALVES];
        for (int half = 0; half < 2; ++half)
            for (int i = 0, n = 1; i < 4; ++i, n *= 3) {
                const F a = t.size[4 * half + i];
                const float w = m[9 * (4 * half + i)];
                F c[3], f[3];
                for (int l = 0; l < 3; ++l) {
                    const F size = s * SIZE[l], away = a - size;
                    c[l] = w * away * away;
                    if constexpr (PARITY) f[l] = select(t.odd, (4.0f * w) * a * size, F{});
                }
                for (int l = 3; l-- > 0;)
                    for (int k = 0; k < n; ++k) {
                        cost[half][l * n + k] = i ? cost[half][k] + c[l] : c[l];
                        if constexpr (PARITY) flip[half][l * n + k] = i ? min_of(flip[half][k], f[l]) : f[l];
                    }
            }
        for (int h = 0; h < HALVES; ++h) {
            if constexpr (PARITY) flip[1][h] = numbered<7>(cost[1][h] + flip[1][h], h);
            cost[1][h] = numbered<7>(cost[1][h], h);
        }
        F least[N];
        I half[HALVES];
        for (int i = 0; i < N; ++i) least[i] = splat(INFINITY);
        for (int a = 0; a < HALVES; ++a) {
            if (p.start[a] == p.start[a + 1]) continue;
            F t = splat(INFINITY), flipped = t;
            for (int n = p.start[a]; n < p.start[a + 1]; ++n) {
                t = min_of(cost[1][p.high[n]], t);
                if constexpr (PARITY) flipped = min_of(flip[1][p.high[n]], flipped);
            }
            F c = t;
            if constexpr (PARITY) {  // one sign is flipped: in this half or in the other
                const F here = t + flip[0][a];
                c = min_of(here, flipped);
                t = select(I(here < flipped), t, flipped);
            }
            half[a] = bits_of(t) & 127;
            keep_least<N>(least, numbered<7>(cost[0][a] + c, a));
        }
        for (int i = 0; i < N; ++i) {
            const I a = min_of(bits_of(least[i]) & 127, splat(HALVES - 1));
            const I code = look_up(p.place, a | lanes_at(half, a) << 7);
            F size[8];
            sizes(code, s, size);
            take(code, size);
        }
    }
};

template <int POINTS, bool EVEN>
struct Iq2 {
    static constexpr int LEVELS = 16, WINDOW = 3, SHIFTS = 1, SIGNS_AT = 16;
    Grid2<POINTS, EVEN> grid;

    static QK_INLINE F scale(F d, I level) { return d * (0.5f + to_float(level)) * 0.25f; }
    static QK_INLINE I level_at(F s, F d) {
        return max_of(I{}, min_of(splat(LEVELS - 1), nearest_int(4.0f * s / d - 0.5f)));
    }
    I code(const FeedbackBlock& block, int group, const F* x, F s, I, F* v) const {
        return code_of_signed<EVEN, SIGNS_AT>(grid, block.metric + 64 * group, block.inverse + 64 * group, x, s, v);
    }
};

QK_INLINE int32_t half_at(const uint8_t* y) {
    uint16_t word;
    std::memcpy(&word, y, 2);
    return word;
}

QK_INLINE void put_word(uint8_t* y, int32_t value) {
    const uint16_t word = static_cast<uint16_t>(value);
    std::memcpy(y, &word, 2);
}

const Points<256>& points_xxs() {
    static const Points<256>* const one = make_points<256>("IQ2_XXS");
    return *one;
}
const Points<512>& points_xs() {
    static const Points<512>* const one = make_points<512>("IQ2_XS");
    return *one;
}
const Points<1024>& points_s() {
    static const Points<1024>* const one = make_points<1024>("IQ2_S");
    return *one;
}

struct Iq2Xxs : Iq2<256, true> {
    static constexpr int SUB = 32, BYTES = 66;
    static constexpr auto stock = quantize_iq2_xxs;
    explicit Iq2Xxs(const FeedbackBlock&) : Iq2{{points_xxs()}} {}

    static void read(const uint8_t* y, I* half, I* level, I*) {
        for (int lane = 0; lane < LANES; ++lane, y += BYTES) {
            (*half)[lane] = half_at(y);
            for (int s = 0; s < 8; ++s) level[s][lane] = y[9 + 8 * s] >> 4;
        }
    }
    static void write(I half, const I* level, const I*, const I* code, uint8_t* const* y) {
        const Points<256>& p = points_xxs();
        for (int lane = 0; lane < LANES; ++lane) {
            put_word(y[lane], half[lane]);
            for (int s = 0; s < 8; ++s) {
                uint32_t word = static_cast<uint32_t>(level[s][lane]) << 28;
                for (int g = 0; g < 4; ++g) {
                    const int32_t c = code[4 * s + g][lane];
                    y[lane][2 + 8 * s + g] = static_cast<uint8_t>(p.index[c & 255]);
                    word |= static_cast<uint32_t>(c >> SIGNS_AT & 127) << (7 * g);
                }
                std::memcpy(y[lane] + 6 + 8 * s, &word, 4);
            }
        }
    }
};

struct Iq2Xs : Iq2<512, true> {
    static constexpr int SUB = 16, BYTES = 74;
    static constexpr auto stock = quantize_iq2_xs;
    explicit Iq2Xs(const FeedbackBlock&) : Iq2{{points_xs()}} {}

    static void read(const uint8_t* y, I* half, I* level, I*) {
        for (int lane = 0; lane < LANES; ++lane, y += BYTES) {
            (*half)[lane] = half_at(y);
            for (int s = 0; s < 16; ++s) level[s][lane] = y[66 + s / 2] >> (4 * (s % 2)) & 15;
        }
    }
    static void write(I half, const I* level, const I*, const I* code, uint8_t* const* y) {
        const Points<512>& p = points_xs();
        for (int lane = 0; lane < LANES; ++lane) {
            put_word(y[lane], half[lane]);
            for (int g = 0; g < 32; ++g) {
                const int32_t c = code[g][lane];
                put_word(y[lane] + 2 + 2 * g, p.index[c & 511] | (c >> SIGNS_AT & 127) << 9);
            }
            for (int s = 0; s < 8; ++s)
                y[lane][66 + s] = static_cast<uint8_t>(level[2 * s][lane] | level[2 * s + 1][lane] << 4);
        }
    }
};

struct Iq2S : Iq2<1024, false> {
    static constexpr int SUB = 16, BYTES = 82;
    static constexpr auto stock = quantize_iq2_s;
    explicit Iq2S(const FeedbackBlock&) : Iq2{{points_s()}} {}

    static void read(const uint8_t* y, I* half, I* level, I*) {
        for (int lane = 0; lane < LANES; ++lane, y += BYTES) {
            (*half)[lane] = half_at(y);
            for (int s = 0; s < 16; ++s) level[s][lane] = y[74 + s / 2] >> (4 * (s % 2)) & 15;
        }
    }
    static void write(I half, const I* level, const I*, const I* code, uint8_t* const* y) {
        const Points<1024>& p = points_s();
        for (int lane = 0; lane < LANES; ++lane) {
            put_word(y[lane], half[lane]);
            for (int s = 0; s < 8; ++s) {
                int32_t high = 0;
                for (int k = 0; k < 4; ++k) {
                    const int32_t c = code[4 * s + k][lane], index = p.index[c & 1023];
                    y[lane][2 + 4 * s + k] = static_cast<uint8_t>(index);
                    y[lane][34 + 4 * s + k] = static_cast<uint8_t>(c >> SIGNS_AT);
                    high |= (index >> 8) << (2 * k);
                }
                y[lane][66 + s] = static_cast<uint8_t>(high);
                y[lane][74 + s] = static_cast<uint8_t>(level[2 * s][lane] | level[2 * s + 1][lane] << 4);
            }
        }
    }
};

}  // namespace

void feedback_iq2_xxs(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    feedback_rows<Iq2Xxs>(rows, block, search);
}

void feedback_iq2_xs(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    feedback_rows<Iq2Xs>(rows, block, search);
}

void feedback_iq2_s(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    feedback_rows<Iq2S>(rows, block, search);
}

}  // namespace quantkit::QK_ISA
