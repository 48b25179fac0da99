// IQ1_S and IQ1_M: 256 values a block.
//
//   IQ1_S  50 bytes  half d; 32 bytes: low 8 bits of the grid index of 8 values; 8 words of 16 bits, one for 32
//                    values: 4x3 high bits of the indices, 3 bits of scale, 1 bit: levels shifted down
//   IQ1_M  56 bytes  32 bytes as above; 16 bytes, one for 16 values: twice 3 high bits of an index and 1 bit: levels
//                    shifted down; 4 words of 16 bits: 4x3 bits of scale, 4 bits of the half d
//
// Reproduces quantize_row_iq1_s_impl, quantize_row_iq1_m_impl and iq1_find_best_neighbour2. A lane is a block; its
// groups of 32 (16) values follow each other. What differs from ggml's way is how the best split of a sorted group and
// the best neighbour are found: see search_split, search_split_halves and best_neighbour.
#include <cfloat>
#include <climits>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "blocks.h"
#include "iq1_grid.h"
#include "tables.h"

namespace quantkit::QK_ISA {

namespace {

constexpr int QK_K = 256;
constexpr float DELTA = 0.125f;

// Levels -1, 0, 1 shifted up and shifted down.
constexpr float UP[3] = {-1 + DELTA, DELTA, 1 + DELTA};
constexpr float DOWN[3] = {-1 - DELTA, -DELTA, 1 - DELTA};

// A mask's lanes as bits.
QK_INLINE uint32_t bits_set(I mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#else
    uint32_t out = 0;
    for (int i = 0; i < LANES; ++i) out |= static_cast<uint32_t>(mask[i] & 1) << i;
    return out;
#endif
}

QK_INLINE I lane_numbers() {
    I out;
    for (int i = 0; i < LANES; ++i) out[i] = i;
    return out;
}

QK_INLINE I mask_of_bits(uint32_t bits) {
#if defined(__AVX512F__)
    return reinterpret_cast<I>(_mm512_movm_epi32(static_cast<__mmask16>(bits)));
#else
    return -((splat(static_cast<int32_t>(bits)) >> lane_numbers()) & 1);
#endif
}

// out[lane] = table[index[lane]][lane].
QK_INLINE F gather(const F* table, I index) {
#if defined(__AVX512F__)
    return reinterpret_cast<F>(_mm512_i32gather_ps(reinterpret_cast<__m512i>((index << 4) + lane_numbers()), table, 4));
#elif defined(__AVX2__)
    return reinterpret_cast<F>(_mm256_i32gather_ps(reinterpret_cast<const float*>(table),
                                                   reinterpret_cast<__m256i>((index << 3) + lane_numbers()), 4));
#else
    F out;
    const float* flat = reinterpret_cast<const float*>(table);
    for (int i = 0; i < LANES; ++i) out[i] = flat[index[i] * LANES + i];
    return out;
#endif
}

// a * b + c where the rounding does not matter.
QK_INLINE F about_fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return reinterpret_cast<F>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#else
    return a * b + c;
#endif
}

typedef std::conditional<LANES == 16, uint16_t, uint8_t>::type Bits;  // a mask's lanes

// Where x * x - a > b, give or take rounding.
QK_INLINE Bits square_exceeds(F x, F a, F b) {
#if defined(__AVX512F__)
    const __m512 v = reinterpret_cast<__m512>(x), square = _mm512_fmsub_ps(v, v, reinterpret_cast<__m512>(a));
    return _mm512_cmp_ps_mask(square, reinterpret_cast<__m512>(b), _CMP_GT_OQ);
#else
    return static_cast<Bits>(bits_set(I(x * x - a > b)));
#endif
}

// Which of 16 pairs of masks have a lane set.
QK_INLINE uint32_t pairs_set(const Bits* pairs) {
#if defined(__AVX512F__)
    const __m512i v = _mm512_loadu_si512(pairs);
    return _mm512_test_epi32_mask(v, v);
#elif defined(__AVX2__)
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
    const __m256i v = _mm256_cmpeq_epi16(all, _mm256_setzero_si256());
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return 0xffffu & ~static_cast<uint32_t>(_mm_movemask_epi8(bytes));
#else
    uint32_t out = 0;
    for (int i = 0; i < 16; ++i) out |= static_cast<uint32_t>((pairs[2 * i] | pairs[2 * i + 1]) != 0) << i;
    return out;
#endif
}

// ---------------------------------------------------------------- sorting

// Batcher's odd-even merge sort as a list of pairs, made at compile time.
template <int N>
struct Network {
    int n = 0;
    int a[N * 8] = {}, b[N * 8] = {};
    constexpr void merge(int lo, int size, int step) {
        const int twice = step * 2;
        if (twice < size) {
            merge(lo, size, twice);
            merge(lo + step, size, twice);
            for (int i = lo + step; i + step < lo + size; i += twice) a[n] = i, b[n++] = i + step;
        } else {
            a[n] = lo, b[n++] = lo + step;
        }
    }
    constexpr void sort(int lo, int size) {
        if (size < 2) return;
        sort(lo, size / 2);
        sort(lo + size / 2, size / 2);
        merge(lo, size, 1);
    }
    constexpr Network() { sort(0, N); }
};

template <int N>
constexpr Network<N> NETWORK{};

template <int A, int B>
QK_INLINE void order(I* key) {
    const I a = key[A], b = key[B];
    key[A] = min_of(a, b);
    key[B] = max_of(a, b);
}

template <int N, size_t... P>
QK_INLINE void sort_keys(I* key, std::index_sequence<P...>) {
    (order<NETWORK<N>.a[P], NETWORK<N>.b[P]>(key), ...);
}

// A group of N values in each lane, and the same sorted.
template <int N>
struct Group {
    F x[N], w[N];
    I key[N];         // orders as (x, position) does
    I sorted[N + 1];  // the keys in order, then the largest integer; the low bits are the position
    F sorted_x[N], sorted_w[N];
};

// The general case of `sort`: values whose low bits count. The keys do not hold them, so positions may be out of
// order among values that share the bits above; such lanes are sorted again, stable, and their keys replaced by ranks.
template <int N>
__attribute__((noinline)) void sort_fine(Group<N>& g) {
    for (int round = 0;; ++round) {
        for (int j = 0; j < N; ++j) g.sorted_x[j] = gather(g.x, g.sorted[j] & (N - 1));
        I bad{};
        for (int j = 0; j + 1 < N; ++j) bad |= I(g.sorted_x[j] > g.sorted_x[j + 1]);
        if (round == 1 || !any(bad)) return;
        for (int lane = 0; lane < LANES; ++lane) {
            if (!bad[lane]) continue;
            int position[N];
            for (int j = 0; j < N; ++j) {
                int at = j;
                for (; at > 0 && g.x[position[at - 1]][lane] > g.x[j][lane]; --at) position[at] = position[at - 1];
                position[at] = j;
            }
            for (int j = 0; j < N; ++j) {
                const int32_t key = j * N + position[j];
                g.sorted[j][lane] = key;
                g.key[position[j]][lane] = key;
            }
        }
    }
}

// Sorts by value, equal values by position: what ggml's qsort does (glibc's merges). Fills all but x and w.
template <int N>
QK_INLINE void sort(Group<N>& g) {
    I low{};
    for (int j = 0; j < N; ++j) {
        const I b = bits_of(g.x[j] + 0.0f);  // -0 is equal to 0
        low |= b;
        g.key[j] = ((b ^ ((b >> 31) & 0x7fffffff)) & -N) | j;
    }
    I key[N];
    for (int j = 0; j < N; ++j) key[j] = g.key[j];
    sort_keys<N>(key, std::make_index_sequence<static_cast<size_t>(NETWORK<N>.n)>());
    for (int j = 0; j < N; ++j) g.sorted[j] = key[j];
    g.sorted[N] = splat(INT_MAX);
    if (any((low & (N - 1)) != 0)) {
        sort_fine(g);
    } else {
        for (int j = 0; j < N; ++j) {
            const I k = g.sorted[j] & -N;
            g.sorted_x[j] = float_of(k ^ ((k >> 31) & (0x7fffffff & -N)));
        }
    }
    for (int j = 0; j < N; ++j) g.sorted_w[j] = gather(g.w, g.sorted[j] & (N - 1));
}

// ---------------------------------------------------------------- the split of a group

// What ggml's search over (i1, i2, shift) found: values below `low` have level 0, from `high` on level 2.
// SHIFTS: each part of the group has its own.
template <int SHIFTS>
struct Split {
    F scale;
    I low, high;        // keys
    I down[SHIFTS];     // masks: the levels are shifted down
    I none;             // mask: nothing found
    I nearest[SHIFTS];  // masks: each value has the level nearest to it at this scale, which is positive, with room
};

// Sorts h ascending, where it falls and then rises, and moves v with it.
template <int N>
QK_INLINE void merge_bitonic(F* h, F* v) {
#pragma GCC unroll 32
    for (int i = 0; i < N / 2; ++i) {
        const F a = h[i], b = h[i + N / 2], va = v[i], vb = v[i + N / 2];
        const I swap = I(a > b);
        h[i] = min_of(a, b);
        h[i + N / 2] = max_of(a, b);
#if defined(__AVX512F__)
        v[i] = select(swap, vb, va);
        v[i + N / 2] = select(swap, va, vb);
#else
        const I change = (bits_of(va) ^ bits_of(vb)) & swap;  // cheaper than two blends
        v[i] = float_of(bits_of(va) ^ change);
        v[i + N / 2] = float_of(bits_of(vb) ^ change);
#endif
    }
    if constexpr (N > 2) {
        merge_bitonic<N / 2>(h, v);
        merge_bitonic<N / 2>(h + N / 2, v + N / 2);
    }
}

// About the best score of any split under one shift, as the fraction n / d, and the sum of |w*x|. For each scale
// the best split is known: each value takes its nearest level. As the scale falls from infinity, values leave
// level 1 for an outer one, one after another: those are the splits that can be best. C is by how much the square of
// the level grows then, H = |x| / C half the scale at which it happens.
template <int N>
QK_INLINE void best_on_path(const Group<N>& g, F total_x, F total_w, float shift, float c_negative, float c_positive,
                            F* n_out, F* d_out, F* sum_abs) {
    F h[N], v[N];
    for (int j = 0; j < N; ++j) {
        const F x = g.sorted_x[j];
        h[j] = max_of(x * (1.0f / c_positive), x * (-1.0f / c_negative));
        v[j] = g.sorted_w[j] * select(I(x < 0.0f), splat(c_negative), splat(c_positive));
    }
    merge_bitonic<N>(h, v);
    F qx = total_x * shift, q2 = total_w * (shift * shift);
    const F start = qx;
    F n = qx * qx, d = q2;
    for (int j = N - 1; j >= 0; --j) {
        qx = about_fma(v[j], h[j], qx);
        q2 += v[j];
        const F m = qx * qx;
        const I more = I(m * d > n * q2);
        n = select(more, m, n);
        d = select(more, q2, d);
    }
    *n_out = n;
    *d_out = d;
    *sum_abs = qx - start;
}

// ggml's sum over the three levels, of values (first power) or weights (squares), from the sums below i1, below i2
// and of all.
template <bool SQUARES, typename T>
QK_INLINE T sum_of_levels(const float* q, T s1, T s2, T all) {
    if constexpr (SQUARES) return s1 * q[0] * q[0] + (s2 - s1) * q[1] * q[1] + (all - s2) * q[2] * q[2];
    return s1 * q[0] + (s2 - s1) * q[1] + (all - s2) * q[2];
}

// The highest level, its square, and by how much the square falls at the first and the second cut.
struct Levels {
    float top, square, fall1, fall2;
};
constexpr Levels LEVELS[2] = {{1 + DELTA, 1.265625f, 0.75f, -1.25f}, {1 - DELTA, 0.765625f, 1.25f, -0.75f}};

// Positions of the splits (i1, i2) of N values in ggml's order.
template <int N>
struct Splits {
    static constexpr int COUNT = (N + 1) * (N + 2) / 2;
    uint8_t i1[COUNT] = {}, i2[COUNT] = {};
    constexpr Splits() {
        int n = 0;
        for (int a = 0; a <= N; ++a)
            for (int b = a; b <= N; ++b) i1[n] = static_cast<uint8_t>(a), i2[n++] = static_cast<uint8_t>(b);
    }
};

template <int N>
constexpr Splits<N> SPLITS{};

// ggml's search as it stands, for one lane; the sums are [N + 1][LANES]. Splits with the same i1 are compared with the
// best LANES at a time; those that are not better change nothing, and the first that is becomes the best.
template <int N>
__attribute__((noinline)) void scan_lane(const Group<N>& g, const F* sum_x, const F* sum_w, int lane, Split<1>& out) {
    constexpr int PADDED = N + LANES;
    float sx[PADDED + 1], sw[PADDED + 1];
    for (int j = 0; j <= PADDED; ++j) sx[j] = sum_x[j < N ? j : N][lane], sw[j] = sum_w[j < N ? j : N][lane];
    const F all_x = splat(sx[N]), all_w = splat(sw[N]);
    float best_score = -FLT_MAX, scale = 0;
    int best1 = -1, best2 = -1;
    bool down = false;
    for (int i1 = 0; i1 <= N; ++i1) {
        const F x1 = splat(sx[i1]), w1 = splat(sw[i1]);
        for (int i2 = i1; i2 <= N; i2 += LANES) {
            F x2, w2, sumqx[2], sumq2[2];
            std::memcpy(&x2, sx + i2, sizeof x2);
            std::memcpy(&w2, sw + i2, sizeof w2);
            sumqx[0] = sum_of_levels<false>(UP, x1, x2, all_x);
            sumq2[0] = sum_of_levels<true>(UP, w1, w2, all_w);
            sumqx[1] = sum_of_levels<false>(DOWN, x1, x2, all_x);
            sumq2[1] = sum_of_levels<true>(DOWN, w1, w2, all_w);
            const uint32_t real = N + 1 - i2 >= LANES ? (1u << LANES) - 1 : (1u << (N + 1 - i2)) - 1;
            uint32_t left = real, left_down = real;
            for (;;) {
                const uint32_t ups =
                    left & bits_set(I(sumq2[0] > 0.0f) & I(sumqx[0] * sumqx[0] > best_score * sumq2[0]));
                const uint32_t downs =
                    left_down & bits_set(I(sumq2[1] > 0.0f) & I(sumqx[1] * sumqx[1] > best_score * sumq2[1]));
                if (!(ups | downs)) break;
                const int at = __builtin_ctz(ups | downs);
                down = !(ups >> at & 1);
                scale = sumqx[down][at] / sumq2[down][at];
                best_score = scale * sumqx[down][at];
                best1 = i1, best2 = i2 + at;
                left = real & ~0u << at << 1;
                left_down = down ? left : real & ~0u << at;
            }
        }
    }
    out.none[lane] = best1 < 0 ? -1 : 0;
    if (best1 < 0) return;
    out.scale[lane] = scale;
    out.low[lane] = g.sorted[best1][lane];
    out.high[lane] = g.sorted[best2][lane];
    out.down[0][lane] = down ? -1 : 0;
}

// ggml's exhaustive search. A split's score is sumqx^2 / sumq2; with v = the levels, which are 1 apart,
//   sumqx = X v2 - X1 - X2,  sumq2 = W v2^2 + W1 (v0^2 - v1^2) + W2 (v1^2 - v2^2)
// for the sums X, W of all and X1, W1, X2, W2 of those below i1 and i2.
//
// 1. best_on_path gives the best score, about: `top`. Let t = top (1 - 2^-16). A shift whose best score is below t (1
//    - 2^-10) is left out. Proof: let u = 2^-24, M = sum |w x|, W = sum w, and M^2 < 4 t W (else it is not left out).
//    ggml's sums differ from the true ones by less than 110 u M (33 roundings in each of three prefix sums of at most
//    M, and its own) and 113 u W. A split that scores t in ggml's floats, true sums qx and q2 >= W/64 (no level is
//    nearer to 0 than 1/8), has |qx| > sqrt(t (q2 - 113 u W)) - 110 u M > sqrt(t q2) (1 - 2.2e-4 - 1.1e-4): its true
//    score is above t (1 - 6.5e-4). No true score is above the best on the path (of negative scales a constant is
//    best, where the path starts), and that is computed to within 8e-5: 41 u M in qx > sqrt(t W) / 8.
// 2. All splits whose score may be above t (1 - 2^-20) are listed: those with qx^2 > t q2 - slack, computed the short
//    way. ggml's own floats differ from the short way's: sums of products of at most M = sum |w x| in up to 11
//    roundings give |qx - sumqx| < 11 u M, |qx^2 - sumqx^2| < 29 u M^2, t |q2 - sumq2| < 18 u t W; with the roundings
//    of the comparison and the 2^-20 that is less than slack = 2^-18 (M^2 + t W) = 64 u (M^2 + t W).
// 3. Those are computed exactly as ggml does, in its order, and compared as it does, if their score is above t. ggml's
//    comparison of two scores errs by at most 4.1 u in relation. So if no score lies between t (1 - 2^-20) and t,
//    every split above t replaces any below, none below replaces one above, and what is left at the end is what ggml
//    is left with. Where one lies there, two higher t are tried; their lists are parts of the same.
// 4. A lane in which no t will do, with none above t, or out of the range in which the bounds hold, is searched as
//    ggml does.
template <int N>
__attribute__((noinline)) void search_split(const Group<N>& g, Split<1>& out) {
    F sum_x[N + 1], sum_w[N + 1];
    sum_x[0] = sum_w[0] = F{};
    for (int j = 0; j < N; ++j) {
        sum_x[j + 1] = sum_x[j] + g.sorted_w[j] * g.sorted_x[j];
        sum_w[j + 1] = sum_w[j] + g.sorted_w[j];
    }
    const F all_x = sum_x[N], all_w = sum_w[N];
    F n_up, d_up, n_down, d_down, sum_abs;
    best_on_path(g, all_x, all_w, DELTA, 0.75f, 1.25f, &n_up, &d_up, &sum_abs);
    best_on_path(g, all_x, all_w, -DELTA, 1.25f, 0.75f, &n_down, &d_down, &sum_abs);
    const I downward = I(n_down * d_up > n_up * d_down);
    const F n = select(downward, n_down, n_up), d = select(downward, d_down, d_up);
    const F t = n / d * (1.0f - 0x1p-16f);
    const F scope = sum_abs * sum_abs + t * all_w, slack = scope * 0x1p-18f;
    // the products of best_on_path are in range too: at most M^2 W, at least t W^2 / 4096 where it matters
    I odd = ~(I(n > 1e-30f) & I(n < 1e30f) & I(d > 1e-24f) & I(d < 1e30f) & I(scope < 1e32f) &
              I(sum_abs * sum_abs * all_w < 1e37f) & I(t * all_w * all_w > 1e-31f));
    const F other_n = select(downward, n_up, n_down), other_d = select(downward, d_up, d_down);
    const I both = ~I(other_n < t * (1.0f - 0x1p-10f) * other_d) | ~I(sum_abs * sum_abs < 4.0f * t * all_w);

    constexpr int COUNT = Splits<N>::COUNT, PADDED = (COUNT + 15) / 16 * 16;
    alignas(64) Bits hits[PADDED][2] = {};  // of the better shift, of the other
    const uint32_t turned = bits_set(downward);
    for (int role = 0; role < 2; ++role) {
        const uint32_t wanted = role ? bits_set(both & ~odd) : ~0u;
        if (!wanted) break;
        const I down = role ? ~downward : downward;
        const auto level = [&](float Levels::*field) {
            return select(down, splat(LEVELS[1].*field), splat(LEVELS[0].*field));
        };
        const F fall1 = t * level(&Levels::fall1), fall2 = t * level(&Levels::fall2);
        const F qx0 = all_x * level(&Levels::top), t0 = t * all_w * level(&Levels::square) - slack;
        F t2[N + 1];
        for (int i = 0; i <= N; ++i) t2[i] = sum_w[i] * fall2;
        Bits(*hit)[2] = hits;
        for (int i1 = 0; i1 <= N; ++i1) {
            const F x1 = qx0 - sum_x[i1], t1 = t0 + sum_w[i1] * fall1;
            for (int i2 = i1; i2 <= N; ++i2, ++hit)
                (*hit)[role] = static_cast<Bits>(square_exceeds(x1 - sum_x[i2], t1, t2[i2]) & wanted);
        }
    }

    F scale{};
    I low{}, high{}, is_down{}, pending = ~odd;
    F below_low{}, from_low{}, below_high{}, from_high{};  // values on both sides of the two cuts
    const F least = splat(-FLT_MAX), most = splat(FLT_MAX);
    for (const float room : {0x1p-16f, 0x1p-17f, 0x1p-18f}) {
        const F limit = n / d * (1.0f - room), sure = limit * (1.0f - 0x1p-20f);
        const uint32_t wanted = bits_set(pending);
        F best = splat(-FLT_MAX);
        I found{}, between{};
        for (int chunk = 0; chunk < PADDED; chunk += 16) {
            for (uint32_t some = pairs_set(hits[chunk]); some; some &= some - 1) {
                const int c = chunk + __builtin_ctz(some);
                const uint32_t better = hits[c][0], other = hits[c][1];
                for (int shift = 0; shift < 2; ++shift) {
                    const uint32_t flip = shift ? ~turned : turned;  // where this shift is not the better one
                    const uint32_t lanes = ((better & ~flip) | (other & flip)) & wanted;
                    if (!lanes) continue;
                    const int i1 = SPLITS<N>.i1[c], i2 = SPLITS<N>.i2[c];
                    const F sumqx = shift ? sum_of_levels<false>(DOWN, sum_x[i1], sum_x[i2], all_x)
                                          : sum_of_levels<false>(UP, sum_x[i1], sum_x[i2], all_x);
                    const F sumq2 = shift ? sum_of_levels<true>(DOWN, sum_w[i1], sum_w[i2], all_w)
                                          : sum_of_levels<true>(UP, sum_w[i1], sum_w[i2], all_w);
                    const F square = sumqx * sumqx;
                    const I open = mask_of_bits(lanes) & I(sumq2 > 0.0f);
                    const I above = open & I(square > limit * sumq2);
                    between |= open & ~above & I(square > sure * sumq2);
                    const I take = above & I(square > best * sumq2);
                    const F ratio = sumqx / sumq2;
                    scale = select(take, ratio, scale);
                    best = select(take, ratio * sumqx, best);
                    low = select(take, g.sorted[i1], low);
                    high = select(take, g.sorted[i2], high);
                    is_down = select(take, splat(-shift), is_down);
                    below_low = select(take, i1 > 0 ? g.sorted_x[i1 - 1] : least, below_low);
                    from_low = select(take, i1 < N ? g.sorted_x[i1] : most, from_low);
                    below_high = select(take, i2 > 0 ? g.sorted_x[i2 - 1] : least, below_high);
                    from_high = select(take, i2 < N ? g.sorted_x[i2] : most, from_high);
                    found |= take;
                }
            }
        }
        pending &= ~found | between;
        if (!any(pending)) break;
    }
    odd |= pending;
    out.scale = scale;
    out.low = low;
    out.high = high;
    out.down[0] = is_down;
    out.none = I{};
    const F middle = select(is_down, splat(-DELTA), splat(DELTA));
    const F cut_low = scale * (middle - 0.5f), cut_high = scale * (middle + 0.5f), room = scale * 0x1p-18f;
    out.nearest[0] = ~odd & I(scale > 0.0f) & I(below_low <= cut_low - room) & I(from_low >= cut_low + room) &
                  I(below_high <= cut_high - room) & I(from_high >= cut_high + room);
    if (any(odd))
        for (int lane = 0; lane < LANES; ++lane)
            if (odd[lane]) scan_lane(g, sum_x, sum_w, lane, out);
}

// ---------------------------------------------------------------- neighbours

// The costs of the three levels of each of eight values, as tables that repeat every 128 bits.
QK_INLINE void cost_tables(const float* x, const float* w, float scale, const float* levels, F* table) {
#if defined(__AVX2__)
    const __m256 xv = _mm256_loadu_ps(x), wv = _mm256_loadu_ps(w);
    __m256 cost[3];
    for (int l = 0; l < 3; ++l) {
        const __m256 diff = _mm256_sub_ps(_mm256_set1_ps(scale * levels[l]), xv);
        cost[l] = _mm256_mul_ps(_mm256_mul_ps(wv, diff), diff);
    }
    const __m256 low = _mm256_unpacklo_ps(cost[0], cost[1]), high = _mm256_unpackhi_ps(cost[0], cost[1]);
    const __m256 both[4] = {_mm256_shuffle_ps(low, cost[2], 0x44), _mm256_shuffle_ps(low, cost[2], 0x5e),
                            _mm256_shuffle_ps(high, cost[2], 0xa4), _mm256_shuffle_ps(high, cost[2], 0xfe)};
    for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
        const __m512 t = _mm512_castps256_ps512(both[i]);
        table[i] = reinterpret_cast<F>(_mm512_shuffle_f32x4(t, t, 0x00));
        table[i + 4] = reinterpret_cast<F>(_mm512_shuffle_f32x4(t, t, 0x55));
#else
        table[i] = reinterpret_cast<F>(_mm256_permute2f128_ps(both[i], both[i], 0x00));
        table[i + 4] = reinterpret_cast<F>(_mm256_permute2f128_ps(both[i], both[i], 0x11));
#endif
    }
#else
    for (int i = 0; i < 8; ++i)
        for (int l = 0; l < LANES; ++l) {
            const float diff = scale * levels[l % 4 % 3] - x[i];
            table[i][l] = w[i] * diff * diff;
        }
#endif
}

