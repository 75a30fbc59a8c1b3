// The Gram matrices of task vectors on CPU: sums in fp64 over chunks of fixed size.
//
// Products of two fp32 differences are exact in fp64, so fusing them with the sum changes no bit.
#include "weights.h"

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace warp_fast {
namespace {

constexpr int kMostFused = 5;     // policies whose pairs are summed in one go
constexpr int kMostStaged = 16;   // policies whose task vectors are held in the L1 cache
constexpr int64_t kStaged = 128;  // elements held at a time

// four of the sixteen elements in fp64
WARP_FAST_INLINE f64x4 quarter(const Lanes& value, int q) {
    const f32x8 half = q < 2 ? value.a : value.b;
#ifdef __AVX__
    const __m128 part =
        q % 2 == 0 ? _mm256_castps256_ps128(half) : _mm256_extractf128_ps(half, 1);
    return _mm256_cvtps_pd(part);
#else
    const int first = 4 * (q % 2);
    return f64x4{half[first], half[first + 1], half[first + 2], half[first + 3]};
#endif
}

WARP_FAST_INLINE f64x4 quad_at(const double* from) {
    f64x4 value;
    std::memcpy(&value, from, sizeof(value));
    return value;
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
    for (int p = 0; p < kPairs; ++p) row[p] = total(sum[0][p] + sum[kSums - 1][p] * (kSums - 1));
}

// Differences of `lanes` elements in fp64, zeros up to a multiple of kLanes; a row for each policy.
template <int CODE>
void stage(const MergeEntry& entry, int64_t begin, int64_t lanes, int policies,
           double (*wide)[kStaged]) {
    for (int64_t at = 0; at < lanes; at += kLanes) {
        const int64_t some = lanes - at < kLanes ? lanes - at : kLanes;
        const Lanes start = load_column<CODE>(entry, 0, begin + at, some);
        for (int m = 0; m < policies; ++m) {
            const Lanes stop = load_column<CODE>(entry, 1 + m, begin + at, some);
            const Lanes delta = {stop.a - start.a, stop.b - start.b};
            for (int q = 0; q < 4; ++q) {
                const f64x4 value = quarter(delta, q);
                std::memcpy(wide[m] + at + 4 * q, &value, sizeof(value));
            }
        }
    }
}

// sum of i and j += the products of policies a + i and b + j, for A policies and B; with a = b each
// pair comes twice
template <int A, int B>
void add_products(const double (*wide)[kStaged], int a, int b, int64_t lanes, f64x4* sum,
                  int stride) {
    // as many sums as a fused multiply-add takes cycles, twice over: there are two units
    constexpr int kSums = A * B == 4 ? 2 : 4;
    f64x4 part[kSums][A * B] = {};
    for (int64_t at = 0; at < lanes; at += 4 * kSums) {
#pragma GCC unroll 4
        for (int s = 0; s < kSums; ++s) {
#pragma GCC unroll 2
            for (int i = 0; i < A; ++i) {
                const f64x4 left = quad_at(wide[a + i] + at + 4 * s);
#pragma GCC unroll 2
                for (int j = 0; j < B; ++j) {
                    part[s][i * B + j] += left * quad_at(wide[b + j] + at + 4 * s);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < A * B; ++p) {
        f64x4 all = part[0][p];
#pragma GCC unroll 4
        for (int s = 1; s < kSums; ++s) all += part[s][p];
        sum[p / B * stride + p % B] += all;
    }
}

// many policies: pairs of a few elements at a time, two policies by two
template <int CODE>
void grams_staged(const MergeEntry& entry, int64_t begin, int64_t end, int policies, double* row) {
    alignas(64) double wide[kMostStaged][kStaged];
    f64x4 sum[kMostStaged][kMostStaged] = {};
    for (int64_t at = begin; at < end; at += kStaged) {
        const int64_t left = end - at < kStaged ? end - at : kStaged;
        stage<CODE>(entry, at, left, policies, wide);
        const int64_t lanes = (left + kLanes - 1) / kLanes * kLanes;
        for (int a = 0; a < policies; a += 2) {
            for (int b = a; b < policies; b += 2) {
                const auto add = a + 1 == policies   ? add_products<1, 1>
                                 : b + 1 == policies ? add_products<2, 1>
                                                     : add_products<2, 2>;
                add(wide, a, b, lanes, &sum[a][b], kMostStaged);
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
        case 3:
            return pairs<CODE, 3>(entry, begin, end, row);
        case 4:
            return pairs<CODE, 4>(entry, begin, end, row);
        case kMostFused:
            return pairs<CODE, kMostFused>(entry, begin, end, row);
        default:
            return grams_staged<CODE>(entry, begin, end, policies, row);
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
