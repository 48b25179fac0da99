// What the error feedback of the IQ types shares. LANES rows of one block at once, a row a lane: no lane knows of the
// others, so a row's bytes depend on nothing beside it.
//
// A block of 256 columns is made sub-block by sub-block: the columns that share a scale (and, IQ1_S, a shift). What is
// known of a row at the start of one is a path: the current weights, the block's scale d, the squared errors so far.
// Each path is continued with several scales of the sub-block, each by groups of eight columns under the metric M, the
// errors of a group passed on to the next; of all continuations the MOST_PATHS with the least sum of squared errors are
// the paths from there on. At first one path for each of some d near ggml's goes alone; the best d goes again with
// others beside it. What can no longer become one of the best is given up on the way: that changes no result.
#pragma once
#include <cmath>
#include <memory>

#include "feedback.h"
#include "grid_lanes.h"

namespace quantkit::QK_ISA {

namespace {

constexpr int COLS = 256;
constexpr int32_t MOST_HALF = 0x7bff;  // the largest finite one

// How far `search` goes.
constexpr float FACTORS[] = {1.0f, 0.93f, 1.07f, 0.87f, 1.14f};  // of ggml's d
constexpr int MOST_PATHS = 8;   // of each that is kept

// e = r U_GG^-1 of a group of eight columns with r = x - v; gives the sum of squares of e.
QK_INLINE F errors_of(const float* inverse, const F* x, const F* v, F* e) {
    F r[8], sum{};
    for (int i = 0; i < 8; ++i) r[i] = x[i] - v[i];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
        F t = r[0] * inverse[j];
#pragma GCC unroll 8
        for (int i = 1; i <= j; ++i) t += r[i] * inverse[8 * i + j];
        e[j] = t;
        sum += t * t;
    }
    return sum;
}

// x[from..to) -= e U of the n columns at c.
template <int N>
QK_INLINE void pass_on(const FeedbackBlock& block, int c, const F* e, F* x, int from, int to) {
    for (int k = from; k < to; ++k) {
        const float* u = block.u + static_cast<size_t>(c) * block.stride + k;
        F t = x[k];
#pragma GCC unroll 32
        for (int i = 0; i < N; ++i) t -= e[i] * u[static_cast<size_t>(i) * block.stride];
        x[k] = t;
    }
}

// Words of all lanes from a table.
QK_INLINE I look_up(const int32_t* table, I index) {
#if defined(__AVX512F__)
    return reinterpret_cast<I>(_mm512_i32gather_epi32(reinterpret_cast<__m512i>(index), table, 4));
#elif defined(__AVX2__)
    return reinterpret_cast<I>(_mm256_i32gather_epi32(table, reinterpret_cast<__m256i>(index), 4));
#else
    I out;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = table[index[lane]];
    return out;
#endif
}

// One type T has: SUB (columns to a scale), LEVELS (scales), SHIFTS (2 where a sub-block has a shift of its own),
// BYTES; WINDOW (how many levels to either side of the one nearest to ggml's scale are tried); `stock`, quantkit's
// quantizer; read and write of blocks; `scale` of a level, and the level nearest to a scale; and `code`: the codes of a
// group of eight and their values.
template <typename T>
class Beam {
    static constexpr int SUB = T::SUB, SUBS = COLS / SUB, GROUPS = SUB / 8, OPTIONS = (2 * T::WINDOW + 1) * T::SHIFTS;

    // A sub-block made with one scale from one path.
    struct Made {
        F cost, e[SUB];
        I code[GROUPS], level, down;
    };
    struct Path {
        F x[COLS], e[COLS], cost, d;
        I half, level[SUBS], down[SUBS], code[COLS / 8];
    };
    // What ggml chose, on the weights at the block's start.
    struct Start {
        F x[COLS], d, scale[SUBS];
        I level[SUBS], down[SUBS];
    };

    Path paths_[2][MOST_PATHS], best_;
    Made made_[MOST_PATHS * OPTIONS];
    int parent_[MOST_PATHS * OPTIONS];
    F cost_[MOST_PATHS * OPTIONS];
    Start start_;
    alignas(64) float rows_[LANES][COLS];

    // `limit`: the least cost that is of no use.
    void make(const T& type, const FeedbackBlock& block, int sub, const Path& p, I level, I down, F limit,
              Made& out) const {
        F x[SUB];
        std::memcpy(x, p.x + sub * SUB, sizeof x);
        const F s = T::scale(p.d, level);
        out.cost = p.cost, out.level = level, out.down = down;
        for (int g = 0; g < GROUPS; ++g) {
            F v[8];
            const int group = sub * GROUPS + g;
            out.code[g] = type.code(block, group, x + 8 * g, s, down, v);
            out.cost += errors_of(block.inverse + 64 * group, x + 8 * g, v, out.e + 8 * g);
            if (!any(I(out.cost < limit))) {
                out.cost = splat(INFINITY);
                return;
            }
            pass_on<8>(block, 8 * group, out.e + 8 * g, x - sub * SUB, 8 * (group + 1), (sub + 1) * SUB);
        }
        out.cost = select(I(out.cost < limit), out.cost, splat(INFINITY));
    }

