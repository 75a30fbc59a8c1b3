// Rows of logits on CPU: running softmax statistics of a block of columns, and their gradient.
//
// u = softcap tanh(z / softcap) / temperature. A row is taken kBlock columns at a time, each block
// through a buffer in the first-level cache; sums are in fp32 inside a block and in fp64 between
// blocks, in an order that depends on neither the threads nor on other rows.
#include "cpu.h"
#include "simd.h"

namespace warp_fast {
namespace {

constexpr int64_t kBlock = 512;
constexpr float kInfinity = __builtin_inff();
constexpr float kNothing = -200;  // exp is 0 here, and 0 times this is 0

struct alignas(32) Block {
    float x[kBlock];
};

WARP_FAST_INLINE f32x8 all(float value) { return f32x8{} + value; }

WARP_FAST_INLINE f32x8 at(const Block& block, int64_t j) {
    return load_bytes<f32x8>(reinterpret_cast<const char*>(block.x + j), sizeof(f32x8));
}

WARP_FAST_INLINE void put(Block& block, int64_t j, f32x8 value) {
    std::memcpy(block.x + j, &value, sizeof(value));
}

// exp(x) = 2^n (1 + p): what both functions below are made of
struct Split {
    f32x8 p, power;
};

WARP_FAST_INLINE Split split(f32x8 x) {
    const f32x8 rounder = all(0x1.8p23f);
    const f32x8 shifted = x * 0x1.715476p0f + rounder;
    const f32x8 n = shifted - rounder;
    // ln 2 in two parts, the first short enough for n times it to be exact
    const f32x8 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    f32x8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    // the low bits of what is shifted are n: they move to where the exponent is
    const f32x8 power = bit_cast<f32x8>((bit_cast<u32x8>(shifted) << 23) + (127u << 23));
    return {p * (r * r) + r, power};
}

// within 2 ulp for x from -87 to 88, 0 below; NaN stays
WARP_FAST_INLINE f32x8 exponential(f32x8 x) {
    const Split of = split(x);
    const f32x8 e = of.power * of.p + of.power;
    return x < all(-87) ? all(0) : e;
}

// within 3 ulp; exactly 1 from 9.1 on
WARP_FAST_INLINE f32x8 tangent(f32x8 x) {
    const u32x8 sign = bit_cast<u32x8>(x) & 0x80000000u;
    const f32x8 size = bit_cast<f32x8>(bit_cast<u32x8>(x) ^ sign);
    // of expm1(2 |x|), which keeps the digits of a small x
    const Split of = split(2.0f * (size > all(9.1f) ? all(9.1f) : size));
    const f32x8 t = of.power * of.p + (of.power - 1.0f);
    return bit_cast<f32x8>(bit_cast<u32x8>(t / (t + 2.0f)) | sign);
}

WARP_FAST_INLINE float sum8(f32x8 v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

template <int CODE>
void load_block(const void* base, int64_t first, int64_t count, Block& block) {
    for (int64_t j = 0; j < count; j += kLanes) {
        const Lanes lanes = load<CODE>(base, first + j, count - j);
        put(block, j, lanes.a);
        put(block, j + 8, lanes.b);
    }
}

template <int CODE>
void store_block(void* base, int64_t first, int64_t count, const Block& block) {
    for (int64_t j = 0; j < count; j += kLanes) {
        store<CODE>(base, first + j, {at(block, j), at(block, j + 8)}, count - j, false);
    }
}

void load_columns(const LossMatrix& from, int64_t first, int64_t count, Block& block) {
    switch (from.code) {
        case kBf16:
            return load_block<kBf16>(from.address, first, count, block);
        case kFp16:
            return load_block<kFp16>(from.address, first, count, block);
        default:
            return load_block<kFp32>(from.address, first, count, block);
    }
}

void store_columns(const LossMatrix& to, int64_t first, int64_t count, const Block& block) {
    switch (to.code) {
        case kBf16:
            return store_block<kBf16>(to.address, first, count, block);
        case kFp16:
            return store_block<kFp16>(to.address, first, count, block);
        default:
            return store_block<kFp32>(to.address, first, count, block);
    }
}

// Take the sampled token out of a block.
void leave_out(Block& u, int64_t j, double* target) {
    *target = u.x[j];
    u.x[j] = -kInfinity;
}

// u of some columns, -inf behind the last; slope: du/dz times the temperature, if there is a cap
void scores(const LossCall& call, const LossMatrix& matrix, int64_t first, int64_t count, Block& u,
            Block* slope) {
    load_columns(matrix, first, count, u);
    const double cap = call.softcap > 0 ? call.softcap : 1;
    const float scale = static_cast<float>(cap / call.temperature);
    if (call.softcap > 0) {
        const float narrow = static_cast<float>(1 / call.softcap);
        for (int64_t j = 0; j < count; j += 8) {
            const f32x8 x = tangent(at(u, j) * narrow);
            if (slope) put(*slope, j, 1.0f - x * x);
            put(u, j, x * scale);
        }
    } else if (scale != 1) {
        for (int64_t j = 0; j < count; j += 8) put(u, j, at(u, j) * scale);
    }
    for (int64_t j = count; j % kLanes; ++j) u.x[j] = -kInfinity;
}

float largest(const Block& u, int64_t count) {
    f32x8 best = all(-kInfinity), also = best;
    for (int64_t j = 0; j < count; j += kLanes) {
        best = at(u, j) > best ? at(u, j) : best;
        also = at(u, j + 8) > also ? at(u, j + 8) : also;
    }
    best = also > best ? also : best;
    float top = best[0];
    for (int lane = 1; lane < 8; ++lane) top = best[lane] > top ? best[lane] : top;
    return top;
}

// Move the sums of one side to a new maximum; moment and cross are sums with its weights, or null.
void lift(double* side, float top, double* moment, double* cross) {
    const double step = side[kMax] - top;
    if (!(step < 0)) return;
    const double factor = __builtin_exp(step);
    if (moment) *moment = factor > 0 ? factor * (*moment + step * side[kSum]) : 0;
    side[kSum] *= factor;
    if (cross) *cross = factor > 0 ? factor * *cross : 0;
    side[kMax] = top;
}

// a row of nothing but -inf has no maximum to subtract
float shift_of(const double* side) {
    return side[kMax] == -static_cast<double>(kInfinity) ? 0 : static_cast<float>(side[kMax]);
}

// what both sides are apart by their maxima
double difference_of(const double* side, const double* anchor_side) {
    return static_cast<double>(shift_of(side)) - shift_of(anchor_side);
}

// Add a block to one side, and to its moment if there is one. cross: the sum of e (u - other), each
// below the maximum of its side: a large difference of both would hide the digits of a small KL.
template <bool MOMENT, bool CROSS>
void add_block(double* side, const Block& u, int64_t count, double* moment, const Block& other,
               const double* other_side, double* cross) {
    const f32x8 other_shift = all(CROSS ? shift_of(other_side) : 0);
    const f32x8 shift = all(shift_of(side));
    f32x8 sum[2] = {}, moments[2] = {}, crosses[2] = {};
    for (int64_t j = 0; j < count; j += kLanes) {
        // two at a time: one alone waits for itself
        for (int i = 0; i < 2; ++i) {
            const f32x8 d = at(u, j + 8 * i) - shift, e = exponential(d);
            sum[i] += e;
            if (MOMENT) moments[i] += e * (d < all(kNothing) ? all(kNothing) : d);
            if (CROSS) {
                const f32x8 apart = d - (at(other, j + 8 * i) - other_shift);
                crosses[i] += e == all(0) ? all(0) : e * apart;
            }
        }
    }
    side[kSum] += sum8(sum[0] + sum[1]);
    if (MOMENT) *moment += sum8(moments[0] + moments[1]);
    if (CROSS) *cross += sum8(crosses[0] + crosses[1]);
}

void add_block(double* side, const Block& u, int64_t count, double* moment, const Block& v,
               const double* other, double* cross) {
    if (moment && cross) return add_block<true, true>(side, u, count, moment, v, other, cross);
    if (moment) return add_block<true, false>(side, u, count, moment, v, other, cross);
    if (cross) return add_block<false, true>(side, u, count, moment, v, other, cross);
    add_block<false, false>(side, u, count, moment, v, other, cross);
}

LossMatrix row_of(const LossMatrix& matrix, int64_t row) {
    const int64_t bytes = matrix.code == kFp32 ? 4 : 2;
    const int64_t elements = row * matrix.stride + row / matrix.run * matrix.jump;
    LossMatrix found = matrix;
    found.address = static_cast<char*>(matrix.address) + elements * bytes;
    return found;
}

void row_stats(const LossCall& call, int64_t row) {
    Block u, v;
    const int64_t source = call.index ? call.index[row] : row;
    const int64_t target = call.token_ids[row] - call.first;
    const LossMatrix logits = row_of(call.logits, source), anchor = row_of(call.anchor, source);
    double* side = call.state + row * kStateWidth;
    double* anchor_side = side + kSideWidth;
    double* moment = call.entropy ? side + kMoment : nullptr;
    double* reverse = call.exact_kl == kReverse ? side + kCross : nullptr;
    double* forward = call.exact_kl == kForward ? side + kCross : nullptr;
    for (int64_t j = 0; j < call.width; j += kBlock) {
        const int64_t count = call.width - j < kBlock ? call.width - j : kBlock;
        const bool here = j <= target && target < j + count;
        // without an anchor there may be no memory behind a side
        const double before = anchor.address ? difference_of(side, anchor_side) : 0;
        scores(call, logits, j, count, u, nullptr);
        if (here) leave_out(u, target - j, side + kTarget);
        lift(side, largest(u, count), moment, reverse);
        if (anchor.address) {
            scores(call, anchor, j, count, v, nullptr);
            if (here) leave_out(v, target - j, anchor_side + kTarget);
            lift(anchor_side, largest(v, count), nullptr, forward);
            const double step = difference_of(side, anchor_side) - before;
            if (reverse) *reverse -= step * side[kSum];
            if (forward) *forward += step * anchor_side[kSum];
            add_block(anchor_side, v, count, nullptr, u, side, forward);
        }
        add_block(side, u, count, moment, v, anchor_side, reverse);
    }
}

// du = p (A + B u + C (u - v - M)) - Q q, all divided by the temperature, u and v below their
// shifts; C is of a reverse KL, Q of a forward one
template <bool ENTROPY, ExactKl EXACT>
void block_gradient(const float* c, Block& u, const Block& v, int64_t count) {
    for (int64_t j = 0; j < count; j += 8) {
        const f32x8 d = at(u, j) - c[kShift], e = exponential(d);
        f32x8 slope = all(c[kFactor]);
        if (ENTROPY) slope += d * c[kMomentFactor];
        if (EXACT == kReverse) {
            slope += (d - (at(v, j) - c[kAnchorShift]) - c[kMean]) * c[kCrossFactor];
        }
        f32x8 du = e * slope;
        if (ENTROPY || EXACT == kReverse) du = e == all(0) ? all(0) : du;
        if (EXACT == kForward) du -= exponential(at(v, j) - c[kAnchorShift]) * c[kAnchorFactor];
        put(u, j, du);
    }
}

template <bool ENTROPY>
void block_gradient(const float* c, Block& u, const Block& v, int64_t count) {
    if (c[kCrossFactor] != 0) return block_gradient<ENTROPY, kReverse>(c, u, v, count);
    if (c[kAnchorFactor] != 0) return block_gradient<ENTROPY, kForward>(c, u, v, count);
    block_gradient<ENTROPY, kNoKl>(c, u, v, count);
}

void block_gradient(const float* c, Block& u, const Block& v, int64_t count) {
    if (c[kMomentFactor] != 0) return block_gradient<true>(c, u, v, count);
    block_gradient<false>(c, u, v, count);
}

void row_gradient(const LossCall& call, int64_t row) {
    Block u, v, slope;
    const int64_t source = call.index ? call.index[row] : row;
    const int64_t target = call.token_ids[row] - call.first;
    const LossMatrix logits = row_of(call.logits, source), anchor = row_of(call.anchor, source);
    const LossMatrix gradient = row_of(call.gradient, source);
    const float* c = call.coefficients + row * kCoefficients;
    const bool capped = call.softcap > 0;
    for (int64_t j = 0; j < call.width; j += kBlock) {
        const int64_t count = call.width - j < kBlock ? call.width - j : kBlock;
        scores(call, logits, j, count, u, &slope);
        if (anchor.address) scores(call, anchor, j, count, v, nullptr);
        block_gradient(c, u, v, count);
        if (j <= target && target < j + count) u.x[target - j] = c[kOfTarget];
        for (int64_t i = 0; capped && i < count; i += 8) put(u, i, at(u, i) * at(slope, i));
        store_columns(gradient, j, count, u);
    }
}

template <class Body>
void for_each_row(const LossCall& call, Body body) {
#pragma omp parallel for schedule(static) num_threads(call.threads)
    for (int64_t row = 0; row < call.rows; ++row) body(call, row);
}

}  // namespace

namespace WARP_FAST_ISA {

void loss_stats(const LossCall& call) { for_each_row(call, row_stats); }

void loss_gradient(const LossCall& call) { for_each_row(call, row_gradient); }

}  // namespace WARP_FAST_ISA
}  // namespace warp_fast
