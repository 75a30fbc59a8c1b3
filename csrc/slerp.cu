// The apply pass of SLERP in CUDA: any number of merged models in one launch over all tensors.
#include "cuda.h"
#include "table.cuh"
#include "weights.cuh"

namespace warp_fast {
namespace {

constexpr int kThreads = 256;

// out_k = init + sum_m coefficients[k, s, m] * (policy_m - init), last block first: what the Gram
// pass read last is still in L2. Rounded where the reference rounds.
template <int M, int MODE>
__global__ void __launch_bounds__(kThreads, 1)
    apply_rows(const int64_t* table, const int32_t* block_entry, int64_t blocks, int policies,
               int64_t rows, int64_t segments, uint64_t codes, int out_code,
               const double* coefficients) {
    constexpr int kWidth = kVec<MODE>;
    for (int64_t turn = blockIdx.x; turn < blocks; turn += gridDim.x) {
        const int64_t block = blocks - 1 - turn;
        const Entry entry = entry_at(table, block_entry[block], kHead + 1 + policies + rows);
        const int64_t begin = (block - entry.first) * kApplyBlock;
        const int64_t end = begin + kApplyBlock < entry.size ? begin + kApplyBlock : entry.size;
        const int start_code = code_of(codes, 0);
        for (int64_t at = begin + threadIdx.x * kWidth; at < end; at += kThreads * kWidth) {
            RawWeights<MODE> start, raw[M];
            start.load(column<void>(entry, 0), at, start_code);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                if (m >= policies) break;
                raw[m].load(column<void>(entry, 1 + m), at, code_of(codes, 1 + m));
            }
            for (int64_t k = 0; k < rows; ++k) {
                const double* weight = coefficients + (k * segments + entry.payload) * policies;
                if (weight[0] != weight[0]) continue;  // how a solve refuses: nothing is written
                void* out = column<void>(entry, 1 + policies + k);
                uint32_t word[kWidth];
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    bool wide = start_code == kFp64;
                    double total = MODE == kScalars ? start.any : start.value(i, start_code);
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        if (m >= policies) break;
                        const int code = code_of(codes, 1 + m);
                        const double delta = delta_of<MODE>(raw[m], code, start, start_code, i);
                        if (MODE == kScalars && (start_code == kFp64 || code == kFp64)) {
                            wide = true;
                            total = __dadd_rn(total, __dmul_rn(weight[m], delta));
                            continue;
                        }
                        const float product =
                            __fmul_rn(static_cast<float>(weight[m]), static_cast<float>(delta));
                        total = MODE == kScalars && wide
                                    ? __dadd_rn(total, product)
                                    : __fadd_rn(static_cast<float>(total), product);
                    }
                    if constexpr (MODE == kScalars) {
                        store_any(out, at, out_code, total);
                    } else {
                        const float merged = static_cast<float>(total);
                        word[i] = MODE == kVectors && out_code == kFp32
                                      ? __float_as_uint(merged)
                                      : to_bits16(merged, MODE == kAllBf16 ? kBf16 : out_code);
                    }
                }
                if constexpr (MODE == kAllBf16) {
                    const uint4 packed =
                        make_uint4(word[0] | word[1] << 16, word[2] | word[3] << 16,
                                   word[4] | word[5] << 16, word[6] | word[7] << 16);
                    __stcs(reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + at), packed);
                } else if constexpr (MODE == kVectors) {
                    if (out_code == kFp32) {
                        __stcs(reinterpret_cast<uint4*>(static_cast<float*>(out) + at),
                               make_uint4(word[0], word[1], word[2], word[3]));
                    } else {
                        __stcs(reinterpret_cast<uint2*>(static_cast<uint16_t*>(out) + at),
                               make_uint2(word[0] | word[1] << 16, word[2] | word[3] << 16));
                    }
                }
            }
        }
    }
}

}  // namespace

void slerp_apply_cuda(const int64_t* table, const int32_t* block_entry, int64_t blocks,
                      int policies, int64_t rows, int64_t segments, uint64_t codes, int out_code,
                      bool aligned, const double* coefficients, void* stream) {
    check_policies(policies);
    if (blocks == 0 || rows == 0) return;
    const auto run = [&](auto kernel) {
        kernel<<<grid_size(kernel, kThreads, blocks), kThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>(table, block_entry, blocks, policies, rows,
                                                      segments, codes, out_code, coefficients);
        check(cudaGetLastError(), "launching the apply pass");
    };
    const Mode mode = mode_of(aligned, codes, 1 + policies, out_code);
    as_constant<kAllBf16, kVectors, kScalars>(mode, [&](auto mode) {
        constexpr int kMode = decltype(mode)::value;
        if (policies <= 2) return run(apply_rows<2, kMode>);
        if (policies <= 5) return run(apply_rows<5, kMode>);
        run(apply_rows<kMaxPolicies, kMode>);
    });
}

}  // namespace warp_fast
