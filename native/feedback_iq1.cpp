// Error feedback for IQ1_S and IQ1_M (layouts: iq1.cpp). A group of eight columns takes the point g of the grid, of all
// 2048, with the least (x - v) M (x - v)^T, v = s (g + delta).
#include "feedback_iq.h"
#include "feedback_tables.h"
#include "iq1_grid.h"
#include "tables.h"

namespace quantkit::QK_ISA {

namespace {

constexpr float DELTA = 0.125f;
constexpr int HALVES = 81;
constexpr int SIDE = 4;  // points scored side by side
constexpr int PLACES = 2320;  // for Iq1Grid::N points, the number of each half's rounded up
static_assert(PLACES >= Iq1Grid::N + HALVES * (SIDE - 1) + LANES - 1, "room for every half, and to read LANES at any");

// The grid by halves: points of the same first four levels follow each other, and the last of these again up to a
// multiple of SIDE. Codes are places in this order.
struct Points {
    int start[HALVES + 1];
    int32_t high[PLACES];                    // number of the last four levels
    int32_t pattern[PLACES], index[PLACES];  // levels 0, 1, 2 in fields of two bits; ggml's number
};

const Points* make_points() {
    const Iq1Grid& grid = iq1_grid();
    Points* const p = new Points();  // never destroyed: kernels may still run while the process ends
    int n = 0;
    for (int low = 0; low < HALVES; ++low) {
        p->start[low] = n;
        for (int high = 0; high < HALVES; ++high) {
            const int ternary = low + HALVES * high;
            if (grid.index[ternary] < 0) continue;
            int32_t pattern = 0;
            for (int i = 0, t = ternary; i < 8; ++i, t /= 3) pattern |= (t % 3) << (2 * i);
            p->high[n] = high;
            p->pattern[n] = pattern;
            p->index[n++] = grid.index[ternary];
        }
        for (; n % SIDE; ++n) p->high[n] = p->high[n - 1], p->pattern[n] = p->pattern[n - 1], p->index[n] = p->index[n - 1];
    }
    p->start[HALVES] = n;
    return p;
}

const Points& points() {
    static const Points* const one = make_points();
    return *one;
}

// (g + delta) M (g + delta) of all points: delta up, delta down.
struct Quadratic {
    float of[2][PLACES];
};

// Sums of b * level over four columns, of all 81.
QK_INLINE void sums_of_halves(const F* b, F* t) {
    t[0] = -b[0] - b[1] - b[2] - b[3];
    for (int i = 0, n = 1; i < 4; ++i, n *= 3)
        for (int k = 0; k < n; ++k) {
            t[n + k] = t[k] + b[i];
            t[2 * n + k] = t[n + k] + b[i];
        }
}

// What the points score is 2 (x M / s) (g + delta) - (g + delta) M (g + delta): the higher, the nearer.
struct Scores {
    F low[HALVES], high[HALVES], sum;

    QK_INLINE Scores(const float* m, const F* x, F s) {
        const F inverse = select(I(s > 0.0f), 2.0f / s, F{});
        F b[8];
        sum = F{};
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            F t = x[0] * m[j];
#pragma GCC unroll 8
            for (int i = 1; i < 8; ++i) t += x[i] * m[8 * i + j];
            b[j] = t * inverse;
            sum += b[j];
        }
        sums_of_halves(b, low);
        sums_of_halves(b + 4, high);
    }