// out[i] = table[i with its two low bits replaced by those of index[i]].
QK_INLINE F lookup(F table, I index) {
#if defined(__AVX512F__)
    return reinterpret_cast<F>(_mm512_permutevar_ps(reinterpret_cast<__m512>(table), reinterpret_cast<__m512i>(index)));
#elif defined(__AVX2__)
    return reinterpret_cast<F>(_mm256_permutevar_ps(reinterpret_cast<__m256>(table), reinterpret_cast<__m256i>(index)));
#else
    F out;
    for (int i = 0; i < LANES; ++i) out[i] = table[(i & ~3) | (index[i] & 3)];
    return out;
#endif
}

QK_INLINE I widen(const uint16_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<I>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    return reinterpret_cast<I>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    I out;
    for (int i = 0; i < LANES; ++i) out[i] = p[i];
    return out;
#endif
}

// The least of the lanes, in every lane.
QK_INLINE F least_of(F x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m512 v = reinterpret_cast<__m512>(x);
    __m256 m = _mm256_min_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
    __m256 m = reinterpret_cast<__m256>(x);
#endif
    __m128 n = _mm_min_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    n = _mm_min_ps(n, _mm_movehl_ps(n, n));
    n = _mm_min_ss(n, _mm_shuffle_ps(n, n, 1));
    return splat(_mm_cvtss_f32(n));
#else
    float least = x[0];
    for (int i = 1; i < LANES; ++i) least = x[i] < least ? x[i] : least;
    return splat(least);
#endif
}

