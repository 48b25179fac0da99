// Error feedback for IQ3_XXS and IQ3_S (layouts: iq3.cpp): two points of four columns in each group.
#include "feedback_grid.h"
#include "feedback_tables.h"
#include "tables.h"

namespace quantkit::QK_ISA {

namespace {

constexpr int LEVELS_OF_SIZE = 8, PAIRS = LEVELS_OF_SIZE * LEVELS_OF_SIZE;

constexpr int CANDIDATES = 3;  // of each half, under the diagonal

// A grid by pairs: points of the same first two levels follow each other. Codes are numbers in this order.
template <int POINTS>
struct Points {
    float size[LEVELS_OF_SIZE];
    int start[PAIRS + 1];
    uint8_t high[POINTS];                   // number of the last two levels
    int32_t levels[POINTS], index[POINTS];  // in fields of four bits; ggml's number
    int32_t place[PAIRS * PAIRS];           // of the pairs' numbers, the first in the lower bits
};

template <int POINTS>
const Points<POINTS>* make_points(const char* name) {
    const Codebook& book = codebook(name, POINTS, 4);
    bool seen[128] = {};
    for (int i = 0; i < 4 * POINTS; ++i) seen[book.values[i] & 127] = true;
    Points<POINTS>* const p = new Points<POINTS>();  // never destroyed: kernels may still run while the process ends
    int level[128] = {}, n_levels = 0;
    for (int v = 0; v < 128; ++v) {
        if (!seen[v]) continue;
        level[v] = n_levels & (LEVELS_OF_SIZE - 1);
        p->size[level[v]] = static_cast<float>(v);
        ++n_levels;
    }
    if (n_levels != LEVELS_OF_SIZE) throw std::logic_error(std::string("quantize: the codebook ") + name + " has wrong values");
    int number[PAIRS * PAIRS];
    for (int& at : number) at = -1;
    for (int j = 0; j < POINTS; ++j) {
        int at = 0;
        for (int i = 4; i-- > 0;) at = LEVELS_OF_SIZE * at + level[book.values[4 * j + i] & 127];
        number[at] = j;
    }
    int n = 0;
    for (int low = 0; low < PAIRS; ++low) {
        p->start[low] = n;
        for (int high = 0; high < PAIRS; ++high) {
            const int at = low + PAIRS * high;
            if (number[at] < 0) continue;
            p->levels[n] = (low & 7) | (low >> 3) << 4 | (high & 7) << 8 | (high >> 3) << 12;
            p->high[n] = static_cast<uint8_t>(high);
            p->place[at] = n;
            p->index[n++] = number[at];
        }
    }
    p->start[PAIRS] = n;
    return p;
}

// The entry of eight that the three lowest bits name.
QK_INLINE F entry_of(const float* table, I at) {
#if defined(__AVX512F__)
    const __m512 t = _mm512_castps256_ps512(_mm256_loadu_ps(table));
    return reinterpret_cast<F>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(at & 7), t));
#elif defined(__AVX2__)
    return reinterpret_cast<F>(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), reinterpret_cast<__m256i>(at)));
#else
    F out;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = table[at[lane] & 7];
    return out;
#endif
}

// A code is the numbers of both points, BITS each.
template <int POINTS, int BITS, bool PARITY>
struct Grid3 {
    const Points<POINTS>& p;

    QK_INLINE void half_sizes(I number, F s, F* size) const {
        const I levels = look_up(p.levels, number);
        for (int i = 0; i < 4; ++i) size[i] = s * entry_of(p.size, levels >> (4 * i));
    }

    QK_INLINE void sizes(I code, F s, F* size) const {
        half_sizes(code & (POINTS - 1), s, size);
        half_sizes((code >> BITS) & (POINTS - 1), s, size + 4);
    }

    template <typename Take>
    QK_INLINE void candidates(const Target& t, const float* m, F s, const Take& take) const {
        constexpr int N = CANDIDATES;
        I number[2][N];
        F size[2][N][4];
        for (int half = 0; half < 2; ++half) {
            F cost[2][PAIRS];
            for (int pair = 0; pair < 2; ++pair) {
                F c[2][LEVELS_OF_SIZE];
                for (int i = 0; i < 2; ++i)
                    for (int l = 0; l < LEVELS_OF_SIZE; ++l) {
                        const int at = 4 * half + 2 * pair + i;
                        const F away = t.size[at] - s * p.size[l];
                        c[i][l] = m[9 * at] * away * away;
                    }
                for (int k = 0; k < PAIRS; ++k) cost[pair][k] = c[0][k & 7] + c[1][k >> 3];
            }
            for (int k = 0; k < PAIRS; ++k) cost[1][k] = numbered<6>(cost[1][k], k);
            F least[N];
            I other[PAIRS];
            for (int i = 0; i < N; ++i) least[i] = splat(INFINITY);
            for (int a = 0; a < PAIRS; ++a) {
                if (p.start[a] == p.start[a + 1]) continue;
                F t = splat(INFINITY);
                for (int n = p.start[a]; n < p.start[a + 1]; ++n) t = min_of(cost[1][p.high[n]], t);
                other[a] = bits_of(t) & (PAIRS - 1);
                keep_least<N>(least, numbered<6>(cost[0][a] + t, a));
            }
            for (int i = 0; i < N; ++i) {
                const I a = bits_of(least[i]) & (PAIRS - 1);
                number[half][i] = look_up(p.place, a | lanes_at(other, a) << 6);
                half_sizes(number[half][i], s, size[half][i]);
            }
        }
        for (int i = 0; i < N; ++i)
            for (int j = 0; j < N; ++j) {
                if (i * j > N - 1) continue;  // both far from the best
                F both[8];
                std::memcpy(both, size[0][i], sizeof size[0][i]);
                std::memcpy(both + 4, size[1][j], sizeof size[1][j]);
                take(number[0][i] | number[1][j] << BITS, both);
            }
    }
};

