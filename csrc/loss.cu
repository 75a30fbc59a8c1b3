// Rows of logits in CUDA: statistics of the sampled tokens and their gradient.
//
// A row is cut into slices, one for each block of a cluster. The blocks add up their slices in fp32
// a thread and in fp64 from there on, in a fixed order, and read each other's sums from shared
// memory. Where statistics and gradient are found in one launch, a block keeps its slice of the
// policy there too, so that the row is read once.
#include <cooperative_groups.h>

#include <climits>
#include <type_traits>

#include "cuda.h"
#include "lines.cuh"

// before sm_90 there are no clusters: the kernels are empty there, and _backend.py refuses them
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define WARP_FAST_CLUSTERS
#endif

namespace warp_fast {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;

struct Task {
    LossMatrix logits, anchor;
    const int64_t* token_ids;
    int64_t width;
    Head head;
    Slices slices;
};

// the vectors of a row that this block takes
struct Span {
    int first, last;
};

__device__ Span span_of(const Slices& slices, int64_t width) {
    const int64_t all = (width + kVector - 1) / kVector;
    const int64_t first = blockIdx.x % slices.parts * slices.vectors, last = first + slices.vectors;
    return {static_cast<int>(first < all ? first : all), static_cast<int>(last < all ? last : all)};
}

#ifdef WARP_FAST_CLUSTERS

constexpr int kWarps = kThreads / 32;

// tokens past the last, and the sampled one, count nothing in the sums
__device__ void leave_out(int count, int sampled, float (&u)[kVector]) {
    for (int i = 0; i < kVector; ++i) {
        if (i >= count || i == sampled) u[i] = -INFINITY;
    }
}

// NaN for a token outside the vocabulary
__device__ float picked_score(const Line& line, int64_t token, const Task& task) {
    if (token < 0 || token >= task.width) return NAN;
    return score(static_cast<float>(load_any(line.begin, token, line.code)), task.head);
}

// one row and the slice of it that is this block's
struct Place {
    Line logits, anchor;
    int64_t n, token;
    int part, first, last;  // vectors
    int short_one, short_count;  // the vector that the end of the row cuts, and what is left of it
    int sampled_one, sampled;  // the vector of the sampled token, and where it is in there

    __device__ int count(int k) const { return k == short_one ? short_count : kVector; }
    __device__ int sampled_of(int k) const { return k == sampled_one ? sampled : -1; }
};

template <bool ANCHOR>
__device__ Place place_of(const Task& task) {
    Place place;
    place.n = blockIdx.x / task.slices.parts;
    place.part = blockIdx.x % task.slices.parts;
    const Span span = span_of(task.slices, task.width);
    place.first = span.first, place.last = span.last;
    place.short_count = static_cast<int>(task.width % kVector);
    place.short_one = place.short_count ? static_cast<int>(task.width / kVector) : -1;
    place.token = task.token_ids[place.n];
    const bool known = place.token >= 0 && place.token < task.width;
    place.sampled_one = known ? static_cast<int>(place.token / kVector) : -1;
    place.sampled = static_cast<int>(place.token % kVector);
    place.logits = line_of(task.logits, place.n, task.width);
    if (ANCHOR) place.anchor = line_of(task.anchor, place.n, task.width);
    return place;
}

// the sums of this thread's vectors; KEEP: and the policy into shared memory, as far as it goes
template <class ASKED, bool WIDE, bool KEEP>
__device__ Sums<float> thread_sums(const Task& task, const Place& place, float shift,
                                   const Resident<WIDE>& resident) {
    Sums<float> sums;
    Raw<WIDE> raw, ahead, anchor, anchor_ahead;
    int k = place.first + threadIdx.x;
    if (k < place.last) {
        raw.load(place.logits, k);
        if (ASKED::anchor) anchor.load(place.anchor, k);
    }
    for (; k < place.last; k += kThreads) {
        // the next vectors travel while these are added
        if (k + kThreads < place.last) {
            ahead.load(place.logits, k + kThreads);
            if (ASKED::anchor) anchor_ahead.load(place.anchor, k + kThreads);
        }
        if (KEEP && k - place.first < resident.count) resident.put(k - place.first, raw);
        const bool partial = k == place.short_one || k == place.sampled_one;
        float u[kVector], v[kVector];
        raw.get(place.logits.code, u);
        to_scores(u, task.head);
        if (partial) leave_out(place.count(k), place.sampled_of(k), u);
        if (ASKED::anchor) {
            anchor.get(place.anchor.code, v);
            to_scores(v, task.head);
            if (partial) leave_out(place.count(k), place.sampled_of(k), v);
        }
        add<ASKED>(sums, u, v, shift);
        raw = ahead, anchor = anchor_ahead;
    }
    return sums;
}

template <class T>
__device__ T largest_of_lanes(T value) {
    for (int lane = 16; lane > 0; lane /= 2) {
        value = larger(value, __shfl_xor_sync(0xFFFFFFFFu, value, lane));
    }
    return value;
}

__device__ double sum_of_lanes(double value) {
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lane);
    return value;
}