// iq1_find_best_neighbour2: the pattern of the neighbour nearest to x, the first of equals. x and w are a lane's eight
// values in a row.
//
// The near ones of the list do where each value has the level nearest to it: then |scale * q - x| in floats grows with
// each step away from that level (rounding is monotone, and there is room at the cuts between two levels), so the cost
// of a value does not fall, nor does the sum.
QK_INLINE uint32_t best_neighbour(const uint16_t* list, int n, const float* x, const float* w, float scale,
                                  const float* levels) {
    constexpr int PART = 64;
    F table[8];
    cost_tables(x, w, scale, levels, table);
    float best = FLT_MAX;
    int found = 0;
    for (int start = 0; start < n; start += PART) {
        F sums[PART / LANES], low = splat(FLT_MAX);
        const int steps = ((n - start < PART ? n - start : PART) + LANES - 1) / LANES;
        for (int step = 0; step < steps; ++step) {
            const I p = widen(list + start + LANES * step);
            F sum = lookup(table[0], p);
#pragma GCC unroll 8
            for (int i = 1; i < 8; ++i) sum += lookup(table[i], p >> (2 * i));
            sums[step] = sum;
            low = min_of(sum, low);
        }
        low = least_of(low);
        uint64_t equal = 0;
        for (int step = 0; step < steps; ++step)
            equal |= static_cast<uint64_t>(bits_set(I(sums[step] == low))) << (LANES * step);
        if (low[0] < best) {
            best = low[0];
            found = start + __builtin_ctzll(equal);
        }
    }
    return list[found];
}