    // The best point, and its score but for delta's part of 2 x M / s.
    template <typename Quad>
    QK_INLINE I best(const Points& p, const Quad& quad, F* score) const {
        F top[HALVES], most = splat(-INFINITY);
        I half{};
        for (int a = 0; a < HALVES; ++a) {
            F side[SIDE];
            for (F& t : side) t = splat(-INFINITY);
            for (int n = p.start[a]; n < p.start[a + 1]; n += SIDE) {
#pragma GCC unroll 4
                for (int i = 0; i < SIDE; ++i) side[i] = max_of(high[p.high[n + i]] - quad.of_all(n + i), side[i]);
            }
            F t = max_of(max_of(side[0], side[1]), max_of(side[2], side[3]));
            top[a] = t;
            t += low[a];
            const I more = I(t > most);
            most = select(more, t, most);
            half = select(more, splat(a), half);
        }
        *score = most;
        I out;
        for (int lane = 0; lane < LANES; ++lane) {
            const int a = half[lane];
            const F t = splat(top[a][lane]);
            const float* q = quad.of_lane(lane);
            int n = p.start[a];
            for (const int end = p.start[a + 1] - LANES; ; n += LANES) {  // the first of the points that has it
                I number;
                F less;
                std::memcpy(&number, p.high + n, sizeof number);
                std::memcpy(&less, q + n, sizeof less);
                const F score = float_of(look_up(reinterpret_cast<const int32_t*>(high), number * LANES + lane)) - less;
                const uint32_t found = lane_bits(I(score == t));
                if (found) n += __builtin_ctz(found);
                if (found || n >= end) break;
            }
            out[lane] = n < p.start[a + 1] ? n : p.start[a];
        }
        return out;
    }
};

struct OneShift {
    const float* q;
    QK_INLINE F of_all(int n) const { return splat(q[n]); }
    QK_INLINE const float* of_lane(int) const { return q; }
};

struct TwoShifts {
    const Quadratic& q;
    I down;
    QK_INLINE F of_all(int n) const { return select(down, splat(q.of[1][n]), splat(q.of[0][n])); }
    QK_INLINE const float* of_lane(int lane) const { return q.of[down[lane] & 1]; }
};

QK_INLINE void values_of(const Points& p, I code, F s, I down, F* v) {
    const I pattern = look_up(p.pattern, code);
    const F shift = select(down, splat(-DELTA), splat(DELTA));
    for (int i = 0; i < 8; ++i) v[i] = s * (to_float((pattern >> (2 * i) & 3) - 1) + shift);
}

struct Iq1 {
    static constexpr int LEVELS = 8, WINDOW = 2;
    const Points& p;
    const Quadratic* q;

    explicit Iq1(const FeedbackBlock& block) : p(points()), q(static_cast<const Quadratic*>(block.prepared)) {}
    static QK_INLINE F scale(F d, I level) { return d * to_float(2 * level + 1); }
    static QK_INLINE I level_at(F s, F d) {
        return max_of(I{}, min_of(splat(LEVELS - 1), nearest_int(0.5f * (s / d - 1.0f))));
    }
};

struct Iq1S : Iq1 {
    static constexpr int SUB = 32, SHIFTS = 2, BYTES = 50;
    static constexpr auto stock = quantize_iq1_s;
    using Iq1::Iq1;

    I code(const FeedbackBlock& block, int group, const F* x, F s, I down, F* v) const {
        const Scores scores(block.metric + 64 * group, x, s);
        const uint32_t lanes = lane_bits(down);
        F score;
        I code;
        if (lanes == 0 || lanes == (1u << LANES) - 1)
            code = scores.best(p, OneShift{q[group].of[lanes & 1]}, &score);
        else
            code = scores.best(p, TwoShifts{q[group], down}, &score);
        values_of(p, code, s, down, v);
        return code;
    }

    static void read(const uint8_t* y, I* half, I* level, I* down) {
        for (int lane = 0; lane < LANES; ++lane, y += BYTES) {
            uint16_t word;
            std::memcpy(&word, y, 2);
            (*half)[lane] = word;
            for (int s = 0; s < 8; ++s) {
                std::memcpy(&word, y + 34 + 2 * s, 2);
                level[s][lane] = word >> 12 & 7;
                down[s][lane] = -(word >> 15);
            }
        }
    }

    static void write(I half, const I* level, const I* down, const I* code, uint8_t* const* y) {
        const Points& p = points();
        for (int lane = 0; lane < LANES; ++lane) {
            const auto put = [to = y[lane]](int at, int32_t value) {
                const uint16_t word = static_cast<uint16_t>(value);
                std::memcpy(to + at, &word, 2);
            };
            put(0, half[lane]);
            for (int s = 0; s < 8; ++s) {
                int32_t word = level[s][lane] << 12 | (down[s][lane] & 0x8000);
                for (int g = 0; g < 4; ++g) {
                    const int32_t index = p.index[code[4 * s + g][lane]];
                    y[lane][2 + 4 * s + g] = static_cast<uint8_t>(index);
                    word |= (index >> 8) << (3 * g);
                }
                put(34 + 2 * s, word);
            }
        }
    }
};

// Its shifts are of groups: part of their codes.
struct Iq1M : Iq1 {
    static constexpr int SUB = 16, SHIFTS = 1, BYTES = 56, DOWN = 4096;
    static_assert(DOWN >= PLACES, "a bit beside the place");
    static constexpr auto stock = quantize_iq1_m;
    using Iq1::Iq1;

