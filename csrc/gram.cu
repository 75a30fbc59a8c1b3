// The Gram matrices of task vectors in CUDA: one launch over all tensors, one over all segments.
//
// fp64 sums of exact products, in a fixed order, without atomics.
#include "cuda.h"
#include "table.cuh"
#include "weights.cuh"

namespace warp_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kSumThreads = 256;
constexpr int kGroup = 5;  // policies whose pairs are summed in registers at once

__host__ __device__ int64_t place_of(int64_t i, int64_t j, int64_t policies) {
    return i * policies - i * (i - 1) / 2 + j - i;
}

// Inner products of policies a .. a + A with b .. b + B (B = 0: with themselves) over one chunk per
// block. A policy past the last is read as init, and its sums are not stored.
template <int A, int B, int MODE>
__global__ void __launch_bounds__(kThreads, 1)
    gram_pairs(const int64_t* table, const int32_t* block_entry, int64_t blocks, int policies,
               uint64_t codes, int a, int b, double* partial) {
    constexpr int kPairs = B == 0 ? A * (A + 1) / 2 : A * B;
    constexpr int kColumns = 1 + A + B;
    constexpr int kStep = kThreads * kVec<MODE>;
    __shared__ double shared[kThreads / 32][kPairs];
    int number[kColumns], code[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        const int policy = c <= A ? a + c - 1 : b + c - 1 - A;
        number[c] = c > 0 && policy < policies ? 1 + policy : 0;
        code[c] = code_of(codes, number[c]);
    }
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        const Entry entry = entry_at(table, block_entry[block], kHead + 1 + policies);
        const int64_t begin = (block - entry.first) * kGramChunk;
        const int64_t end = begin + kGramChunk < entry.size ? begin + kGramChunk : entry.size;
        const void* base[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) base[c] = column<void>(entry, number[c]);
        double sum[kPairs] = {};
        RawWeights<MODE> raw[kColumns], ahead[kColumns];
        int64_t at = begin + threadIdx.x * kVec<MODE>;
        if (at < end) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) raw[c].load(base[c], at, code[c]);
        }
        for (; at < end; at += kStep) {
            // the next vectors travel while these are multiplied
            if (at + kStep < end) {
#pragma unroll
                for (int c = 0; c < kColumns; ++c) ahead[c].load(base[c], at + kStep, code[c]);
            }
#pragma unroll
            for (int i = 0; i < kVec<MODE>; ++i) {
                double delta[kColumns];
#pragma unroll
                for (int c = 1; c < kColumns; ++c) {
                    delta[c] = delta_of<MODE>(raw[c], code[c], raw[0], code[0], i);
                }
                int p = 0;
#pragma unroll
                for (int x = 0; x < A; ++x) {
#pragma unroll
                    for (int y = B == 0 ? x : 0; y < (B == 0 ? A : B); ++y, ++p) {
                        sum[p] = __fma_rn(delta[1 + x], delta[1 + (B == 0 ? 0 : A) + y], sum[p]);
                    }
                }
            }
#pragma unroll
            for (int c = 0; c < kColumns; ++c) raw[c] = ahead[c];
        }
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
#pragma unroll
            for (int lane = 16; lane > 0; lane /= 2) {
                sum[p] += __shfl_xor_sync(0xFFFFFFFFu, sum[p], lane);
            }
            if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32][p] = sum[p];
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            const int64_t pairs = static_cast<int64_t>(policies) * (policies + 1) / 2;
            double* row = partial + (entry.payload + block - entry.first) * pairs;
            int p = 0;
            for (int x = 0; x < A; ++x) {
                for (int y = B == 0 ? x : 0; y < (B == 0 ? A : B); ++y, ++p) {
                    const int i = a + x, j = (B == 0 ? a : b) + y;
                    if (i >= policies || j >= policies) continue;
                    double total = 0;
                    for (int w = 0; w < kThreads / 32; ++w) total += shared[w][p];
                    row[place_of(i, j, policies)] = total;
                }
            }
        }
        __syncthreads();
    }
}

// gram[s, i, j]: the rows bounds[s] .. bounds[s + 1] of one column of `partial`, in a fixed order
__global__ void __launch_bounds__(kSumThreads)
    gram_sum(const double* partial, const int64_t* bounds, double* gram, int64_t segments,
             int policies) {
    __shared__ double shared[kSumThreads];
    const int64_t pairs = static_cast<int64_t>(policies) * (policies + 1) / 2;
    const int i = blockIdx.y / policies, j = blockIdx.y % policies;
    const int64_t place = place_of(i < j ? i : j, i < j ? j : i, policies);
    for (int64_t s = blockIdx.x; s < segments; s += gridDim.x) {
        double total = 0;
        for (int64_t row = bounds[s] + threadIdx.x; row < bounds[s + 1]; row += kSumThreads) {
            total += partial[row * pairs + place];
        }
        shared[threadIdx.x] = total;
        for (int half = kSumThreads / 2; half > 0; half /= 2) {
            __syncthreads();
            if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        }
        if (threadIdx.x == 0) gram[(s * policies + i) * policies + j] = shared[0];
        __syncthreads();
    }
}

}  // namespace

void gram_cuda(const int64_t* table, const int32_t* block_entry, int64_t blocks, int policies,
               uint64_t codes, bool aligned, double* partial, void* stream) {
    check_policies(policies);
    if (blocks == 0) return;
    const Mode mode = mode_of(aligned, codes, 1 + policies, kBf16);
    const auto run = [&](auto kernel, int a, int b) {
        kernel<<<grid_size(kernel, kThreads, blocks), kThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>(table, block_entry, blocks, policies, codes,
                                                      a, b, partial);
        check(cudaGetLastError(), "launching the Gram pass");
    };
    as_constant<kAllBf16, kVectors, kScalars>(mode, [&](auto mode) {
        constexpr int kMode = decltype(mode)::value;
        if (policies <= 2) return run(gram_pairs<2, 0, kMode>, 0, 0);
        if (policies == 3) return run(gram_pairs<3, 0, kMode>, 0, 0);
        for (int a = 0; a < policies; a += kGroup) {
            run(gram_pairs<kGroup, 0, kMode>, a, a);
            for (int b = a + kGroup; b < policies; b += kGroup) {
                run(gram_pairs<kGroup, kGroup, kMode>, a, b);
            }
        }
    });
}

void gram_sum_cuda(const double* partial, const int64_t* bounds, double* gram, int64_t segments,
                   int policies, void* stream) {
    check_policies(policies);
    if (segments == 0) return;
    const dim3 grid(static_cast<unsigned>(segments < 65535 ? segments : 65535),
                    static_cast<unsigned>(policies * policies));
    gram_sum<<<grid, kSumThreads, 0, static_cast<cudaStream_t>(stream)>>>(partial, bounds, gram,
                                                                          segments, policies);
    check(cudaGetLastError(), "launching the sum of the Grams");
}

}  // namespace warp_fast