// ---------------------------------------------------------------- IQ1_M's split

// One of IQ1_M's four pairs of shifts: of the first and the second eight values.
struct Shifts {
    bool down[2];
};
constexpr Shifts SHIFTS_M[4] = {{{false, false}}, {{false, true}}, {{true, false}}, {{true, true}}};

// Sums below each position of the sorted group, of the first and the second eight values.
struct HalfSums {
    F x[2][17], w[2][17];
};

// sumqx and sumq2 of a split under a pair of shifts, as ggml computes them.
template <typename T>
QK_INLINE void score_halves(const Shifts& shifts, const T (&x1)[2], const T (&x2)[2], const T (&x)[2], const T (&w1)[2],
                            const T (&w2)[2], const T (&w)[2], T* sumqx, T* sumq2) {
    T qx[2], q2[2];
    for (int h = 0; h < 2; ++h) {
        const Levels& l = LEVELS[shifts.down[h]];
        qx[h] = x[h] * l.top - (x1[h] + x2[h]);
        q2[h] = w[h] * l.top * l.top + w1[h] * l.fall1 + w2[h] * l.fall2;
    }
    *sumqx = qx[0] + qx[1];
    *sumq2 = q2[0] + q2[1];
}

// ggml's search as it stands, for one lane.
__attribute__((noinline)) void scan_lane_halves(const Group<16>& g, const HalfSums& sums, int lane, Split<2>& out) {
    constexpr int N = 16;
    float x[N + 1][2], w[N + 1][2];
    for (int j = 0; j <= N; ++j)
        for (int h = 0; h < 2; ++h) x[j][h] = sums.x[h][j][lane], w[j][h] = sums.w[h][j][lane];
    float best_score = -FLT_MAX, scale = 0;
    int best1 = -1, best2 = -1, best_k = 0;
    for (int i1 = 0; i1 <= N; ++i1)
        for (int i2 = i1; i2 <= N; ++i2)
            for (int k = 0; k < 4; ++k) {
                float sumqx, sumq2;
                score_halves(SHIFTS_M[k], x[i1], x[i2], x[N], w[i1], w[i2], w[N], &sumqx, &sumq2);
                if (sumq2 > 0 && sumqx * sumqx > best_score * sumq2) {
                    scale = sumqx / sumq2;
                    best_score = scale * sumqx;
                    best1 = i1, best2 = i2, best_k = k;
                }
            }
    out.none[lane] = best1 < 0 ? -1 : 0;
    if (best1 < 0) return;
    out.scale[lane] = scale;
    out.low[lane] = g.sorted[best1][lane];
    out.high[lane] = g.sorted[best2][lane];
    for (int h = 0; h < 2; ++h) out.down[h][lane] = SHIFTS_M[best_k].down[h] ? -1 : 0;
}

