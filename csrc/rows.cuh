// The arithmetic of one row of logits: what a thread adds up, how the sums of two of them become
// one, what they give for the row, its gradient, and how it is cut into slices.
//
// u is a score of the policy, v one of the anchor. A sum of exponentials is kept relative to the
// largest score in it and without the sampled token: with that added in fp64, a log-probability is
// never positive and keeps its digits. This is plain C++ too, and tested as such.
#pragma once

#include <cmath>
#include <cstdint>

#include "loss.h"

#ifdef __CUDACC__
#define WARP_FAST_BOTH __host__ __device__ __forceinline__
#else
#define WARP_FAST_BOTH inline
#endif

namespace warp_fast {

constexpr int kVector = 8;  // logits that one thread takes at a time
constexpr int kMaxParts = 8;  // blocks of a cluster that every GPU with clusters can run
constexpr int64_t kPart = 65536;  // bytes of a row that one block takes while there may be more
constexpr float kNothing = -200;  // exp is 0 here
constexpr int kStatic = 1024;  // bytes of shared memory that are not for logits

// what is asked for besides the log-probability
template <bool ENTROPY, bool ANCHOR, int EXACT>
struct Asked {
    static constexpr bool entropy = ENTROPY, anchor = ANCHOR;
    static constexpr int exact = EXACT;
};

// How one row is cut: into `parts` blocks of `vectors` each, of which the first `resident` can stay
// in the `shared` bytes that a block has for them. The cuts depend on the width and the GPU alone:
// a row gives the same bits in any batch.
struct Slices {
    int parts;
    int64_t vectors, resident;
    int short_one, short_count;  // the vector that the end of the row cuts, and what is left of it

    WARP_FAST_BOTH int count(int k) const { return k == short_one ? short_count : kVector; }
};

// bytes: of a logit and, where it is kept too, of its anchor; most: blocks that may share a row
inline Slices slices_of(int64_t width, int bytes, int64_t shared, int most = kMaxParts) {
    int parts = 1;
    while (parts < most && width * bytes > parts * kPart) parts *= 2;
    const int64_t all = (width + kVector - 1) / kVector, vectors = (all + parts - 1) / parts;
    const int64_t room = shared / (kVector * bytes);
    const int left = static_cast<int>(width % kVector);
    const int cut = left ? static_cast<int>(width / kVector) : -1;
    return {parts, vectors, room < vectors ? room : vectors, cut, left};
}

// u = outer tanh(inner z) where capped, else outer z
struct Head {
    float inner, outer, slope;
    bool capped;
};

inline Head head_of(double softcap, double temperature) {
    const double cap = softcap > 0 ? softcap : 1;
    return {static_cast<float>(1 / cap), static_cast<float>(cap / temperature),
            static_cast<float>(1 / temperature), softcap > 0};
}

WARP_FAST_BOTH float exponential(float x) {
#ifdef __CUDA_ARCH__
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
    return power;
#else
    return std::exp(x);
#endif
}

WARP_FAST_BOTH double exponential(double x) { return ::exp(x); }

WARP_FAST_BOTH float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdividef(a, b);
#else
    return a / b;
#endif
}

// never part of a fused multiply-add: a score must be the same number everywhere
WARP_FAST_BOTH float product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

// the number, where one is NaN
WARP_FAST_BOTH float larger(float a, float b) { return ::fmaxf(a, b); }
WARP_FAST_BOTH double larger(double a, double b) { return ::fmax(a, b); }

// value * weight with inf * 0 = 0
template <class T>
WARP_FAST_BOTH T weighed(T value, T weight) {
    return weight > 0 ? value * weight : T(0);
}

// what to subtract from scores of which `top` is the largest
template <class T>
WARP_FAST_BOTH T base_of(T top) {
    return top == -T(INFINITY) ? T(0) : top;
}

constexpr float kBend = 0.625f;  // where 1 - t is no longer a loss of digits

