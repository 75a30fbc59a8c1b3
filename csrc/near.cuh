// The arithmetic of rows.cuh for most rows: sums relative to the score of the sampled token, which
// need no largest score and no care for infinities. They are right where all is finite and the
// token is not too unlikely, as most are that the policy sampled. `holds` says whether they are; if
// not, the row is summed again by `add`.
#pragma once

#include "rows.cuh"

namespace warp_fast {

// What near sums are relative to: the scores of the sampled token.
struct Bases {
    float policy, anchor, shift;
};

// add one vector to near sums; a token that does not count has kNothing more than the bases
template <class ASKED>
WARP_FAST_BOTH void add_near(Sums<float>& sums, const float (&u)[kVector],
                             const float (&v)[kVector], const Bases& bases) {
    for (int i = 0; i < kVector; ++i) {
        const float low = u[i] - bases.policy, e = exponential(low);
        sums.total += e;
        if constexpr (ASKED::entropy) sums.weighted = ::fmaf(e, low, sums.weighted);
        if (!ASKED::anchor) continue;
        const float anchor_e = exponential(v[i] - bases.anchor);
        sums.anchor_total += anchor_e;
        if (!ASKED::exact) continue;
        const float weight = ASKED::exact == kForward ? anchor_e : e;
        sums.apart = ::fmaf(weight, u[i] - v[i] - bases.shift, sums.apart);
    }
}

// Whether near sums are right: the token has a probability of a few percent or more, so that what
// is relative to it keeps its digits, and kNothing can be told from the scores.
template <class ASKED>
WARP_FAST_BOTH bool holds(const Sums<double>& sums, const Bases& bases) {
    constexpr double kMost = 20;
    constexpr float kLargest = 1e6;
    bool right = sums.total < kMost && ::fabsf(bases.policy) < kLargest;
    if (ASKED::entropy) right = right && ::fabs(sums.weighted) < INFINITY;
    if (ASKED::anchor) {
        right = right && sums.anchor_total < kMost && ::fabsf(bases.anchor) < kLargest;
    }
    return right && (!ASKED::exact || ::fabs(sums.apart) < INFINITY);
}

WARP_FAST_BOTH void rebase(double& top, double& share) {
    const double found = static_cast<float>(top - ::log(share));
    share *= exponential(found - top), top = found;
}

// A finite state relative to the log of the sums of exponentials: what has a probability worth
// mentioning is near 0 then, where rounding costs nothing.
WARP_FAST_BOTH void rebase(double (&state)[kRowState]) {
    const double top = state[kTop];
    rebase(state[kTop], state[kShare]);
    state[kLow] -= state[kTop] - top;
    if (state[kAnchorShare] > 0) rebase(state[kAnchorTop], state[kAnchorShare]);
}

// The same gradient where near sums hold, of a state that was rebased, before the softcap:
// dz = e (slope d + level + bend low) + anchor e', with d = u - v - shift and low = u - top.
struct NearCoefficients {
    Bases bases;
    float slope, level, bend, anchor;
    float pull, push;  // of dlogprob: on all but the sampled token, and on that
};

template <int EXACT>
WARP_FAST_BOTH NearCoefficients near_coefficients_of(const float* upstream, const double* state,
                                                     const Head& head) {
    const double outer = head.slope, share = state[kShare] * outer;
    const double dlogprob = upstream[0], dentropy = upstream[1], dkl = upstream[2];
    double level = dentropy * state[kLow];
    if (EXACT == kReverse) level -= dkl * state[kApart];
    if (EXACT == kForward) level += dkl;
    const auto of = [](double value) { return static_cast<float>(value); };
    return {{of(state[kTop]), of(state[kAnchorTop]), of(state[kApartShift])},
            of(EXACT == kReverse ? dkl * share : 0),
            of(level * share),
            of(-dentropy * share),
            of(EXACT == kForward ? -dkl * state[kAnchorShare] * outer : 0),
            of(-dlogprob * share),
            of(dlogprob * state[kRest] * outer)};
}

template <int EXACT>
WARP_FAST_BOTH void gradient_near(const NearCoefficients& c, const float (&u)[kVector],
                                  const float (&v)[kVector], int sampled, float (&dz)[kVector]) {
    const auto of = [&c](float u, float v, float level) {
        const float low = u - c.bases.policy;
        float factor = ::fmaf(c.bend, low, level);
        if (EXACT == kReverse) factor = ::fmaf(c.slope, u - v - c.bases.shift, factor);
        const float own = exponential(low) * factor;
        return EXACT == kForward ? ::fmaf(c.anchor, exponential(v - c.bases.anchor), own) : own;
    };
    const float level = c.level + c.pull;
    for (int i = 0; i < kVector; ++i) dz[i] = of(u[i], v[i], level);
    if (sampled < 0) return;
    for (int i = 0; i < kVector; ++i) {
        const bool picked = i == sampled;
        dz[i] = of(u[i], v[i], picked ? c.level : level) + (picked ? c.push : 0.0f);
    }
}

}  // namespace warp_fast