// ggml's exhaustive search over (i1, i2) and four pairs of shifts, in the way of search_split: `top` is the best score
// of some splits, about; all that may be better are listed, and compared as ggml does. The short way's sums and ggml's
// differ by |qx - sumqx| < 14 u M, |qx^2 - sumqx^2| < 35 u M^2, t |q2 - sumq2| < 54 u t W with the 2^-20, less than
// slack = 2^-17 (M^2 + t W).
__attribute__((noinline)) void search_split_halves(const Group<16>& g, Split<2>& out) {
    constexpr int N = 16, COUNT = Splits<N>::COUNT, PADDED = (COUNT + 15) / 16 * 16;
    HalfSums sums;
    for (int h = 0; h < 2; ++h) sums.x[h][0] = sums.w[h][0] = F{};
    for (int j = 0; j < N; ++j) {
        const I second = I((g.sorted[j] & 8) != 0);
        const F w = g.sorted_w[j], wx = w * g.sorted_x[j];
        for (int h = 0; h < 2; ++h) {
            const I here = h ? second : ~second;
            sums.x[h][j + 1] = select(here, sums.x[h][j] + wx, sums.x[h][j]);
            sums.w[h][j + 1] = select(here, sums.w[h][j] + w, sums.w[h][j]);
        }
    }
    F x[N + 1], fall1[4][N + 1], fall2[4][N + 1], qx0[4], q20[4];
    for (int i = 0; i <= N; ++i) {
        x[i] = sums.x[0][i] + sums.x[1][i];
        for (int k = 0; k < 4; ++k) {
            const Levels &a = LEVELS[SHIFTS_M[k].down[0]], &b = LEVELS[SHIFTS_M[k].down[1]];
            fall1[k][i] = sums.w[0][i] * a.fall1 + sums.w[1][i] * b.fall1;
            fall2[k][i] = sums.w[0][i] * a.fall2 + sums.w[1][i] * b.fall2;
        }
    }
    for (int k = 0; k < 4; ++k) {
        const Levels &a = LEVELS[SHIFTS_M[k].down[0]], &b = LEVELS[SHIFTS_M[k].down[1]];
        qx0[k] = sums.x[0][N] * a.top + sums.x[1][N] * b.top;
        q20[k] = sums.w[0][N] * a.square + sums.w[1][N] * b.square;
    }
    const F all_x = x[N], all_w = sums.w[0][N] + sums.w[1][N];

    // the best of equal shifts; from its scale, a good one of unequal shifts in two steps: the best split for the scale
    // (the two cuts are independent), then the best scale for the split
    F n, d, n_down, d_down, sum_abs;
    best_on_path(g, all_x, all_w, DELTA, 0.75f, 1.25f, &n, &d, &sum_abs);
    best_on_path(g, all_x, all_w, -DELTA, 1.25f, 0.75f, &n_down, &d_down, &sum_abs);
    const I downward = I(n_down * d > n * d_down);
    n = select(downward, n_down, n);
    d = select(downward, d_down, d);
    const F start = sqrt_of(n) / d;
    for (int k = 1; k < 3; ++k) {
        F s = start;
        for (int step = 0; step < 2; ++step) {
            F least1{}, least2{}, x1{}, x2{}, w1{}, w2{};
            for (int i = 1; i <= N; ++i) {
                const F twice = x[i] + x[i];
                const F f1 = about_fma(s, fall1[k][i], twice), f2 = about_fma(s, fall2[k][i], twice);
                const I less1 = I(f1 < least1), less2 = I(f2 < least2);
                least1 = select(less1, f1, least1);
                x1 = select(less1, x[i], x1);
                w1 = select(less1, fall1[k][i], w1);
                least2 = select(less2, f2, least2);
                x2 = select(less2, x[i], x2);
                w2 = select(less2, fall2[k][i], w2);
            }
            const F qx = qx0[k] - x1 - x2, q2 = q20[k] + w1 + w2;
            const I more = I(qx * qx * d > n * q2);
            n = select(more, qx * qx, n);
            d = select(more, q2, d);
            s = qx / q2;
        }
    }
    const F t = n / d * (1.0f - 0x1p-16f), scope = sum_abs * sum_abs + t * all_w, slack = scope * 0x1p-17f;
    I odd = ~(I(n > 1e-24f) & I(n < 1e30f) & I(d > 1e-20f) & I(d < 1e30f) & I(scope < 1e32f));

    alignas(64) Bits hits[PADDED][4];
    std::memset(hits[COUNT], 0, sizeof hits[0] * (PADDED - COUNT));
    F t2[4][N + 1];
    for (int k = 0; k < 4; ++k)
        for (int i = 0; i <= N; ++i) t2[k][i] = t * fall2[k][i];
    Bits(*hit)[4] = hits;
    for (int i1 = 0; i1 <= N; ++i1) {
        F x1[4], t1[4];
        for (int k = 0; k < 4; ++k) {
            x1[k] = qx0[k] - x[i1];
            t1[k] = t * (q20[k] + fall1[k][i1]) - slack;
        }
        for (int i2 = i1; i2 <= N; ++i2, ++hit)
            for (int k = 0; k < 4; ++k) {
                const F qx = x1[k] - x[i2];
                (*hit)[k] = square_exceeds(qx, t1[k], t2[k][i2]);
            }
    }

    F scale{};
    I low{}, high{}, down[2] = {}, pending = ~odd;
    for (const float room : {0x1p-16f, 0x1p-17f, 0x1p-18f}) {
        const F limit = n / d * (1.0f - room), sure = limit * (1.0f - 0x1p-20f);
        const uint32_t wanted = bits_set(pending);
        F best = splat(-FLT_MAX);
        I found{}, between{};
        for (int chunk = 0; chunk < PADDED; chunk += 8) {
            for (uint32_t some = pairs_set(hits[chunk]); some; some &= some - 1) {
                const int pair = __builtin_ctz(some), c = chunk + pair / 2;
                for (int k = pair % 2 * 2; k < pair % 2 * 2 + 2; ++k) {
                    const uint32_t lanes = hits[c][k] & wanted;
                    if (!lanes) continue;
                    const int i1 = SPLITS<N>.i1[c], i2 = SPLITS<N>.i2[c];
                    const auto at = [](const F(&s)[2][17], int i, F(&to)[2]) { to[0] = s[0][i], to[1] = s[1][i]; };
                    F xs[3][2], ws[3][2], sumqx, sumq2;
                    at(sums.x, i1, xs[0]), at(sums.x, i2, xs[1]), at(sums.x, N, xs[2]);
                    at(sums.w, i1, ws[0]), at(sums.w, i2, ws[1]), at(sums.w, N, ws[2]);
                    score_halves(SHIFTS_M[k], xs[0], xs[1], xs[2], ws[0], ws[1], ws[2], &sumqx, &sumq2);
                    const F square = sumqx * sumqx;
                    const I open = mask_of_bits(lanes) & I(sumq2 > 0.0f);
                    const I above = open & I(square > limit * sumq2);
                    between |= open & ~above & I(square > sure * sumq2);
                    const I take = above & I(square > best * sumq2);
                    const F ratio = sumqx / sumq2;
                    scale = select(take, ratio, scale);
                    best = select(take, ratio * sumqx, best);
                    low = select(take, g.sorted[i1], low);
                    high = select(take, g.sorted[i2], high);
                    for (int h = 0; h < 2; ++h) down[h] = select(take, splat(SHIFTS_M[k].down[h] ? -1 : 0), down[h]);
                    found |= take;
                }
            }
        }
        pending &= ~found | between;
        if (!any(pending)) break;
    }
    odd |= pending;
    out.scale = scale;
    out.low = low;
    out.high = high;
    out.none = I{};
    for (int h = 0; h < 2; ++h) {
        out.down[h] = down[h];
        const F middle = select(down[h], splat(-DELTA), splat(DELTA));
        const F cut_low = scale * (middle - 0.5f), cut_high = scale * (middle + 0.5f), room = scale * 0x1p-18f;
        I good = ~odd & I(scale > 0.0f);
        for (int j = 8 * h; j < 8 * h + 8; ++j) {
            const F over_low = g.x[j] - cut_low, over_high = g.x[j] - cut_high;
            good &= I(select(I(g.key[j] >= low), over_low, -over_low) >= room) &
                    I(select(I(g.key[j] >= high), over_high, -over_high) >= room);
        }
        out.nearest[h] = good;
    }
    if (any(odd))
        for (int lane = 0; lane < LANES; ++lane)
            if (odd[lane]) scan_lane_halves(g, sums, lane, out);
}