    I code(const FeedbackBlock& block, int group, const F* x, F s, I, F* v) const {
        const Scores scores(block.metric + 64 * group, x, s);
        F score[2];
        const I up = scores.best(p, OneShift{q[group].of[0]}, &score[0]);
        const I down = scores.best(p, OneShift{q[group].of[1]}, &score[1]);
        const I lower = I(score[1] - DELTA * scores.sum > score[0] + DELTA * scores.sum);
        const I code = select(lower, down, up);
        values_of(p, code, s, lower, v);
        return code | (lower & DOWN);
    }

    static void read(const uint8_t* y, I* half, I* level, I*) {
        for (int lane = 0; lane < LANES; ++lane, y += BYTES) {
            uint16_t words[4];
            std::memcpy(words, y + 48, 8);
            (*half)[lane] = words[0] >> 12 | (words[1] >> 12) << 4 | (words[2] >> 12) << 8 | (words[3] >> 12) << 12;
            for (int s = 0; s < 16; ++s) level[s][lane] = words[s / 4] >> (3 * (s % 4)) & 7;
        }
    }

    static void write(I half, const I* level, const I*, const I* code, uint8_t* const* y) {
        const Points& p = points();
        for (int lane = 0; lane < LANES; ++lane) {
            uint16_t words[4];
            for (int i = 0; i < 4; ++i) {
                int32_t word = (half[lane] >> (4 * i) & 15) << 12;
                for (int s = 0; s < 4; ++s) word |= level[4 * i + s][lane] << (3 * s);
                words[i] = static_cast<uint16_t>(word);
            }
            std::memcpy(y[lane] + 48, words, 8);
            for (int s = 0; s < 16; ++s) {
                int32_t high = 0;
                for (int g = 0; g < 2; ++g) {
                    const int32_t c = code[2 * s + g][lane], index = p.index[c & (DOWN - 1)];
                    y[lane][2 * s + g] = static_cast<uint8_t>(index);
                    high |= (index >> 8 | (c >= DOWN) << 3) << (4 * g);
                }
                y[lane][32 + s] = static_cast<uint8_t>(high);
            }
        }
    }
};

}  // namespace

static_assert(FEEDBACK_IQ1_BYTES == COLS / 8 * sizeof(Quadratic), "what is prepared of a block");

void feedback_iq1_prepare(const FeedbackBlock& block, void* prepared) {
    const Points& p = points();
    Quadratic* const out = static_cast<Quadratic*>(prepared);
    for (int group = 0; group < COLS / 8; ++group) {
        const float* m = block.metric + 64 * group;
        for (int shift = 0; shift < 2; ++shift) {
            float g[HALVES][4], own[2][HALVES], cross[HALVES][4];  // of M's parts: each half's own, and between them
            for (int k = 0; k < HALVES; ++k) {
                for (int i = 0, t = k; i < 4; ++i, t /= 3)
                    g[k][i] = static_cast<float>(t % 3 - 1) + (shift ? -DELTA : DELTA);
                for (int half = 0; half < 2; ++half) {
                    const float* mh = m + 36 * half;
                    float sum = 0.0f;
                    for (int i = 0; i < 4; ++i) {
                        float t = 0.0f;
                        for (int j = 0; j < i; ++j) t += mh[8 * i + j] * g[k][j];
                        sum += g[k][i] * (2.0f * t + mh[8 * i + i] * g[k][i]);
                    }
                    own[half][k] = sum;
                }
                for (int i = 0; i < 4; ++i) {
                    float t = 0.0f;
                    for (int j = 0; j < 4; ++j) t += m[8 * i + 4 + j] * g[k][j];
                    cross[k][i] = 2.0f * t;
                }
            }
            for (int low = 0; low < HALVES; ++low)
                for (int n = p.start[low]; n < p.start[low + 1]; ++n) {
                    const float* c = cross[p.high[n]];
                    const float between = (g[low][0] * c[0] + g[low][1] * c[1]) + (g[low][2] * c[2] + g[low][3] * c[3]);
                    out[group].of[shift][n] = own[0][low] + own[1][p.high[n]] + between;
                }
        }
    }
}

void feedback_iq1_s(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    feedback_rows<Iq1S>(rows, block, search);
}

void feedback_iq1_m(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    feedback_rows<Iq1M>(rows, block, search);
}

}  // namespace quantkit::QK_ISA
