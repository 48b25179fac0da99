// Writes the bytes of K types' super-blocks, LANES at once, from scales and levels. Layouts: k_quants.cpp.
#pragma once
#include "lanes.h"

namespace quantkit::QK_ISA {

namespace {

// Four levels as the bytes of a word.
QK_INLINE I bytes(I a, I b, I c, I d) { return a | (b << 8) | (c << 16) | (d << 24); }

// Packs eight 6-bit scales and minima into 12 bytes, then reads them back from the bytes, as ggml does.
QK_INLINE void pack_scales(I* ls, I* lm, I* words) {
    I q[12];
    for (int j = 0; j < 4; ++j) {
        q[j] = (ls[j] | ((ls[j + 4] >> 4) << 6)) & 0xff;
        q[j + 4] = (lm[j] | ((lm[j + 4] >> 4) << 6)) & 0xff;
        q[j + 8] = (ls[j + 4] & 0xf) | ((lm[j + 4] & 0xf) << 4);
    }
    for (int j = 0; j < 4; ++j) {
        ls[j] = q[j] & 63;
        lm[j] = q[j + 4] & 63;
        ls[j + 4] = (q[j + 8] & 0xf) | ((q[j] >> 6) << 4);
        lm[j + 4] = (q[j + 8] >> 4) | ((q[j + 4] >> 6) << 4);
    }
    for (int i = 0; i < 3; ++i) words[i] = bytes(q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]);
}

// Two-bit fields of 256 levels: byte l of half h has levels 128h + l, +32, +64, +96.
QK_INLINE void store_two_bits(const I* level, uint8_t* const* y, int offset) {
    I words[16];
    for (int half = 0; half < 2; ++half)
        for (int t = 0; t < 8; ++t) {
            I b[4];
            for (int i = 0; i < 4; ++i) {
                const I* l = level + 128 * half + 4 * t + i;
                b[i] = l[0] | (l[32] << 2) | (l[64] << 4) | (l[96] << 6);
            }
            words[8 * half + t] = bytes(b[0], b[1], b[2], b[3]);
        }
    store_lanes<16>(words, y, offset);
}

// `levels(j, level)` gives the 32 levels of group j; head: the three words of pack_scales.
template <int NMAX, typename Levels>
QK_INLINE void store_k45(I hd, I hdm, const I* head, Levels levels, uint8_t* const* y) {
    I words[32], high[32] = {};
    for (int pair = 0; pair < 4; ++pair) {
        I level[64];
        for (int k = 0; k < 2; ++k) levels(2 * pair + k, level + 32 * k);
        for (int t = 0; t < 8; ++t) {
            I b[4];
            for (int i = 0; i < 4; ++i) {
                const I l1 = level[4 * t + i], l2 = level[4 * t + i + 32];
                b[i] = (l1 & 15) | ((l2 & 15) << 4);
                if constexpr (NMAX == 31) high[4 * t + i] |= ((l1 >> 4) | ((l2 >> 4) << 1)) << (2 * pair);
            }
            words[8 * pair + t] = bytes(b[0], b[1], b[2], b[3]);
        }
    }
    store_word(hd | (hdm << 16), y, 0);
    for (int i = 0; i < 3; ++i) store_word(head[i], y, 4 + 4 * i);
    if constexpr (NMAX == 31) {
        I qh[8];
        for (int t = 0; t < 8; ++t) qh[t] = bytes(high[4 * t], high[4 * t + 1], high[4 * t + 2], high[4 * t + 3]);
        store_lanes<8>(qh, y, 16);
    }
    store_lanes<32>(words, y, NMAX == 31 ? 48 : 16);
}

// q: the 16 bytes with scales and minima.
QK_INLINE void store_q2_k(I hd, I hdm, const I* q, const I* level, uint8_t* const* y) {
    for (int i = 0; i < 4; ++i) store_word(bytes(q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]), y, 4 * i);
    store_two_bits(level, y, 16);
    store_word(hd | (hdm << 16), y, 80);
}

// ls: the scales, 0..63; `words_of(j, words)` gives the 16 levels of group j as the bytes of 4 words.
template <typename Words>
QK_INLINE void store_q3_k(I hd, const I* ls, Words words_of, uint8_t* const* y) {
    I q[12] = {};
    for (int j = 0; j < 16; ++j) {
        if (j < 8)
            q[j] = ls[j] & 0xf;
        else
            q[j - 8] |= (ls[j] & 0xf) << 4;
        q[8 + j % 4] |= ((ls[j] >> 4) & 3) << (2 * (j / 4));
    }
    I hmask[8] = {}, qs[16] = {};
    for (int j = 0; j < 16; ++j) {
        I words[4];
        words_of(j, words);
        for (int t = 0; t < 4; ++t) {
            const int at = 4 * (j % 2) + t;  // among the 8 words of 32 values
            hmask[at] |= (words[t] >> 2 & 0x01010101) << (j / 2);
            qs[8 * (j / 8) + at] |= (words[t] & 0x03030303) << (2 * (j / 2 % 4));
        }
    }
    store_lanes<8>(hmask, y, 0);
    store_lanes<16>(qs, y, 32);
    for (int i = 0; i < 3; ++i) store_word(bytes(q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]), y, 96 + 4 * i);
    store_word(hd, y, 108, 2);
}

// sc: the scales, -128..127.
QK_INLINE void store_q6_k(I hd, const I* sc, const I* level, uint8_t* const* y) {
    I ql[32], qh[16];
    for (int half = 0; half < 2; ++half)
        for (int t = 0; t < 8; ++t) {
            I a[4], b[4], h[4];
            for (int i = 0; i < 4; ++i) {
                const I* l = level + 128 * half + 4 * t + i;
                a[i] = (l[0] & 15) | ((l[64] & 15) << 4);
                b[i] = (l[32] & 15) | ((l[96] & 15) << 4);
                h[i] = (l[0] >> 4) | ((l[32] >> 4) << 2) | ((l[64] >> 4) << 4) | ((l[96] >> 4) << 6);
            }
            ql[16 * half + t] = bytes(a[0], a[1], a[2], a[3]);
            ql[16 * half + 8 + t] = bytes(b[0], b[1], b[2], b[3]);
            qh[8 * half + t] = bytes(h[0], h[1], h[2], h[3]);
        }
    store_lanes<32>(ql, y, 0);
    store_lanes<16>(qh, y, 128);
    for (int i = 0; i < 4; ++i)
        store_word(bytes(sc[4 * i] & 255, sc[4 * i + 1] & 255, sc[4 * i + 2] & 255, sc[4 * i + 3] & 255), y,
                   192 + 4 * i);
    store_word(hd, y, 208, 2);
}

}  // namespace

}  // namespace quantkit::QK_ISA
