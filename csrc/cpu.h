// The CPU kernels: what bindings.cpp calls and ema.cpp, gram.cpp and slerp.cpp define.
//
// Those three are compiled once per instruction set, each time into a namespace of its own
// (WARP_FAST_ISA), so they use nothing from the standard library that a linker could share.
#pragma once

#include <cstdint>

#include "codes.h"

namespace warp_fast {

// chunks of one tensor that are worked on as units; their size is the same on every machine, so
// that sums are
constexpr int64_t kEmaChunk = 16384;
constexpr int64_t kMergeChunk = 32768;

struct EmaEntry {
    void* ema;
    const void* params;
    void* residual;
    int64_t size, first_index, first_chunk;
    int ema_code, param_code;
};

struct EmaCall {
    const EmaEntry* entries;
    int64_t count, chunks;
    Storage storage;
    double rate;
    uint32_t key_in, key_out;
    int threads;
};

// columns: init, policies, outs
struct MergeEntry {
    void* const* address;
    const int* code;
    int64_t size, segment, first_chunk;
    bool stream;  // write the outs around the cache
};

struct MergeCall {
    const MergeEntry* entries;
    int64_t count, chunks;
    int policies;
    int64_t rows, segments;
    const double* coefficients;  // [rows, segments, policies]
    double* partial;             // [chunks, policies (policies + 1) / 2], upper triangles
    int threads;
};

namespace baseline {
void ema(const EmaCall& call);
void gram(const MergeCall& call);
void apply(const MergeCall& call);
}  // namespace baseline

#ifdef WARP_FAST_HAS_AVX2
namespace avx2 {
void ema(const EmaCall& call);
void gram(const MergeCall& call);
void apply(const MergeCall& call);
}  // namespace avx2
#endif

}  // namespace warp_fast
