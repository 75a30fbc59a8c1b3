// The Gram matrices of task vectors on CPU: sums in fp64 over chunks of fixed size.
//
// Products of two fp32 differences are exact in fp64, so fusing them with the sum changes no bit.
#include "weights.h"

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace warp_fast {
namespace {

constexpr int kMostFused = 5;  // policies whose pairs are summed in one go

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

WARP_FAST_INLINE double total(f64x4 sum) { return (sum[0] + sum[2]) + (sum[1] + sum[3]); }

// All pairs of A policies from a on, or with B of A policies with B others from b on.
template <int CODE, int A, int B>
void pairs(const MergeEntry& entry, int64_t begin, int64_t end, int a, int b, double* found) {
    constexpr int kPairs = B == 0 ? A * (A + 1) / 2 : A * B;
    // two sums per pair where registers allow it: one alone waits for itself
    constexpr int kSums = kPairs <= 3 ? 2 : 1;
    f64x4 sum[kSums][kPairs] = {};
    const auto add = [&](int64_t at, int64_t lanes) __attribute__((always_inline)) {
        const Lanes start = load_column<CODE>(entry, 0, at, lanes);
        Lanes delta[A + B];
        for (int i = 0; i < A + B; ++i) {
            const int policy = 1 + (i < A ? a + i : b + i - A);
            const Lanes stop = load_column<CODE>(entry, policy, at, lanes);
            delta[i] = {stop.a - start.a, stop.b - start.b};
        }
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
            f64x4 wide[A + B];
            for (int i = 0; i < A + B; ++i) wide[i] = quarter(delta[i], q);
            int p = 0;
            for (int i = 0; i < A; ++i) {
                for (int j = B == 0 ? i : A; j < A + B; ++j, ++p) {
                    sum[q % kSums][p] += wide[i] * wide[j];
                }
            }
        }
    };
    int64_t at = begin;
    for (; at + kLanes <= end; at += kLanes) add(at, kLanes);
    if (at < end) add(at, end - at);
    for (int p = 0; p < kPairs; ++p) found[p] = total(sum[0][p] + sum[kSums - 1][p] * (kSums - 1));
}

WARP_FAST_INLINE int64_t triangle(int i, int j, int policies) {
    return static_cast<int64_t>(i) * policies - i * (i - 1) / 2 + j - i;
}

template <int CODE, int A, int B>
void group(const MergeEntry& entry, int64_t begin, int64_t end, int a, int b, int policies,
           double* row) {
    double found[B == 0 ? A * (A + 1) / 2 : A * B];
    pairs<CODE, A, B>(entry, begin, end, a, b, found);
    int p = 0;
    for (int i = 0; i < A; ++i) {
        for (int j = B == 0 ? i : 0; j < (B == 0 ? A : B); ++j) {
            row[triangle(a + i, (B == 0 ? a : b) + j, policies)] = found[p++];
        }
    }
}

template <int CODE>
void grams(const MergeEntry& entry, int64_t begin, int64_t end, int policies, double* row) {
    switch (policies) {
        case 2:
            return group<CODE, 2, 0>(entry, begin, end, 0, 0, policies, row);
        case 3:
            return group<CODE, 3, 0>(entry, begin, end, 0, 0, policies, row);
        case 4:
            return group<CODE, 4, 0>(entry, begin, end, 0, 0, policies, row);
        case kMostFused:
            return group<CODE, kMostFused, 0>(entry, begin, end, 0, 0, policies, row);
    }
    // a chunk of all of them stays in cache while its pairs are taken two by two
    for (int a = 0; a < policies; a += 2) {
        a + 1 < policies ? group<CODE, 2, 0>(entry, begin, end, a, a, policies, row)
                         : group<CODE, 1, 0>(entry, begin, end, a, a, policies, row);
        for (int b = a + 2; b < policies; b += 2) {
            b + 1 < policies ? group<CODE, 2, 2>(entry, begin, end, a, b, policies, row)
                             : group<CODE, 2, 1>(entry, begin, end, a, b, policies, row);
        }
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
            row[triangle(i, j, policies)] = sum;
        }
    }
}

}  // namespace

namespace WARP_FAST_ISA {

void gram(const MergeCall& call) {
    const int width = call.policies * (call.policies + 1) / 2;
    const auto body = [&](const MergeEntry& entry, int64_t begin, int64_t end, int64_t chunk) {
        double* row = call.partial + chunk * width;
        switch (common_code(entry, 1 + call.policies)) {
            case kBf16:
                return grams<kBf16>(entry, begin, end, call.policies, row);
            case kFp32:
                return grams<kFp32>(entry, begin, end, call.policies, row);
            case kWide:
                return grams_wide(entry, begin, end, call.policies, row);
            default:
                return grams<kMixed>(entry, begin, end, call.policies, row);
        }
    };
    for_each_chunk(call.entries, call.count, call.chunks, kMergeChunk, call.threads, false, body);
}

}  // namespace WARP_FAST_ISA
}  // namespace warp_fast