// tanh below kBend: a short odd polynomial (Cephes)
WARP_FAST_BOTH float tangent_near_0(float x) {
    const float s = product(x, x);
    float series = ::fmaf(-5.70498872745e-3f, s, 2.06390887954e-2f);
    series = ::fmaf(series, s, -5.37397155531e-2f);
    series = ::fmaf(series, s, 1.33314422036e-1f);
    series = ::fmaf(series, s, -3.33332819422e-1f);
    return ::fmaf(product(x, s), series, x);
}

// good to some ulp of its value
WARP_FAST_BOTH float tangent(float x) {
    const float size = ::fabsf(x), t = exponential(-2 * size);
    const float far = ::copysignf(quotient(1 - t, 1 + t), x);
    return size < kBend ? tangent_near_0(x) : far;
}

// whether all of a vector are so small that no tangent needs an exponential, as most logits are
WARP_FAST_BOTH bool is_near_0(const float (&z)[kVector], const Head& head) {
    float size = 0;
    for (int i = 0; i < kVector; ++i) size = larger(size, ::fabsf(product(z[i], head.inner)));
    return size < kBend;
}

WARP_FAST_BOTH float score(float z, const Head& head) {
    return product(head.capped ? tangent(product(z, head.inner)) : z, head.outer);
}

// the logits of a vector become scores
WARP_FAST_BOTH void to_scores(float (&z)[kVector], const Head& head) {
    if (head.capped && is_near_0(z, head)) {
        for (int i = 0; i < kVector; ++i) z[i] = tangent_near_0(product(z[i], head.inner));
    } else if (head.capped) {
        for (int i = 0; i < kVector; ++i) z[i] = tangent(product(z[i], head.inner));
    }
    if (head.outer == 1) return;
    for (int i = 0; i < kVector; ++i) z[i] = product(z[i], head.outer);
}

// a vector of du / slope becomes dz: 1 - tanh^2 without its cancellation
WARP_FAST_BOTH void through_cap(const float (&z)[kVector], const Head& head,
                                float (&du)[kVector]) {
    if (is_near_0(z, head)) {
        for (int i = 0; i < kVector; ++i) {
            const float t = tangent_near_0(product(z[i], head.inner));
            du[i] *= 1 - t * t;
        }
        return;
    }
    for (int i = 0; i < kVector; ++i) {
        const float t = exponential(-2 * ::fabsf(product(z[i], head.inner))), whole = 1 + t;
        du[i] *= quotient(4 * t, whole * whole);
    }
}

// a difference of scores near the others, which are summed relative to it
WARP_FAST_BOTH float shift_of(float picked, float anchor_picked) {
    const float difference = picked - anchor_picked;
    return ::fabsf(difference) < INFINITY ? difference : 0.0f;
}

// largest u, sum of e = exp(u - top), sum of e (u - top); the first two of the anchor; sum of
// e (u - v - shift), e that of the anchor where the exact KL is forward
template <class T>
struct Sums {
    T top = -T(INFINITY), total = 0, weighted = 0;
    T anchor_top = -T(INFINITY), anchor_total = 0, apart = 0;
};

// the same sums relative to scores that are at least as large
template <class ASKED, class T>
WARP_FAST_BOTH Sums<T> lifted(Sums<T> sums, T top, T anchor_top) {
    const T step = sums.top - base_of(top), scale = exponential(step);
    T apart_scale = scale;
    if constexpr (ASKED::entropy) {
        const T lowered = sums.weighted + (sums.total > 0 ? sums.total * step : T(0));
        sums.weighted = weighed(lowered, scale);
    }
    sums.total *= scale;
    sums.top = top;
    if constexpr (ASKED::anchor) {
        const T anchor_scale = exponential(sums.anchor_top - base_of(anchor_top));
        if (ASKED::exact == kForward) apart_scale = anchor_scale;
        sums.anchor_total *= anchor_scale;
        sums.anchor_top = anchor_top;
    }
    if (ASKED::exact) sums.apart = weighed(sums.apart, apart_scale);
    return sums;
}

