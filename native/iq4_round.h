// Error feedback: rounding to the levels of IQ4_NL and IQ4_XS; see feedback_lanes.h.
#pragma once
#include "iq4_levels.h"

namespace quantkit::QK_ISA {

namespace {

struct Iq4Round {
    F scale, inverse;
    const Levels* levels;

    QK_INLINE void set(F s, F) {
        scale = s;
        inverse = inverse_of(s);
    }
    QK_INLINE F operator()(F x, F* level) const {
        const Index i = index_of(*levels, inverse * x);
        *level = to_float(i.value());
        return scale * level_of(*levels, i);
    }
};

}  // namespace

}  // namespace quantkit::QK_ISA