// the sums of the 32 lanes of a warp as one, the same in each
template <class ASKED, class T>
__device__ Sums<double> over_lanes(const Sums<T>& mine) {
    const T top = largest_of_lanes(mine.top);
    const T anchor_top = ASKED::anchor ? largest_of_lanes(mine.anchor_top) : mine.anchor_top;
    const Sums<T> part = lifted<ASKED>(mine, top, anchor_top);
    Sums<double> all;
    all.top = top;
    all.total = sum_of_lanes(part.total);
    if (ASKED::entropy) all.weighted = sum_of_lanes(part.weighted);
    if (ASKED::anchor) {
        all.anchor_top = anchor_top;
        all.anchor_total = sum_of_lanes(part.anchor_total);
    }
    if (ASKED::exact) all.apart = sum_of_lanes(part.apart);
    return all;
}

struct Shared {
    Sums<double> warps[kWarps], block;
    double state[kRowState];
};

// The sums of the whole row, in every lane of warp 0 of every block of the cluster. No block may
// leave before all have read: a barrier of the cluster has to follow.
template <class ASKED>
__device__ Sums<double> over_cluster(const Sums<float>& mine, Shared& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Sums<double> sums = over_lanes<ASKED>(mine);
    if (lane == 0) shared.warps[warp] = sums;
    __syncthreads();
    if (warp == 0) {
        sums = over_lanes<ASKED>(lane < kWarps ? shared.warps[lane] : Sums<double>());
        if (lane == 0) shared.block = sums;
    }
    cg::cluster_group cluster = cg::this_cluster();
    cluster.sync();
    if (warp == 0) {
        Sums<double> part;
        if (lane < cluster.num_blocks()) part = *cluster.map_shared_rank(&shared.block, lane);
        sums = over_lanes<ASKED>(part);
    }
    return sums;
}

__device__ void write_row(const LossStats& stats, int64_t n, const Row& row) {
    stats.logprobs[n] = static_cast<float>(row.logprob);
    stats.entropy[n] = static_cast<float>(row.entropy);
    stats.anchor_logprobs[n] = static_cast<float>(row.anchor_logprob);
    stats.kl[n] = static_cast<float>(row.kl);
    for (int i = 0; i < kRowState; ++i) stats.state[n * kRowState + i] = row.state[i];
}

// the row, in thread 0 of every block of its cluster
template <class ASKED, bool WIDE, bool KEEP>
__device__ Row row_of(const Task& task, const Place& place, const Resident<WIDE>& resident,
                      Shared& shared) {
    const float picked = picked_score(place.logits, place.token, task);
    float anchor_picked = 0, shift = 0;
    if (ASKED::anchor) anchor_picked = picked_score(place.anchor, place.token, task);
    if (ASKED::exact) shift = shift_of(picked, anchor_picked);
    const Sums<float> mine = thread_sums<ASKED, WIDE, KEEP>(task, place, shift, resident);
    const Sums<double> sums = over_cluster<ASKED>(mine, shared);
    Row row = {};
    if (threadIdx.x == 0) row = finished<ASKED>(sums, picked, anchor_picked);
    return row;
}

template <bool WIDE>
__device__ void store_zeros(const Place& place, const Line& out) {
    const Raw<WIDE> zeros = {};
    for (int k = place.first + threadIdx.x; k < place.last; k += kThreads) {
        zeros.store(out, k, place.count(k));
    }
}

__device__ bool is_zero(const float* upstream) {
    return upstream[0] == 0 && upstream[1] == 0 && upstream[2] == 0;
}

