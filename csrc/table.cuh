// What the CUDA kernels share: the pointer table, typed access, and errors as exceptions.
//
// A table row describes one entry, a run of elements of one tensor: its size, its first block in
// the launch, a payload of the op, then one address per column. Aligned entries start on 16 bytes
// in every column and hold whole vectors of 8 elements.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "codes.h"

namespace warp_fast {

constexpr int kHead = 3;

struct Entry {
    int64_t size, first, payload;
    const int64_t* address;
};

__device__ inline Entry entry_at(const int64_t* table, int64_t number, int64_t stride) {
    const int64_t* row = table + number * stride;
    return {__ldg(row), __ldg(row + 1), __ldg(row + 2), row + kHead};
}

template <class T>
__device__ inline T* column(const Entry& entry, int64_t number) {
    return reinterpret_cast<T*>(__ldg(entry.address + number));
}

__host__ __device__ inline int code_of(uint64_t codes, int column) {
    return static_cast<int>(codes >> (3 * column)) & 7;
}

__device__ inline float from_bits16(uint32_t bits, int code) {
    return code == kFp16 ? __half2float(__ushort_as_half(static_cast<unsigned short>(bits)))
                         : __uint_as_float(bits << 16);
}

// bf16 bits of the nearest value, ties to even; every NaN becomes 0x7FC0
__device__ inline uint32_t to_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    return value != value ? 0x7FC0u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

__device__ inline uint32_t to_bits16(float value, int code) {
    return code == kFp16 ? __half_as_ushort(__float2half_rn(value)) : to_bf16(value);
}

// one element of any float dtype; fp64 holds each exactly
__device__ inline double load_any(const void* base, int64_t at, int code) {
    switch (code) {
        case kFp64:
            return __ldcs(static_cast<const double*>(base) + at);
        case kFp32:
            return __ldcs(static_cast<const float*>(base) + at);
        default:
            return from_bits16(__ldcs(static_cast<const unsigned short*>(base) + at), code);
    }
}

__device__ inline void store_any(void* base, int64_t at, int code, double value) {
    switch (code) {
        case kFp64:
            __stcs(static_cast<double*>(base) + at, value);
            break;
        case kFp32:
            __stcs(static_cast<float*>(base) + at, static_cast<float>(value));
            break;
        default:
            __stcs(static_cast<unsigned short*>(base) + at,
                   static_cast<unsigned short>(to_bits16(static_cast<float>(value), code)));
    }
}

// call `run` with the flag as a constant
template <class Run>
void as_constant(bool flag, Run run) {
    flag ? run(std::true_type()) : run(std::false_type());
}

// call `run` with the value as a constant, which is one of those listed
template <int FIRST, int... REST, class Run>
void as_constant(int value, Run run) {
    if constexpr (sizeof...(REST) > 0) {
        if (value != FIRST) return as_constant<REST...>(value, run);
    }
    run(std::integral_constant<int, FIRST>());
}

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("warp_fast CUDA, ") + what + ": " +
                                 cudaGetErrorString(status));
    }
}

// a persistent grid: as many blocks as the current device holds at once, and no more than there are
template <class Kernel>
unsigned grid_size(Kernel kernel, int threads, int64_t blocks) {
    int device = 0, processors = 0, resident = 0;
    check(cudaGetDevice(&device), "finding the device");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "asking for the number of multiprocessors");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0),
          "asking for the occupancy");
    const int64_t room = static_cast<int64_t>(processors) * (resident > 0 ? resident : 1);
    return static_cast<unsigned>(blocks < room ? blocks : room);
}

}  // namespace warp_fast
