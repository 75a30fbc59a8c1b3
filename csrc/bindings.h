// What Python hands over: addresses, and rows of logits as tuples.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "loss.h"

namespace warp_fast {

namespace py = pybind11;

using Addresses = std::vector<uintptr_t>;

// address or 0; stride, run and jump of the rows; dtype code
using Matrix = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int>;

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

inline LossMatrix loss_matrix(const Matrix& of) {
    const auto [address, stride, run, jump, code] = of;
    return {pointer(address), stride, run, jump, code};
}

// the kernels of csrc/*.cu
void bind_cuda(py::module_& m);

}  // namespace warp_fast