// dlogits of this block's slice; the policy from shared memory where it is kept
template <int EXACT, bool WIDE>
__device__ void store_gradient(const Task& task, const Place& place, const Coefficients& c,
                               const Resident<WIDE>& resident, const Line& out) {
    const auto load = [&](int k, Raw<WIDE>& raw, Raw<WIDE>& anchor) {
        if (k - place.first < resident.count) {
            resident.get(k - place.first, raw);
        } else {
            raw.load(place.logits, k);
        }
        if (EXACT) anchor.load(place.anchor, k);
    };
    Raw<WIDE> raw, ahead, anchor, anchor_ahead;
    int k = place.first + threadIdx.x;
    if (k < place.last) load(k, raw, anchor);
    for (; k < place.last; k += kThreads) {
        if (k + kThreads < place.last) load(k + kThreads, ahead, anchor_ahead);
        float u[kVector], v[kVector], du[kVector];
        raw.get(place.logits.code, u);
        to_scores(u, task.head);
        if (EXACT) {
            anchor.get(place.anchor.code, v);
            to_scores(v, task.head);
        }
        gradient<EXACT>(c, u, v, place.sampled_of(k), du);
        raw.get(place.logits.code, u);
        through_head(u, task.head, du);
        raw.set(out.code, du);
        raw.store(out, k, place.count(k));
        raw = ahead, anchor = anchor_ahead;
    }
}

extern __shared__ Word pool[];

#endif

// The second launch bound of the kernels: as many blocks as have their registers without a spill,
// since it is the number of loads in flight that hides the latency of memory.
template <class ASKED, bool WIDE>
__global__ void __launch_bounds__(kThreads, WIDE ? 2 : 4)
    stats_kernel(const Task task, const uint8_t* kept, const LossStats stats) {
#ifdef WARP_FAST_CLUSTERS
    __shared__ Shared shared;
    const Place place = place_of<ASKED::anchor>(task);
    const bool writes = place.part == 0 && threadIdx.x == 0;
    if (!kept[place.n]) {
        if (writes) write_row(stats, place.n, {});
        return;
    }
    const Row row = row_of<ASKED, WIDE, false>(task, place, Resident<WIDE>{}, shared);
    if (writes) write_row(stats, place.n, row);
    cg::this_cluster().sync();
#endif
}

template <int EXACT, bool WIDE>
__global__ void __launch_bounds__(kThreads, WIDE ? 2 : EXACT ? 3 : 4)
    gradient_kernel(const Task task, const float* upstream, const double* state,
                    const LossMatrix gradient) {
#ifdef WARP_FAST_CLUSTERS
    const Place place = place_of<EXACT != kNoKl>(task);
    const Line out = line_of(gradient, place.n, task.width);
    const float* given = upstream + place.n * 3;
    if (is_zero(given)) return store_zeros<WIDE>(place, out);
    const Coefficients c = coefficients_of(given, state + place.n * kRowState);
    store_gradient<EXACT>(task, place, c, Resident<WIDE>{nullptr, 0}, out);
#endif
}

// statistics and gradient
template <class ASKED, bool WIDE>
__global__ void __launch_bounds__(kThreads, WIDE || ASKED::exact == kForward ? 2 : 3)
    fused_kernel(const Task task, const uint8_t* kept, const float* upstream,
                 const LossStats stats, const LossMatrix gradient) {
#ifdef WARP_FAST_CLUSTERS
    __shared__ Shared shared;
    const Place place = place_of<ASKED::anchor>(task);
    const Line out = line_of(gradient, place.n, task.width);
    const bool writes = place.part == 0 && threadIdx.x == 0;
    if (!kept[place.n]) {
        if (writes) write_row(stats, place.n, {});
        return store_zeros<WIDE>(place, out);
    }
    const Resident<WIDE> resident = {pool, static_cast<int>(task.slices.resident)};
    const Row row = row_of<ASKED, WIDE, true>(task, place, resident, shared);
    if (writes) write_row(stats, place.n, row);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kRowState; ++i) shared.state[i] = row.state[i];
    }
    // all have read the sampled logit and each other's sums by now: the row may be written
    cg::this_cluster().sync();
    const float* given = upstream + place.n * 3;
    if (is_zero(given)) return store_zeros<WIDE>(place, out);
    const Coefficients c = coefficients_of(given, shared.state);
    store_gradient<ASKED::exact>(task, place, c, resident, out);
#endif
}

// a slice of a row for each block; one read of the factor where it is 1
template <bool WIDE>
__global__ void __launch_bounds__(kThreads, 4)
    scale_kernel(const LossMatrix matrix, int64_t width, const Slices slices, const float* factor) {
    const float by = *factor;
    if (by == 1) return;
    const Line row = line_of(matrix, blockIdx.x / slices.parts, width);
    const Span span = span_of(slices, width);
    for (int k = span.first + threadIdx.x; k < span.last; k += kThreads) {
        const int64_t left = width - static_cast<int64_t>(k) * kVector;
        Raw<WIDE> raw;
        raw.load(row, k);
        float x[kVector];
        raw.get(row.code, x);
        for (int i = 0; i < kVector; ++i) x[i] *= by;
        raw.set(row.code, x);
        raw.store(row, k, left < kVector ? static_cast<int>(left) : kVector);
    }
}

