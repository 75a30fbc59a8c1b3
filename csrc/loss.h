// What the loss kernels of the CPU and of CUDA share.
#pragma once

#include <cstdint>

namespace warp_fast {

enum ExactKl : int { kNoKl = 0, kReverse = 1, kForward = 2 };

// Rows in runs of `run`: a row begins `stride` elements after the one before it, the first row of
// a run `jump` more. So lie the logits of a batch of which a slice in time is taken.
struct LossMatrix {
    void* address;  // or null
    int64_t stride, run, jump;
    int code;
};

}  // namespace warp_fast
