// CUDA enough to run the kernels of csrc/ on a CPU: each thread of a cluster is a fiber, which runs
// until it has to wait for others. A copy into shared memory happens when it is waited for, at the
// latest moment; shared memory begins as NaN; barriers that not all reach end the program.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;

inline dim3 threadIdx, blockIdx, gridDim;  // of the thread that runs

namespace on_cpu {

struct Barrier {
    int all = 0, here = 0;
    long times = 0;
};

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

struct Warp {
    Barrier barrier;
    double values[32];
};

struct alignas(16) Bytes {
    unsigned char x[16];
};

struct Block {
    std::vector<Bytes> fixed, dynamic;
    Barrier barrier;
    std::vector<Warp> warps;
};

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    bool done;
    dim3 number, block_number;
    Block* block;
    std::deque<std::vector<Copy>> copies;
};

inline Thread* now;
inline ucontext_t scheduler;
inline std::vector<Block> blocks;
inline Barrier cluster;
inline std::function<void()> body;
inline int shared_of_a_block = 232448, largest_cluster = 16;

// large clusters are for blocks of which two fit a processor
inline int largest_cluster_of(size_t shared) {
    const bool two = 2 * shared <= static_cast<size_t>(shared_of_a_block);
    return two || largest_cluster < 8 ? largest_cluster : 8;
}

[[noreturn]] inline void fail(const char* why) {
    std::fprintf(stderr, "%s\n", why);
    std::abort();
}

inline void wait(Barrier& barrier) {
    const long times = barrier.times;
    if (++barrier.here == barrier.all) {
        barrier.here = 0, ++barrier.times;
        return;
    }
    while (barrier.times == times) swapcontext(&now->context, &scheduler);
}

inline std::vector<Bytes> poisoned(size_t bytes) {
    Bytes nan;
    std::memset(&nan, 0xFF, sizeof nan);
    return std::vector<Bytes>(bytes / sizeof(Bytes) + 1, nan);
}

// a __shared__ variable, of which a kernel has one
template <class T>
T& fixed() {
    static_assert(sizeof(T) <= 4096);
    return *reinterpret_cast<T*>(now->block->fixed.data());
}

template <class T>
T* dynamic() {
    return reinterpret_cast<T*>(now->block->dynamic.data());
}

inline void finish() {
    body();
    now->done = true;
    swapcontext(&now->context, &scheduler);
}

// blocks first .. first + count of row y of the grid
inline void run_cluster(unsigned first, unsigned y, unsigned count, dim3 grid, unsigned threads,
                        size_t shared) {
    static std::vector<std::unique_ptr<Thread>> all;
    while (all.size() < count * threads) all.emplace_back(new Thread);
    cluster = {static_cast<int>(count * threads)};
    blocks.assign(count, {poisoned(4096), poisoned(shared), {static_cast<int>(threads)}, {}});
    for (Block& block : blocks) block.warps.assign(threads / 32, {{32}, {}});
    for (unsigned i = 0; i < count * threads; ++i) {
        Thread& one = *all[i];
        one.done = false, one.block = &blocks[i / threads];
        one.number = dim3(i % threads), one.block_number = dim3(first + i / threads, y);
        one.copies.assign(1, {});
        getcontext(&one.context);
        one.context.uc_stack.ss_sp = one.stack.data();
        one.context.uc_stack.ss_size = one.stack.size();
        makecontext(&one.context, finish, 0);
    }
    unsigned left = count * threads;
    for (int turns = 0; left > 0; ++turns) {
        if (turns == 10000) fail("a barrier that not all threads reach");
        for (unsigned i = 0; i < count * threads; ++i) {
            if (all[i]->done) continue;
            now = all[i].get();
            threadIdx = now->number, blockIdx = now->block_number, gridDim = grid;
            swapcontext(&scheduler, &now->context);
            left -= now->done;
        }
    }
}

template <class Kernel>
auto launched(Kernel kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t,
              unsigned parts = 1) {
    return [=](auto... arguments) {
        if (shared + 1024 > static_cast<size_t>(shared_of_a_block)) fail("too much shared memory");
        body = [=] { kernel(arguments...); };
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned first = 0; first < grid.x; first += parts) {
                run_cluster(first, y, parts, grid, block.x, shared);
            }
        }
    };
}

}  // namespace on_cpu