    // Where a lane takes continuation `c` of `from`, it becomes path q.
    static QK_INLINE void take(I mask, const Made& c, const Path& from, int sub, Path& q) {
        const auto put = [mask](auto& to, const auto& v) QK_LAMBDA { to = select(mask, v, to); };
        put(q.d, from.d), put(q.half, from.half);
        for (int k = 0; k < sub; ++k) put(q.level[k], from.level[k]), put(q.down[k], from.down[k]);
        for (int k = 0; k < sub * GROUPS; ++k) put(q.code[k], from.code[k]);
        for (int k = 0; k < sub * SUB; ++k) put(q.e[k], from.e[k]);
        for (int k = (sub + 1) * SUB; k < COLS; ++k) put(q.x[k], from.x[k]);
        put(q.level[sub], c.level), put(q.down[sub], c.down);
        for (int g = 0; g < GROUPS; ++g) put(q.code[sub * GROUPS + g], c.code[g]);
        for (int i = 0; i < SUB; ++i) put(q.e[sub * SUB + i], c.e[i]);
    }

    // The path of least cost of those that grow from paths_[0][0]; its cost is infinite where none is below `limit`.
    // Without `wide` ggml's choices of the sub-blocks' scales.
    const Path& run(const T& type, const FeedbackBlock& block, int most, bool wide, F limit) {
        int n = 1, side = 0;
        for (int sub = 0; sub < SUBS; ++sub, side ^= 1) {
            const Path* const from = paths_[side];
            Path* const to = paths_[side ^ 1];
            F worst[MOST_PATHS];  // the costs of the best so far, in order
            for (F& cost : worst) cost = limit;
            int n_made = 0;
            for (int i = 0; i < (wide ? 2 * T::WINDOW + 1 : 1); ++i) {
                const int off = i % 2 ? i / 2 + 1 : -(i / 2);  // the likely first
                for (int p = 0; p < n; ++p) {
                    const I level = wide ? T::level_at(start_.scale[sub], from[p].d) + off : start_.level[sub];
                    const I outside = I(level < 0) | I(level >= T::LEVELS);
                    if (!any(~outside)) continue;
                    const I inside = max_of(I{}, min_of(splat(T::LEVELS - 1), level));
                    for (int shift = 0; shift < (wide ? T::SHIFTS : 1); ++shift) {
                        Made& m = made_[n_made];
                        parent_[n_made] = p;
                        make(type, block, sub, from[p], inside, wide ? splat(-shift) : start_.down[sub],
                             worst[most - 1], m);
                        m.cost = select(outside, splat(INFINITY), m.cost);
                        cost_[n_made++] = m.cost;
                        F t = m.cost;
                        for (int b = 0; b < most; ++b) {
                            const F other = max_of(worst[b], t);
                            worst[b] = min_of(worst[b], t);
                            t = other;
                        }
                    }
                }
            }
            n = n_made < most ? n_made : most;
            for (int b = 0; b < n; ++b) {
                F least = cost_[0];
                I which{};
                for (int i = 1; i < n_made; ++i) {
                    const I less = I(cost_[i] < least);
                    least = select(less, cost_[i], least);
                    which = select(less, splat(i), which);
                }
                for (int i = 0; i < n_made; ++i) {
                    const I mask = I(which == i);
                    if (!any(mask)) continue;
                    cost_[i] = select(mask, splat(INFINITY), cost_[i]);
                    take(mask, made_[i], from[parent_[i]], sub, to[b]);
                }
                to[b].cost = least;  // infinite where a lane has no other left: then it took one twice
                pass_on<SUB>(block, sub * SUB, to[b].e + sub * SUB, to[b].x, (sub + 1) * SUB, COLS);
            }
            if (!any(I(to[0].cost < limit))) return to[0];
        }
        return paths_[side][0];
    }

    const Path& run_at(const T& type, const FeedbackBlock& block, F factor, int most, bool wide, F limit) {
        Path& p = paths_[0][0];
        std::memcpy(p.x, start_.x, sizeof p.x);
        p.cost = F{};
        p.half = min_of(to_half(start_.d * factor), splat(MOST_HALF));
        p.d = from_half(p.half);
        return run(type, block, most, wide, limit);
    }