// ---------------------------------------------------------------- blocks

// A tile of blocks: LANES of them, values and weights one a lane, and the weights also one block a row.
struct Tile {
    F x[QK_K];
    const float* const* rows;
    float weight[LANES][QK_K];
};

template <bool WEIGHTS>
QK_INLINE void load(Tile& tile, const float* const* xs, const float* const* ws) {
    tile.rows = xs;
    load_lanes<QK_K>(xs, tile.x);
    F squares{};
    for (int k = 0; k < QK_K; ++k) squares += tile.x[k] * tile.x[k];
    const F sigma2 = 2.0f * squares / 256.0f;
    for (int lane = 0; lane < LANES; ++lane)
        for (int k = 0; k < QK_K; k += LANES) {
            F v, q;
            std::memcpy(&v, xs[lane] + k, sizeof v);
            if constexpr (WEIGHTS) {
                std::memcpy(&q, ws[lane] + k, sizeof q);
                q = q * sqrt_of(sigma2[lane] + v * v);
            } else {
                q = v * v;
            }
            std::memcpy(tile.weight[lane] + k, &q, sizeof q);
        }
}

// What a group of N values became.
template <int N, int SHIFTS>
struct Coded {
    F scale;  // 0 where nothing was found; then all levels are 0, the first entry of the grid
    I down[SHIFTS];
    I pattern[N / 8], index[N / 8];
};

