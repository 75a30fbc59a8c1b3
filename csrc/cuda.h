#pragma once

#include <cstdint>

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

}  // namespace warp_fast