inline void __syncthreads() { on_cpu::wait(on_cpu::now->block->barrier); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int other) {
    const unsigned lane = threadIdx.x % 32;
    on_cpu::Warp& warp = on_cpu::now->block->warps[threadIdx.x / 32];
    warp.values[lane] = value;
    on_cpu::wait(warp.barrier);
    value = static_cast<T>(warp.values[lane ^ other]);
    on_cpu::wait(warp.barrier);
    return value;
}

namespace cooperative_groups {
struct cluster_group {
    void sync() const { on_cpu::wait(on_cpu::cluster); }
    unsigned num_blocks() const { return static_cast<unsigned>(on_cpu::blocks.size()); }
    template <class T>
    T* map_shared_rank(T* mine, unsigned rank) const {
        const char* begin = reinterpret_cast<char*>(on_cpu::now->block->fixed.data());
        char* theirs = reinterpret_cast<char*>(on_cpu::blocks[rank].fixed.data());
        return reinterpret_cast<T*>(theirs + (reinterpret_cast<char*>(mine) - begin));
    }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes) {
        on_cpu::fail("a copy that is not aligned");
    }
    on_cpu::now->copies.back().push_back({to, from, bytes});
}
inline void __pipeline_commit() { on_cpu::now->copies.emplace_back(); }
inline void __pipeline_wait_prior(size_t pending) {
    auto& copies = on_cpu::now->copies;
    for (; copies.size() > pending + 1; copies.pop_front()) {
        for (const on_cpu::Copy& copy : copies.front()) {
            std::memcpy(copy.to, copy.from, copy.bytes);
        }
    }
}

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(uint32_t bits) { return bits_as<float>(bits); }
inline uint32_t __float_as_uint(float value) { return bits_as<uint32_t>(value); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct __half {
    unsigned short bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline float __half2float(__half value) {
    const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
    const float whole = exponent ? 1024.0f + mantissa : mantissa;
    float size = std::ldexp(whole, exponent ? exponent - 25 : -24);
    if (exponent == 31) size = mantissa ? NAN : INFINITY;
    return value.bits >> 15 ? -size : size;
}
inline __half __float2half_rn(float value) {
    const unsigned sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (size != size) return {0x7FFF};
    if (size >= 65520) return {static_cast<unsigned short>(sign | 0x7C00)};
    int exponent;
    std::frexp(size, &exponent);
    const int last = size < 0x1p-14f ? -24 : exponent - 11;  // power of two of the last bit
    const long steps = std::lrint(std::ldexp(size, -last));
    return {static_cast<unsigned short>(sign | (((last + 24) << 10) + steps))};
}

struct __nv_bfloat162 {
    uint16_t x, y;
};
inline uint16_t bfloat16_bits(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return 0x7FFF;
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {bfloat16_bits(x), bfloat16_bits(y)};
}

template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class T>
T __ldcs(const T* from) {
    return *from;
}
template <class T>
void __stcs(T* to, T value) {
    *to = value;
}

using cudaError_t = int;
enum {
    cudaSuccess,
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributeNonPortableClusterSizeAllowed,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMultiProcessorCount,
    cudaLaunchAttributeClusterDimension,
};
struct cudaLaunchAttribute {
    int id;
    struct {
        dim3 clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int which, int) {
    *value = which == cudaDevAttrMultiProcessorCount ? 4 : on_cpu::shared_of_a_block;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, Kernel,
                                                 const cudaLaunchConfig_t* config) {
    *size = on_cpu::largest_cluster_of(config->dynamicSmemBytes);
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
    *blocks = 2;
    return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    const unsigned parts = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
    if (static_cast<int>(parts) > on_cpu::largest_cluster_of(config->dynamicSmemBytes)) {
        on_cpu::fail("a cluster that is too large");
    }
    on_cpu::launched(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                     config->stream, parts)(arguments...);
    return cudaSuccess;
}