    void take_best(I mask, const Path& p) {
        const auto put = [mask](auto& to, const auto& v) QK_LAMBDA { to = select(mask, v, to); };
        put(best_.cost, p.cost), put(best_.half, p.half);
        for (int k = 0; k < COLS; ++k) put(best_.e[k], p.e[k]);
        for (int k = 0; k < SUBS; ++k) put(best_.level[k], p.level[k]), put(best_.down[k], p.down[k]);
        for (int k = 0; k < COLS / 8; ++k) put(best_.code[k], p.code[k]);
    }

    // The block's d that is best for the codes found. Errors are linear in the values: e = e(x) - e(v), and e(v) goes
    // with d.
    void refit(const FeedbackBlock& block) {
        F x[COLS], whole[COLS], vw{}, vv{}, cost{};
        const F none[8] = {};
        std::memcpy(x, start_.x, sizeof x);
        for (int c = 0; c < COLS; c += 8) {
            errors_of(block.inverse + 8 * c, x + c, none, whole + c);
            pass_on<8>(block, c, whole + c, x, c + 8, COLS);
        }
        for (int k = 0; k < COLS; ++k) {
            const F v = whole[k] - best_.e[k];
            vw += v * whole[k];
            vv += v * v;
        }
        const F d = from_half(best_.half);
        const I half = min_of(to_half(d * (vw / vv)), splat(MOST_HALF));
        const F ratio = from_half(half) / d;
        F e[COLS];
        for (int k = 0; k < COLS; ++k) {
            e[k] = whole[k] - ratio * (whole[k] - best_.e[k]);
            cost += e[k] * e[k];
        }
        const I better = I(vw > 0.0f) & I(cost < best_.cost);
        best_.half = select(better, half, best_.half);
        for (int k = 0; k < COLS; ++k) best_.e[k] = select(better, e[k], best_.e[k]);
    }

    void search(const T& type, const FeedbackBlock& block) {
        F factor = splat(FACTORS[0]);
        const auto look = [&](F f, int most) {
            const Path& p = run_at(type, block, f, most, true, best_.cost);
            const I better = I(p.cost < best_.cost);
            take_best(better, p);
            factor = select(better, f, factor);
        };
        for (const float f : FACTORS) look(splat(f), 1);
        look(factor, MOST_PATHS);
    }

public:
    void tile(const T& type, const FeedbackBlock& block, const float* const* xs, uint8_t* const* ys, float* const* es,
              bool search_scales) {
        load_lanes<COLS>(xs, start_.x);
        I refused{};
        for (int k = 0; k < COLS; ++k) {  // no sum of squares may overflow
            const I fits = I(abs_of(start_.x[k]) < 1e9f);
            refused |= ~fits;
            start_.x[k] = select(fits, start_.x[k], F{});
            for (int lane = 0; lane < LANES; ++lane) rows_[lane][k] = start_.x[k][lane];
        }
        uint8_t stock[LANES * T::BYTES];
        T::stock(rows_[0], stock, LANES, COLS, block.importance);
        I half;
        T::read(stock, &half, start_.level, start_.down);
        refused |= I(half > MOST_HALF);
        start_.d = from_half(min_of(half, splat(MOST_HALF)));
        for (int s = 0; s < SUBS; ++s) start_.scale[s] = T::scale(start_.d, start_.level[s]);
        best_.cost = splat(INFINITY);
        take_best(splat(-1), run_at(type, block, splat(1.0f), 1, false, best_.cost));
        if (search_scales) search(type, block);
        refit(block);
        T::write(best_.half, best_.level, best_.down, best_.code, ys);
        best_.e[0] = select(refused, splat(NAN), best_.e[0]);  // which the driver refuses
        for (int lane = 0; lane < LANES; ++lane)
            for (int k = 0; k < COLS; ++k) es[lane][k] = best_.e[k][lane];
    }
};

template <typename T>
void feedback_rows(const FeedbackRows& rows, const FeedbackBlock& block, bool search) {
    static thread_local std::unique_ptr<Beam<T>> beam;  // more than some threads' stacks have room for
    if (!beam) beam.reset(new Beam<T>());
    const T type(block);
    uint8_t spare[T::BYTES];
    float spare_e[COLS];
    for (size_t r = 0; r < rows.n; r += LANES) {
        const float* xs[LANES];
        uint8_t* ys[LANES];
        float* es[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            const bool real = r + static_cast<size_t>(lane) < rows.n;
            xs[lane] = rows.x[real ? r + static_cast<size_t>(lane) : rows.n - 1];
            ys[lane] = real ? rows.y[r + static_cast<size_t>(lane)] : spare;
            es[lane] = real ? rows.e[r + static_cast<size_t>(lane)] : spare_e;
        }
        beam->tile(type, block, xs, ys, es, search);
    }
}

}  // namespace

}  // namespace quantkit::QK_ISA