// Quantizes group ib of a tile, all but the scale's rounding.
template <int N, int SHIFTS>
QK_INLINE void code_group(const Iq1Grid& grid, const Tile& tile, int ib, float least, Group<N>& g,
                          Coded<N, SHIFTS>& out) {
    constexpr int K = N / 8;
    const float* rows[LANES];
    for (int lane = 0; lane < LANES; ++lane) rows[lane] = tile.weight[lane] + N * ib;
    load_lanes<N>(rows, g.w);
    F largest{};
    for (int j = 0; j < N; ++j) {
        g.x[j] = tile.x[N * ib + j];
        largest = max_of(largest, abs_of(g.x[j]));
    }
    sort(g);
    Split<SHIFTS> split;
    if constexpr (SHIFTS == 1)
        search_split(g, split);
    else
        search_split_halves(g, split);
    const I dead = split.none | I(largest < least);
    const I negative = I(split.scale < 0.0f);  // then the levels are turned round
    F scale = select(negative, -split.scale, split.scale);
    uint32_t lowered[SHIFTS], nearest[SHIFTS];
    for (int h = 0; h < SHIFTS; ++h) {
        out.down[h] = (split.down[h] ^ negative) & ~dead;
        lowered[h] = bits_set(out.down[h]);
        nearest[h] = bits_set(split.nearest[h]);
    }
    for (int k = 0; k < K; ++k) {
        I p{};
        for (int j = 0; j < 8; ++j) {
            const I key = g.key[8 * k + j];
            p -= (I(key >= split.low) + I(key >= split.high)) << (2 * j);
        }
        out.pattern[k] = select(negative, 0xaaaa - p, p) & ~dead;  // the first entry of the grid
    }

    // codes in the order (eight, lane); those off the grid are listed first, so that the searches follow each other
    // closely
    int32_t* patterns = reinterpret_cast<int32_t*>(out.pattern);
    int32_t* indices = reinterpret_cast<int32_t*>(out.index);
    struct Open {
        int code, ternary;
    } open[K * LANES];
    int n_open = 0;
    for (int code = 0; code < K * LANES; ++code) {
        const int ternary = grid.ternary(static_cast<uint32_t>(patterns[code]));
        const int index = grid.index[ternary];
        indices[code] = index;
        open[n_open] = {code, ternary};
        n_open += index < 0;
    }
    uint32_t off_grid = 0;
    for (int i = 0; i < n_open; ++i) {
        const int code = open[i].code, lane = code % LANES, k = code / LANES, h = SHIFTS == 1 ? 0 : k;
        const int at = N * ib + 8 * k;
        const Iq1Grid::List list = (nearest[h] >> lane & 1 ? grid.near : grid.all)[open[i].ternary];
        const uint32_t found =
            best_neighbour(grid.neighbours + list.begin, static_cast<int>(list.n), tile.rows[lane] + at,
                           tile.weight[lane] + at, scale[lane], lowered[h] >> lane & 1 ? DOWN : UP);
        patterns[code] = static_cast<int32_t>(found);
        indices[code] = grid.index[grid.ternary(found)];
        off_grid |= 1u << lane;
    }

    // the scale again, where a neighbour was taken
    F sumqx{}, sumq2{};
    for (int k = 0; k < K; ++k) {
        const F first = select(out.down[SHIFTS == 1 ? 0 : k], splat(DOWN[0]), splat(UP[0]));
        for (int j = 0; j < 8; ++j) {
            const F q = to_float((out.pattern[k] >> (2 * j)) & 3) + first;
            const F wq = g.w[8 * k + j] * q;
            sumqx += wq * g.x[8 * k + j];
            sumq2 += wq * q;
        }
    }
    const I again = mask_of_bits(off_grid) & I(sumqx > 0.0f) & I(sumq2 > 0.0f);
    scale = select(again, sumqx / sumq2, scale);
    out.scale = select(dead, F{}, scale);
}

