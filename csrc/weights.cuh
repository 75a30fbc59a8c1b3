// How the passes over policies and their common init read weights.
//
// Three ways, chosen per launch: 16 bytes of bf16 at a time, vectors of 4 elements of mixed 2- and
// 4-byte dtypes, and single elements of any dtype and alignment.
#pragma once

#include "cuda.h"
#include "table.cuh"

namespace warp_fast {

enum Mode : int { kAllBf16 = 0, kVectors = 1, kScalars = 2 };

template <int MODE>
constexpr int kVec = MODE == kAllBf16 ? 8 : MODE == kVectors ? 4 : 1;

// the elements of one vector of one tensor, as loaded
template <int MODE>
struct RawWeights {
    uint4 word;
    double any;

    __device__ void load(const void* base, int64_t at, int code) {
        if constexpr (MODE == kScalars) {
            any = load_any(base, at, code);
        } else if (MODE == kAllBf16 || code == kFp32) {
            const int bytes = MODE == kAllBf16 ? 2 : 4;
            word = *reinterpret_cast<const uint4*>(static_cast<const char*>(base) + at * bytes);
        } else {
            const char* from = static_cast<const char*>(base) + at * 2;
            const uint2 half = *reinterpret_cast<const uint2*>(from);
            word.x = half.x, word.y = half.y;
        }
    }
    __device__ float value(int i, int code) const {
        const uint32_t words[4] = {word.x, word.y, word.z, word.w};
        if (MODE == kVectors && code == kFp32) return __uint_as_float(words[i]);
        const uint32_t bits = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xFFFFu;
        return MODE == kAllBf16 ? from_bits16(bits, kBf16) : from_bits16(bits, code);
    }
};

// policy - init in fp32, or in fp64 where either is
template <int MODE>
__device__ double delta_of(const RawWeights<MODE>& end, int end_code, const RawWeights<MODE>& start,
                           int start_code, int i) {
    if constexpr (MODE == kScalars) {
        if (end_code == kFp64 || start_code == kFp64) return __dsub_rn(end.any, start.any);
        return __fsub_rn(static_cast<float>(end.any), static_cast<float>(start.any));
    } else {
        return __fsub_rn(end.value(i, end_code), start.value(i, start_code));
    }
}

inline Mode mode_of(bool aligned, uint64_t codes, int columns, int out_code) {
    bool bf16 = out_code == kBf16, wide = out_code == kFp64;
    for (int c = 0; c < columns; ++c) {
        bf16 = bf16 && code_of(codes, c) == kBf16;
        wide = wide || code_of(codes, c) == kFp64;
    }
    return !aligned || wide ? kScalars : bf16 ? kAllBf16 : kVectors;
}

inline void check_policies(int policies) {
    if (policies < 1 || policies > kMaxPolicies) {
        throw std::invalid_argument("the cuda backend merges 1 to " +
                                    std::to_string(kMaxPolicies) + " policies; got " +
                                    std::to_string(policies));
    }
}

}  // namespace warp_fast
