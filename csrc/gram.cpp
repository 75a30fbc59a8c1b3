// The Gram matrices of task vectors on CPU: sums in fp64 over chunks of fixed size.
//
// Products of two fp32 differences are exact in fp64, so fusing them with the sum changes no bit.
#include "weights.h"

namespace warp_fast {
namespace {

constexpr int kMostPaired = 3;    // policies whose pairs are summed in one go
constexpr int kMostStaged = 16;   // policies whose task vectors are held in the L1 cache
constexpr int64_t kStaged = 256;  // elements held at a time
constexpr int kTile = 3;          // policies whose pairs with others are summed in one go
constexpr int kMostFirst = 5;     // those others where they begin with the same policies
constexpr int kMostOthers = 4;    // and elsewhere, so that all sums fit the registers

// four of the sixteen elements in fp64
WARP_FAST_INLINE f64x4 quarter(const Lanes& value, int q) {
    const f32x8 half = q < 2 ? value.a : value.b;
#ifdef __AVX2__
    const __m128 part =
        q % 2 == 0 ? _mm256_castps256_ps128(half) : _mm256_extractf128_ps(half, 1);
    return _mm256_cvtps_pd(part);
#else
    const int first = 4 * (q % 2);
    return f64x4{half[first], half[first + 1], half[first + 2], half[first + 3]};
#endif
}

// four elements in fp64
WARP_FAST_INLINE f64x4 quad_at(const float* from) {
#ifdef __AVX2__
    return _mm256_cvtps_pd(_mm_loadu_ps(from));
#else
    return f64x4{from[0], from[1], from[2], from[3]};
#endif
}

WARP_FAST_INLINE double total(f64x4 sum) { return (sum[0] + sum[2]) + (sum[1] + sum[3]); }

// all pairs of a few policies
template <int CODE, int A>
void pairs(const MergeEntry& entry, int64_t begin, int64_t end, double* row) {
    constexpr int kPairs = A * (A + 1) / 2;
    // two sums per pair where registers allow it: one alone waits for itself
    constexpr int kSums = kPairs <= 3 ? 2 : 1;
    f64x4 sum[kSums][kPairs] = {};
    const auto add = [&](int64_t at, int64_t lanes) __attribute__((always_inline)) {
        const Lanes start = load_column<CODE>(entry, 0, at, lanes);
        Lanes delta[A];
        for (int i = 0; i < A; ++i) {
            const Lanes stop = load_column<CODE>(entry, 1 + i, at, lanes);
            delta[i] = {stop.a - start.a, stop.b - start.b};
        }
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
            f64x4 wide[A];
            for (int i = 0; i < A; ++i) wide[i] = quarter(delta[i], q);
            int p = 0;
            for (int i = 0; i < A; ++i) {
                for (int j = i; j < A; ++j, ++p) sum[q % kSums][p] += wide[i] * wide[j];
            }
        }
    };
    int64_t at = begin;
    for (; at + kLanes <= end; at += kLanes) add(at, kLanes);
    if (at < end) add(at, end - at);
    for (int p = 0; p < kPairs; ++p) {
        if constexpr (kSums == 2) sum[0][p] += sum[1][p];
        row[p] = total(sum[0][p]);
    }
}

using Staged = float[kMostStaged][kStaged];
using Sums = f64x4[kMostStaged][kMostStaged];

// Differences of `lanes` elements, zeros up to kLanes; a row for each policy.
template <int CODE>
WARP_FAST_INLINE void stage(const MergeEntry& entry, int64_t at, int64_t lanes, int policies,
                            float* delta) {
    const Lanes start = load_column<CODE>(entry, 0, at, lanes);
    for (int m = 0; m < policies; ++m) {
        const Lanes stop = load_column<CODE>(entry, 1 + m, at, lanes);
        const Lanes moved = {stop.a - start.a, stop.b - start.b};
        std::memcpy(delta + m * kStaged, &moved, sizeof(moved));
    }
}

// sum[a + i][b + j] += products of the policies a + i < a + A and b + j < b + B; if SAME, a is b
// and each pair comes once. before(at) is called ahead of the kLanes elements from at on.
template <int A, int B, bool SAME, class Before>
WARP_FAST_INLINE void add_products(const Staged& delta, int a, int b, int64_t lanes, Sums& sum,
                                   Before before) {
    constexpr int kPairs = SAME ? A * B - A * (A - 1) / 2 : A * B;
    // so many sums that a fused multiply-add need not wait for the one before it
    constexpr int kSums = kPairs <= 3 ? 4 : kPairs <= 6 ? 2 : 1;
    f64x4 part[kSums][B][A] = {};
    for (int64_t at = 0; at < lanes; at += kLanes) {
        before(at);
#pragma GCC unroll 4
        for (int q = 0; q < kLanes / 4; ++q) {
            f64x4 left[A];
#pragma GCC unroll 3
            for (int i = 0; i < A; ++i) left[i] = quad_at(delta[a + i] + at + 4 * q);
#pragma GCC unroll 5
            for (int j = 0; j < B; ++j) {
                const f64x4 right = SAME && j < A ? left[j] : quad_at(delta[b + j] + at + 4 * q);
#pragma GCC unroll 3
                for (int i = 0; i < (SAME && j < A ? j + 1 : A); ++i) {
                    part[q % kSums][j][i] += left[i] * right;
                }
            }
        }
    }
#pragma GCC unroll 5
    for (int j = 0; j < B; ++j) {
#pragma GCC unroll 3
        for (int i = 0; i < (SAME && j < A ? j + 1 : A); ++i) {
#pragma GCC unroll 4
            for (int s = 0; s < kSums; ++s) sum[a + i][b + j] += part[s][j][i];
        }
    }
}

template <int A, int B, bool SAME>
void add_tile(const Staged& delta, int a, int b, int64_t lanes, Sums& sum) {
    add_products<A, B, SAME>(delta, a, b, lanes, sum, [](int64_t) {});
}

using AddTile = void (*)(const Staged&, int, int, int64_t, Sums&);

// up to kMostFirst policies, the first kTile with all of them
constexpr AddTile kFirst[] = {nullptr, add_tile<1, 1, true>, add_tile<2, 2, true>,
                              add_tile<3, 3, true>, add_tile<3, 4, true>, add_tile<3, 5, true>};
// kTile policies with up to kMostOthers
constexpr AddTile kOthers[] = {nullptr, add_tile<3, 1, false>, add_tile<3, 2, false>,
                               add_tile<3, 3, false>, add_tile<3, 4, false>};

// Many policies: pairs of a few elements at a time, in tiles. The first tile stages elements while
// it sums those before, so that memory and arithmetic do not wait for each other.
// M: the number of policies, or 0 for any from kMostFirst on.
template <int CODE, int M>
void grams_staged(const MergeEntry& entry, int64_t begin, int64_t end, int any, double* row) {
    constexpr int kFirstTile = M > 0 ? M : kMostFirst;
    const int policies = M > 0 ? M : any;
    alignas(64) Staged delta;
    Sums sum = {};
    for (int64_t from = begin; from < end; from += kStaged) {
        const int64_t left = end - from < kStaged ? end - from : kStaged;
        const int64_t lanes = (left + kLanes - 1) / kLanes * kLanes;
        const auto stage_after = [&](int64_t at) __attribute__((always_inline)) {
            const int64_t next = at + kLanes, some = left - next;
            float* const to = delta[0] + next;
            if (some >= kLanes) return stage<CODE>(entry, from + next, kLanes, policies, to);
            if (some > 0) stage<CODE>(entry, from + next, some, policies, to);
        };
        stage_after(-kLanes);
        add_products<kTile, kFirstTile, true>(delta, 0, 0, lanes, sum, stage_after);
        for (int a = 0; a < policies; a += kTile) {
            const int first = policies - a < kMostFirst ? policies - a : kMostFirst;
            if (a > 0) kFirst[first](delta, a, a, lanes, sum);
            for (int b = a + first; b < policies; b += kMostOthers) {
                const int others = policies - b < kMostOthers ? policies - b : kMostOthers;
                kOthers[others](delta, a, b, lanes, sum);
            }
        }
    }
    for (int i = 0; i < policies; ++i) {
        for (int j = i; j < policies; ++j) *row++ = total(sum[i][j]);
    }
}

template <int CODE>
void grams(const MergeEntry& entry, int64_t begin, int64_t end, int policies, double* row) {
    switch (policies) {
        case 1:
            return pairs<CODE, 1>(entry, begin, end, row);
        case 2:
            return pairs<CODE, 2>(entry, begin, end, row);
        case kMostPaired:
            return pairs<CODE, kMostPaired>(entry, begin, end, row);
        case 4:
            return grams_staged<CODE, 4>(entry, begin, end, policies, row);
        case 5:
            return grams_staged<CODE, 5>(entry, begin, end, policies, row);
        default:
            return grams_staged<CODE, 0>(entry, begin, end, policies, row);
    }
}

// differences in fp64 where either side is, in fp32 elsewhere
double difference(const MergeEntry& entry, int policy, int64_t at) {
    const double end = load_any(entry.address[1 + policy], at, entry.code[1 + policy]);
    const double start = load_any(entry.address[0], at, entry.code[0]);
    if (entry.code[0] == kFp64 || entry.code[1 + policy] == kFp64) return end - start;
    return static_cast<float>(end) - static_cast<float>(start);
}

void grams_wide(const MergeEntry& entry, int64_t begin, int64_t end, int policies, double* row) {
    for (int i = 0; i < policies; ++i) {
        for (int j = i; j < policies; ++j) {
            double sum = 0;
            for (int64_t at = begin; at < end; ++at) {
                sum += difference(entry, i, at) * difference(entry, j, at);
            }
            *row++ = sum;
        }
    }
}

}  // namespace

namespace WARP_FAST_ISA {

void gram(const MergeCall& call) {
    const int width = call.policies * (call.policies + 1) / 2;
    const auto body = [&](const MergeEntry& entry, int64_t begin, int64_t end, int64_t chunk) {
        double* row = call.partial + chunk * width;
        const int code = common_code(entry, 1 + call.policies);
        if (code == kWide || call.policies > kMostStaged) {
            return grams_wide(entry, begin, end, call.policies, row);
        }
        switch (code) {
            case kBf16:
                return grams<kBf16>(entry, begin, end, call.policies, row);
            case kFp32:
                return grams<kFp32>(entry, begin, end, call.policies, row);
            default:
                return grams<kMixed>(entry, begin, end, call.policies, row);
        }
    };
    for_each_chunk(call.entries, call.count, call.chunks, kMergeChunk, call.threads, false, body);
}

}  // namespace WARP_FAST_ISA
}  // namespace warp_fast