// Three bits of scale: the odd multiple of d nearest to `scale`.
QK_INLINE I scale_bits(F id, F scale) { return max_of(I{}, min_of(splat(7), nearest_int(0.5f * (id * scale - 1.0f)))); }

void tile_iq1_s(const Iq1Grid& grid, const float* const* xs, const float* const* ws, uint8_t* const* y) {
    constexpr int GROUPS = 8;
    alignas(64) Tile tile;
    load<true>(tile, xs, ws);
    alignas(64) Group<32> g;
    F scales[GROUPS], max_scale{};
    I down[GROUPS], low[GROUPS], high[GROUPS];
    for (int ib = 0; ib < GROUPS; ++ib) {
        Coded<32, 1> c;
        code_group(grid, tile, ib, 1e-12f, g, c);
        scales[ib] = c.scale;
        down[ib] = c.down[0];
        low[ib] = (c.index[0] & 255) | (c.index[1] & 255) << 8 | (c.index[2] & 255) << 16 | c.index[3] << 24;
        high[ib] = c.index[0] >> 8 | (c.index[1] >> 8) << 3 | (c.index[2] >> 8) << 6 | (c.index[3] >> 8) << 9;
        max_scale = max_of(max_scale, c.scale);
    }
    const I some = I(max_scale != 0.0f);
    const F d = max_scale / 15.0f, id = 1.0f / d;
    for (int ib = 0; ib < GROUPS; ++ib) high[ib] |= some & ((scale_bits(id, scales[ib]) | (down[ib] & 8)) << 12);
    store_word(some & to_half(d * 1.125f), y, 0, 2);
    store_lanes<8>(low, y, 2);
    for (int i = 0; i < 4; ++i) store_word(high[2 * i] | high[2 * i + 1] << 16, y, 34 + 4 * i);
}

template <bool WEIGHTS>
void tile_iq1_m(const Iq1Grid& grid, const float* const* xs, const float* const* ws, uint8_t* const* y) {
    constexpr int GROUPS = 16;
    alignas(64) Tile tile;
    load<WEIGHTS>(tile, xs, ws);
    alignas(64) Group<16> g;
    alignas(64) F weights[QK_K];
    Coded<16, 2> coded[GROUPS];
    F max_scale{};
    for (int ib = 0; ib < GROUPS; ++ib) {
        code_group(grid, tile, ib, 1e-7f, g, coded[ib]);
        for (int j = 0; j < 16; ++j) weights[16 * ib + j] = g.w[j];
        max_scale = max_of(max_scale, coded[ib].scale);
    }
    const I some = I(max_scale != 0.0f);
    F d = max_scale / 15.0f, sumqx{}, sumq2{};
    const F id = 1.0f / d;
    I low[8] = {}, high[4] = {}, sc[4] = {};
    for (int ib = 0; ib < GROUPS; ++ib) {
        const Coded<16, 2>& c = coded[ib];
        const I l = scale_bits(id, c.scale);
        const F factor = to_float(2 * l + 1);
        sc[ib / 4] |= l << (3 * (ib % 4));
        low[ib / 2] |= ((c.index[0] & 255) | (c.index[1] & 255) << 8) << (16 * (ib % 2));
        high[ib / 4] |= (c.index[0] >> 8 | (c.index[1] >> 8) << 4 | (some & ((c.down[0] & 0x08) | (c.down[1] & 0x80))))
                        << (8 * (ib % 4));
        for (int k = 0; k < 2; ++k) {
            const F first = select(c.down[k], splat(DOWN[0]), splat(UP[0]));
            for (int j = 0; j < 8; ++j) {
                const int at = 16 * ib + 8 * k + j;
                const F q = (to_float((c.pattern[k] >> (2 * j)) & 3) + first) * factor;
                const F wq = weights[at] * q;
                sumqx += wq * tile.x[at];
                sumq2 += wq * q;
            }
        }
    }
    d = select(I(sumq2 > 0.0f), sumqx / sumq2, d);
    const I half = to_half(d * 1.1125f);
    for (int i = 0; i < 4; ++i) sc[i] = some & (sc[i] | ((half >> (4 * i)) & 15) << 12);
    store_lanes<8>(low, y, 0);
    for (int i = 0; i < 4; ++i) store_word(high[i], y, 32 + 4 * i);
    for (int i = 0; i < 2; ++i) store_word(sc[2 * i] | sc[2 * i + 1] << 16, y, 48 + 4 * i);
}

}  // namespace

void quantize_iq1_s(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    if (!w) throw std::invalid_argument("quantize: IQ1_S needs the importance of each column");
    const Iq1Grid& grid = iq1_grid();
    for_each_tile<QK_K, 50>(x, y, n_rows, n_cols, w,
                            [&grid](auto xs, auto ws, auto ys) { tile_iq1_s(grid, xs, ws, ys); });
}

void quantize_iq1_m(const float* x, uint8_t* y, size_t n_rows, size_t n_cols, const float* w) {
    const Iq1Grid& grid = iq1_grid();
    if (w)
        for_each_tile<QK_K, 56>(x, y, n_rows, n_cols, w,
                                [&grid](auto xs, auto ws, auto ys) { tile_iq1_m<true>(grid, xs, ws, ys); });
    else
        for_each_tile<QK_K, 56>(x, y, n_rows, n_cols, w,
                                [&grid](auto xs, auto ws, auto ys) { tile_iq1_m<false>(grid, xs, ws, ys); });
}

}  // namespace quantkit::QK_ISA
