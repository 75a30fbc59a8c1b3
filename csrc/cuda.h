// The CUDA kernels: what bindings_cuda.cpp calls and ema.cu, gram.cu, loss.cu and slerp.cu define.
#pragma once

#include <cstdint>

#include "loss.h"

namespace warp_fast {

constexpr int kEmaBlock = 4096;
constexpr int kGramChunk = 32768;
constexpr int kApplyBlock = 4096;
constexpr int kMaxPolicies = 16;

void ema_update_cuda(const int64_t* table, const int32_t* block_entry, int64_t blocks, int storage,
                     int ema_code, int param_code, bool aligned, double rate,
                     const void* device_rate, int rate_code, uint32_t key_in, uint32_t key_out,
                     void* stream);

void gram_cuda(const int64_t* table, const int32_t* block_entry, int64_t blocks, int policies,
               uint64_t codes, bool aligned, double* partial, void* stream);

void gram_sum_cuda(const double* partial, const int64_t* bounds, double* gram, int64_t segments,
                   int policies, void* stream);

void slerp_apply_cuda(const int64_t* table, const int32_t* block_entry, int64_t blocks,
                      int policies, int64_t rows, int64_t segments, uint64_t codes, int out_code,
                      bool aligned, const double* coefficients, void* stream);

// rows of logits and of what they are compared with
struct LossRows {
    LossMatrix logits, anchor;
    const int64_t* token_ids;  // [rows]
    int64_t rows, width;
    double softcap, temperature;  // softcap 0: none
    ExactKl exact_kl;
};

// [rows], and the state [rows, 8] in fp64 that the gradient takes
struct LossStats {
    float *logprobs, *entropy, *anchor_logprobs, *kl;
    double* state;
};

void loss_stats_cuda(const LossRows& rows, const uint8_t* kept, bool entropy,
                     const LossStats& stats, void* stream);

// upstream: [rows, 3]; gradient may be the logits, here and below
void loss_gradient_cuda(const LossRows& rows, const float* upstream, const double* state,
                        const LossMatrix& gradient, void* stream);

// statistics, entropy among them, and gradient in one launch: a row is read once
void loss_fused_cuda(const LossRows& rows, const uint8_t* kept, const float* upstream,
                     const LossStats& stats, const LossMatrix& gradient, void* stream);

// matrix [rows, width] *= factor; reads and writes nothing where the factor is 1
void loss_scale_cuda(const LossMatrix& matrix, int64_t rows, int64_t width, const float* factor,
                     void* stream);

}  // namespace warp_fast