bool is_wide(const LossRows& rows) {
    return rows.logits.code == kFp32 || (rows.anchor.address && rows.anchor.code == kFp32);
}

// shared: bytes that a block may use to keep its slice of the policy
Task task_of(const LossRows& rows, int64_t shared) {
    return {rows.logits,
            rows.anchor,
            rows.token_ids,
            rows.width,
            head_of(rows.softcap, rows.temperature),
            slices_of(rows.width, is_wide(rows) ? 4 : 2, shared)};
}

int64_t shared_of_a_block() {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), "finding the device");
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "asking for the shared memory of a block");
    return bytes;
}

// one cluster for each row
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LossRows& rows, const Task& task, void* stream,
            Arguments... arguments) {
    const int64_t most = INT_MAX / task.slices.parts;
    if (rows.rows > most) {
        throw std::invalid_argument("the cuda backend takes up to " + std::to_string(most) +
                                    " rows of this width; got " + std::to_string(rows.rows));
    }
    const int64_t bytes = task.slices.resident * kVector * (is_wide(rows) ? 4 : 2);
    if (bytes > 0) {
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)),
              "asking for shared memory");
    }
    const unsigned parts = static_cast<unsigned>(task.slices.parts);
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = parts;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(rows.rows) * parts);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, task, arguments...), "launching the loss");
}

// call `run` with the flag as a constant
template <class Run>
void as_constant(bool flag, Run run) {
    flag ? run(std::true_type()) : run(std::false_type());
}

template <class Run>
void as_constant(ExactKl exact_kl, Run run) {
    if (exact_kl == kReverse) return run(std::integral_constant<int, kReverse>());
    if (exact_kl == kForward) return run(std::integral_constant<int, kForward>());
    run(std::integral_constant<int, kNoKl>());
}

}  // namespace

void loss_stats_cuda(const LossRows& rows, const uint8_t* kept, bool entropy,
                     const LossStats& stats, void* stream) {
    if (rows.rows == 0) return;
    const Task task = task_of(rows, 0);
    const auto run = [&](auto wide, auto asked) {
        launch(stats_kernel<decltype(asked), decltype(wide)::value>, rows, task, stream, kept,
               stats);
    };
    as_constant(is_wide(rows), [&](auto wide) {
        as_constant(entropy, [&](auto entropy) {
            constexpr bool kEntropy = decltype(entropy)::value;
            if (!rows.anchor.address) return run(wide, Asked<kEntropy, false, kNoKl>());
            as_constant(rows.exact_kl, [&](auto exact_kl) {
                run(wide, Asked<kEntropy, true, decltype(exact_kl)::value>());
            });
        });
    });
}

void loss_gradient_cuda(const LossRows& rows, const float* upstream, const double* state,
                        const LossMatrix& gradient, void* stream) {
    if (rows.rows == 0) return;
    const Task task = task_of(rows, 0);
    as_constant(is_wide(rows), [&](auto wide) {
        as_constant(rows.exact_kl, [&](auto exact_kl) {
            launch(gradient_kernel<decltype(exact_kl)::value, decltype(wide)::value>, rows, task,
                   stream, upstream, state, gradient);
        });
    });
}

void loss_fused_cuda(const LossRows& rows, const uint8_t* kept, const float* upstream,
                     const LossStats& stats, const LossMatrix& gradient, void* stream) {
    if (rows.rows == 0) return;
    const Task task = task_of(rows, shared_of_a_block());
    const auto run = [&](auto wide, auto asked) {
        launch(fused_kernel<decltype(asked), decltype(wide)::value>, rows, task, stream, kept,
               upstream, stats, gradient);
    };
    as_constant(is_wide(rows), [&](auto wide) {
        if (!rows.anchor.address) return run(wide, Asked<true, false, kNoKl>());
        as_constant(rows.exact_kl, [&](auto exact_kl) {
            run(wide, Asked<true, true, decltype(exact_kl)::value>());
        });
    });
}

void loss_scale_cuda(const LossMatrix& matrix, int64_t rows, int64_t width, const float* factor,
                     void* stream) {
    if (rows == 0) return;
    const Slices slices = slices_of(width, 2, 0);
    const auto kernel = matrix.code == kFp32 ? scale_kernel<true> : scale_kernel<false>;
    kernel<<<static_cast<unsigned>(rows * slices.parts), kThreads, 0,
             static_cast<cudaStream_t>(stream)>>>(matrix, width, slices, factor);
    check(cudaGetLastError(), "launching the scaling of a gradient");
}

}  // namespace warp_fast