template <int POINTS, int BITS, bool EVEN>
struct Iq3 {
    static constexpr int SUB = 32, LEVELS = 16, WINDOW = 3, SHIFTS = 1, SIGNS_AT = 18;
    Grid3<POINTS, BITS, EVEN> grid;

    I code(const FeedbackBlock& block, int group, const F* x, F s, I, F* v) const {
        return code_of_signed<EVEN, SIGNS_AT>(grid, block.metric + 64 * group, block.inverse + 64 * group, x, s, v);
    }
};

const Points<256>& points_xxs() {
    static const Points<256>* const one = make_points<256>("IQ3_XXS");
    return *one;
}
const Points<512>& points_s() {
    static const Points<512>* const one = make_points<512>("IQ3_S");
    return *one;
}

QK_INLINE int32_t half_at(const uint8_t* y) {
    uint16_t word;
    std::memcpy(&word, y, 2);
    return word;
}

struct Iq3Xxs : Iq3<256, 8, true> {
    static constexpr int BYTES = 98;
    static constexpr auto stock = quantize_iq3_xxs;
    explicit Iq3Xxs(const FeedbackBlock&) : Iq3{{points_xxs()}} {}
    static QK_INLINE F scale(F d, I level) { return d * (0.5f + to_float(level)) * 0.5f; }
    static QK_INLINE I level_at(F s, F d) {
        return max_of(I{}, min_of(splat(LEVELS - 1), nearest_int(2.0f * s / d - 0.5f)));
    }

    static void read(const uint8_t* y, I* half, I* level, I*) {
        for (int lane = 0; lane < LANES; ++lane, y += BYTES) {
            (*half)[lane] = half_at(y);
            for (int s = 0; s < 8; ++s) level[s][lane] = y[69 + 4 * s] >> 4;
        }
    }
    static void write(I half, const I* level, const I*, const I* code, uint8_t* const* y) {
        const Points<256>& p = points_xxs();
        for (int lane = 0; lane < LANES; ++lane) {
            const uint16_t d = static_cast<uint16_t>(half[lane]);
            std::memcpy(y[lane], &d, 2);
            for (int s = 0; s < 8; ++s) {
                uint32_t word = static_cast<uint32_t>(level[s][lane]) << 28;
                for (int g = 0; g < 4; ++g) {
                    const int32_t c = code[4 * s + g][lane];
                    y[lane][2 + 8 * s + 2 * g] = static_cast<uint8_t>(p.index[c & 255]);
                    y[lane][3 + 8 * s + 2 * g] = static_cast<uint8_t>(p.index[c >> 8 & 255]);
                    word |= static_cast<uint32_t>(c >> SIGNS_AT & 127) << (7 * g);
                }
                std::memcpy(y[lane] + 66 + 4 * s, &word, 4);
            }
        }
    }
};

struct Iq3S : Iq3<512, 9, false> {
    static constexpr int BYTES = 110;
    static constexpr auto stock = quantize_iq3_s;
    explicit Iq3S(const FeedbackBlock&) : Iq3{{points_s()}} {}
    static QK_INLINE F scale(F d, I level) { return d * to_float(2 * level + 1); }
    static QK_INLINE I level_at(F s, F d) {
        return max_of(I{}, min_of(splat(LEVELS - 1), nearest_int(0.5f * (s / d - 1.0f))));
    }

    static void read(const uint8_t* y, I* half, I* level, I*) {
        for (int lane = 0; lane < LANES; ++lane, y += BYTES) {
            (*half)[lane] = half_at(y);
            for (int s = 0; s < 8; ++s) level[s][lane] = y[106 + s / 2] >> (4 * (s % 2)) & 15;
        }
    }
    static void write(I half, const I* level, const I*, const I* code, uint8_t* const* y) {
        const Points<512>& p = points_s();
        for (int lane = 0; lane < LANES; ++lane) {
            const uint16_t d = static_cast<uint16_t>(half[lane]);
            std::memcpy(y[lane], &d, 2);
            for (int s = 0; s < 8; ++s) {
                int32_t high = 0;
                for (int g = 0; g < 4; ++g) {
                    const int32_t c = code[4 * s + g][lane];
                    const int32_t first = p.index[c & 511], second = p.index[c >> 9 & 511];
                    y[lane][2 + 8 * s + 2 * g] = static_cast<uint8_t>(first);
                    y[lane][3 + 8 * s + 2 * g] = static_cast<uint8_t>(second);
                    high |= (first >> 8 | (second >> 8) << 1) << (2 * g);
                    y[lane][74 + 4 * s + g] = static_cast<uint8_t>(c >> SIGNS_AT);
                }
                y[lane][66 + s] = static_cast<uint8_t>(high);
            }
            for (int s = 0; s < 4; ++s)
                y[lane][106 + s] = static_cast<uint8_t>(level[2 * s][lane] | level[2 * s + 1][lane] << 4);
        }
    }
};

}  // namespace

void feedback_iq3_xxs(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    feedback_rows<Iq3Xxs>(rows, block, search);
}

void feedback_iq3_s(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    feedback_rows<Iq3S>(rows, block, search);
}

}  // namespace quantkit::QK_ISA
