// What the loss kernels of the CPU and of CUDA share.
#pragma once

#include <cstdint>

namespace warp_fast {

enum ExactKl : int { kNoKl = 0, kReverse = 1, kForward = 2 };

// Rows in runs: in a run they are `stride` elements apart, from its last to the next run's first it is
// `jump` more. So lie the logits of a batch of which a slice in time is taken.
struct LossMatrix {
    void* address;  // or null
    int64_t stride, run, jump;
    int code;
};

}  // namespace warp_fast