// add one vector; a token that does not count has u = v = -inf
template <class ASKED>
WARP_FAST_BOTH void add(Sums<float>& sums, const float (&u)[kVector], const float (&v)[kVector],
                        float shift) {
    float top = sums.top, anchor_top = sums.anchor_top;
    for (int i = 0; i < kVector; ++i) {
        top = larger(top, u[i]);
        if constexpr (ASKED::anchor) anchor_top = larger(anchor_top, v[i]);
    }
    sums = lifted<ASKED>(sums, top, anchor_top);
    const float base = base_of(top), anchor_base = base_of(anchor_top);
    for (int i = 0; i < kVector; ++i) {
        const float low = u[i] - base, e = exponential(low);
        sums.total += e;
        // where e is 0, 0 times a finite number
        if constexpr (ASKED::entropy) sums.weighted += e * larger(low, kNothing);
        if (!ASKED::anchor) continue;
        const float anchor_e = exponential(v[i] - anchor_base);
        sums.anchor_total += anchor_e;
        if (!ASKED::exact) continue;
        sums.apart += weighed(u[i] - v[i] - shift, ASKED::exact == kForward ? anchor_e : e);
    }
}

// One side of a row with its sampled token: relative to the largest score of all, the sums over the
// others, of the sampled token and of both.
struct Whole {
    double top, others, own, total;
};

WARP_FAST_BOTH Whole with_token(double top, double total, double picked) {
    const double most = larger(top, picked), own = exponential(picked - most);
    // written so that a NaN among the others stays one
    const double others = total == 0 ? 0 : total * exponential(top - most);
    return {most, others, own, others + own};
}

// columns of the state of a row, as in kernels/_rows.py
enum RowState : int {
    kTop,
    kShare,  // 1 / sum of exp
    kLow,    // mean of u - top
    kRest,   // probability of the other tokens
    kAnchorTop,
    kAnchorShare,
    kApartShift,
    kApart,  // mean of u - v - shift
    kRowState
};

struct Row {
    double logprob, entropy, anchor_logprob, kl, state[kRowState];
};

// mean of u - v - shift over the row, and from it the KL
template <class ASKED>
WARP_FAST_BOTH void find_kl(Row& row, const Sums<double>& sums, const Whole& policy,
                            const Whole& anchor, float picked, float anchor_picked) {
    constexpr bool kIsForward = ASKED::exact == kForward;
    const Whole& weights = kIsForward ? anchor : policy;
    const double raise = exponential((kIsForward ? sums.anchor_top : sums.top) - weights.top);
    const double shift = shift_of(picked, anchor_picked);
    const double own = static_cast<double>(picked) - static_cast<double>(anchor_picked);
    // the shift is the sampled token's own difference, rounded, unless that is infinite
    const bool counted = ::fabs(own) < INFINITY;
    const double apart = weighed(sums.apart, raise);
    const double mean =
        (apart + weighed(counted ? own - shift : own, weights.own)) / weights.total;
    const double normalizers =
        (policy.top - anchor.top - shift) + (::log(policy.total) - ::log(anchor.total));
    const double kl = kIsForward ? normalizers - mean : mean - normalizers;
    row.kl = kl < 0 ? 0 : kl;
    row.state[kApartShift] = shift;
    // in the gradient, which is in fp32, the token's own is 0
    row.state[kApart] = counted ? apart / weights.total : mean;
}

