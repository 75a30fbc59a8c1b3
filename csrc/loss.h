// What the loss kernels of the CPU and of CUDA share.
#pragma once

#include <cstdint>

namespace warp_fast {

enum ExactKl : int { kNoKl = 0, kReverse = 1, kForward = 2 };

struct LossMatrix {
    void* address;  // or null
    int64_t stride;
    int code;
};

}  // namespace warp_fast
