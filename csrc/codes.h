// Numbers of dtypes and storages, the same in C++, CUDA and warp_fast/_table.py.
#pragma once

namespace warp_fast {

enum Code : int { kBf16 = 0, kFp16 = 1, kFp32 = 2, kFp64 = 3, kInt16 = 4 };

enum Storage : int { kFull = 0, kSplit = 1, kStochastic = 2 };

}  // namespace warp_fast