// everything about a row; anchor_picked: of the same token
template <class ASKED>
WARP_FAST_BOTH Row finished(const Sums<double>& sums, float picked, float anchor_picked) {
    Row row = {};
    const Whole policy = with_token(sums.top, sums.total, picked);
    const double log_total = ::log(policy.total);
    row.logprob = -((policy.top - picked) + log_total);
    row.state[kTop] = policy.top;
    row.state[kShare] = 1 / policy.total;
    row.state[kRest] = policy.others / policy.total;
    if constexpr (ASKED::entropy) {
        const double step = sums.top - policy.top;
        const double others = sums.total == 0 ? 0 : sums.weighted + sums.total * step;
        const double own = weighed(picked - policy.top, policy.own);
        const double low = (weighed(others, exponential(step)) + own) / policy.total;
        row.state[kLow] = low;
        row.entropy = log_total - low;
    }
    if constexpr (ASKED::anchor) {
        const Whole anchor = with_token(sums.anchor_top, sums.anchor_total, anchor_picked);
        row.anchor_logprob = -((anchor.top - anchor_picked) + ::log(anchor.total));
        row.state[kAnchorTop] = anchor.top;
        row.state[kAnchorShare] = 1 / anchor.total;
        if (ASKED::exact) find_kl<ASKED>(row, sums, policy, anchor, picked, anchor_picked);
    }
    return row;
}

// a row's state and upstream gradients, in the precision of an element
struct Coefficients {
    float dlogprob, dentropy, dkl;
    float top, share, low, rest, anchor_top, anchor_share, shift, apart;
};

WARP_FAST_BOTH Coefficients coefficients_of(const float* upstream, const double* state) {
    const auto of = [state](RowState column) { return static_cast<float>(state[column]); };
    return {upstream[0], upstream[1], upstream[2],    of(kTop),         of(kShare),      of(kLow),
            of(kRest),   of(kAnchorTop), of(kAnchorShare), of(kApartShift), of(kApart)};
}

// du of a vector, of which the element `sampled` is the sampled token; -1 where none is
template <int EXACT>
WARP_FAST_BOTH void gradient(const Coefficients& c, const float (&u)[kVector],
                             const float (&v)[kVector], int sampled, float (&du)[kVector]) {
    float p[kVector];
    for (int i = 0; i < kVector; ++i) {
        p[i] = exponential(u[i] - c.top) * c.share;
        du[i] = -c.dlogprob * p[i];
    }
    if (sampled >= 0) {
        for (int i = 0; i < kVector; ++i) du[i] = i == sampled ? c.dlogprob * c.rest : du[i];
    }
    if (c.dentropy != 0) {
        for (int i = 0; i < kVector; ++i) {
            du[i] -= c.dentropy * weighed(u[i] - c.top - c.low, p[i]);
        }
    }
    if (c.dkl == 0) return;  // the KL may be infinite
    for (int i = 0; EXACT == kReverse && i < kVector; ++i) {
        du[i] += c.dkl * weighed(u[i] - v[i] - c.shift - c.apart, p[i]);
    }
    for (int i = 0; EXACT == kForward && i < kVector; ++i) {
        du[i] += c.dkl * (p[i] - exponential(v[i] - c.anchor_top) * c.anchor_share);
    }
}

// 16 bytes that one instruction loads
struct alignas(16) Word {
    uint32_t x[4];
};

// The 16 bytes that begin `skip` bytes, an even number, into an aligned word. What is read is only
// aligned words that begin before `end`: each is on a page of what may be read. From `end` on the
// bytes may be anything.
WARP_FAST_BOTH Word window(const char* place, int skip, const char* end) {
    const Word low = *reinterpret_cast<const Word*>(place);
    if (skip == 0) return low;
    Word high = {};
    const char* next = place + sizeof(Word);
    if (next < end) high = *reinterpret_cast<const Word*>(next);
    uint32_t x[8] = {low.x[0],  low.x[1],  low.x[2],  low.x[3],
                     high.x[0], high.x[1], high.x[2], high.x[3]};
    if (skip & 8) {
        for (int i = 0; i < 6; ++i) x[i] = x[i + 2];
    }
    if (skip & 4) {
        for (int i = 0; i < 5; ++i) x[i] = x[i + 1];
    }
    if (skip & 2) {
        for (int i = 0; i < 4; ++i) x[i] = x[i] >> 16 | x[i + 1] << 16;
    }
    return {x[0], x[1], x[2], x[3]};
}

}  // namespace warp_fast
