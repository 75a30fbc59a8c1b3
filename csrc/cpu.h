// The CPU kernels: what bindings.cpp calls.
//
// Those of ema.cpp, gram.cpp, loss.cpp and slerp.cpp are compiled once per instruction set, each
// time into a namespace of its own (WARP_FAST_ISA), so they use nothing from the standard library
// that a linker could share.
#pragma once

#include <cstdint>

#include "codes.h"
#include "loss.h"

namespace warp_fast {

// chunks of one tensor that are worked on as units; their size is the same on every machine, so
// that sums are (those of fp64 weights up to what FMA does not round)
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

// the columns of one row of LossCall.state, whose sums leave out the sampled token: beside one of
// almost all probability the others would be rounded away; the anchor has a side of its own, in
// whose last column is the cross sum of the exact KL, of scores below their maxima
enum LossState : int { kMax, kSum, kTarget, kMoment, kSideWidth, kCross = 7, kStateWidth = 8 };

// the columns of one row of LossCall.coefficients
enum LossCoefficient : int {
    kShift,          // the maximum score
    kFactor,         // A of block_gradient, over the sum
    kMomentFactor,   // B, over the sum
    kCrossFactor,    // C, over the sum
    kMean,           // M of block_gradient
    kAnchorShift,    // the maximum score of the anchor; with C without the sampled token
    kAnchorFactor,   // Q, over the sum of the anchor
    kOfTarget,       // du of the sampled token
    kCoefficients
};

// a block of columns of some rows of logits
struct LossCall {
    LossMatrix logits, anchor, gradient;  // gradient may be logits
    const int64_t* index;                 // [rows], which rows of the matrices; null for the first
    const int64_t* token_ids;             // [rows]
    double* state;                        // [rows, kStateWidth]
    const float* coefficients;            // [rows, kCoefficients]
    int64_t rows, width, first;           // first: the vocabulary index of the first column
    double softcap, temperature;          // softcap 0: none
    bool entropy;
    ExactKl exact_kl;
    int threads;
};

// coefficients [segments, policies] and where a step was linear [segments], of gram [segments,
// policies, policies]; NaN, and linear nowhere, if gram is not finite
void solve(const double* gram, int64_t segments, int policies, double* coefficients, bool* linear);

namespace baseline {
void ema(const EmaCall& call);
void gram(const MergeCall& call);
void apply(const MergeCall& call);
void loss_stats(const LossCall& call);
void loss_gradient(const LossCall& call);
}  // namespace baseline

#ifdef WARP_FAST_HAS_AVX2
namespace avx2 {
void ema(const EmaCall& call);
void gram(const MergeCall& call);
void apply(const MergeCall& call);
void loss_stats(const LossCall& call);
void loss_gradient(const LossCall& call);
}  // namespace avx2
#endif

}  // namespace warp_fast
