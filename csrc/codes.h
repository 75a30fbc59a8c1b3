// Numbers of dtypes and storages, shared by C++, CUDA and the Python launchers in warp_fast/native/.
#pragma once

namespace warp_fast {

enum Code : int { kBf16 = 0, kFp16 = 1, kFp32 = 2, kFp64 = 3, kInt16 = 4 };

enum Storage : int { kFull = 0, kSplit = 1, kStochastic = 2 };

}  // namespace warp_fast
