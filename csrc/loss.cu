// Rows of logits in CUDA: statistics of the sampled tokens and their gradient.
//
// A row is cut into slices, one for each block of a cluster. The blocks add up their slices in fp32
// a thread and in fp64 from there on, in a fixed order, and read each other's sums from shared
// memory. Where statistics and gradient are found in one launch, a block keeps its slices of policy
// and anchor there too, so that the row is read once.
#include <climits>

#include "cluster.cuh"
#include "cuda.h"

// before sm_90 there are no clusters: the kernels are empty there, and _backend.py refuses them
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define WARP_FAST_CLUSTERS
#endif

namespace warp_fast {
namespace {

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

// tokens past the last, and the sampled one, count nothing in the sums with such a score
__device__ __forceinline__ void leave_out(const Place& place, int k, float nothing,
                                          float (&u)[kVector]) {
    const int count = place.slices.count(k), sampled = place.sampled_of(k);
    for (int i = 0; i < kVector; ++i) {
        if (i >= count || i == sampled) u[i] = nothing;
    }
}

// NaN for a token outside the vocabulary
__device__ float picked_score(const Line& line, int64_t token, const Task& task) {
    if (token < 0 || token >= task.width) return NAN;
    return score(static_cast<float>(load_any(line.begin, token, line.code)), task.head);
}

template <bool ANCHOR>
__device__ Place place_of(const Task& task) {
    Place place = {task.slices};
    place.n = blockIdx.x / task.slices.parts;
    place.part = blockIdx.x % task.slices.parts;
    const Span span = span_of(task.slices, task.width);
    place.first = span.first, place.last = span.last;
    place.token = task.token_ids[place.n];
    const bool known = place.token >= 0 && place.token < task.width;
    place.sampled_one = known ? static_cast<int>(place.token / kVector) : -1;
    place.sampled = static_cast<int>(place.token % kVector);
    place.logits = line_of(task.logits, place.n, task.width);
    if (ANCHOR) place.anchor = line_of(task.anchor, place.n, task.width);
    return place;
}

template <bool WIDE>
__device__ __forceinline__ void scores_of(const Raw<WIDE>& raw, const Line& line, const Head& head,
                                          float (&u)[kVector]) {
    raw.get(line.code, u);
    to_scores(u, head);
}

template <class ASKED>
__device__ Bases bases_of(const Task& task, const Place& place) {
    const float picked = picked_score(place.logits, place.token, task);
    const float anchor = ASKED::anchor ? picked_score(place.anchor, place.token, task) : 0;
    return {picked, anchor, ASKED::exact ? shift_of(picked, anchor) : 0.0f};
}

// this thread's sums; nothing: the scores of policy and anchor of what does not count
template <class ASKED, class Source, class Add>
__device__ Sums<float> thread_sums(const Task& task, const Place& place, Source& source,
                                   const Bases& nothing, Add add_vector) {
    Sums<float> sums;
    each_vector(place, source, [&](int k, const auto& pair) {
        float u[kVector], v[kVector];
        scores_of(pair.logits, place.logits, task.head, u);
        if (ASKED::anchor) scores_of(pair.anchor, place.anchor, task.head, v);
        if (place.is_partial(k)) {
            leave_out(place, k, nothing.policy, u);
            if (ASKED::anchor) leave_out(place, k, nothing.anchor, v);
        }
        add_vector(sums, u, v);
    });
    return sums;
}

template <class ASKED, class Source>
__device__ Sums<float> sums_of(const Task& task, const Place& place, Source source,
                               const Bases& bases) {
    const Bases nothing = {-INFINITY, -INFINITY, 0};
    return thread_sums<ASKED>(task, place, source, nothing,
                              [&](auto& sums, const auto& u, const auto& v) {
                                  add<ASKED>(sums, u, v, bases.shift);
                              });
}

// and what they are relative to: the first vectors are on their way while that is waited for
template <class ASKED, class Source>
__device__ Sums<float> near_sums_of(const Task& task, const Place& place, Source source,
                                    Shared& shared) {
    const Bases bases = bases_of<ASKED>(task, place);
    if (threadIdx.x == 0) shared.bases = bases;
    const Bases nothing = {bases.policy + kNothing, bases.anchor + kNothing, 0};
    return thread_sums<ASKED>(task, place, source, nothing,
                              [&](auto& sums, const auto& u, const auto& v) {
                                  add_near<ASKED>(sums, u, v, bases);
                              });
}

__device__ void write_row(const LossStats& stats, int64_t n, const Row& row) {
    stats.logprobs[n] = static_cast<float>(row.logprob);
    stats.entropy[n] = static_cast<float>(row.entropy);
    stats.anchor_logprobs[n] = static_cast<float>(row.anchor_logprob);
    stats.kl[n] = static_cast<float>(row.kl);
    for (int i = 0; i < kRowState; ++i) stats.state[n * kRowState + i] = row.state[i];
}

template <bool WIDE>
__device__ void store_zeros(const Place& place, const Line& out) {
    const Raw<WIDE> zeros = {};
    for (int k = place.first + threadIdx.x; k < place.last; k += kThreads) {
        zeros.store(out, k, place.slices.count(k));
    }
}

__device__ bool is_zero(const float* upstream) {
    return (upstream[0] == 0) & (upstream[1] == 0) & (upstream[2] == 0);
}

// dlogits of this block's slice from du / slope of a vector
template <int EXACT, class Source, class Gradient>
__device__ void store_gradient(const Task& task, const Place& place, Source source, const Line& out,
                               Gradient gradient_of) {
    each_vector(place, source, [&](int k, auto& pair) {
        float u[kVector], v[kVector], du[kVector];
        scores_of(pair.logits, place.logits, task.head, u);
        if (EXACT) scores_of(pair.anchor, place.anchor, task.head, v);
        gradient_of(u, v, place.sampled_of(k), du);
        if (task.head.capped) {
            pair.logits.get(place.logits.code, u);
            through_cap(u, task.head, du);
        }
        pair.logits.set(out.code, du);
        pair.logits.store(out, k, place.slices.count(k));
    });
}

template <int EXACT, class Source>
__device__ void store_far(const Task& task, const Place& place, Source source, const Line& out,
                          const float* upstream, const double* state) {
    const Coefficients c = coefficients_of(upstream, state);
    store_gradient<EXACT>(task, place, source, out,
                          [&](const auto& u, const auto& v, int sampled, auto& du) {
                              gradient<EXACT>(c, u, v, sampled, du);
                              for (float& x : du) x *= task.head.slope;
                          });
}

template <int EXACT, class Source>
__device__ void store_near(const Task& task, const Place& place, Source source, const Line& out,
                           const float* upstream, const double* state) {
    const NearCoefficients c = near_coefficients_of<EXACT>(upstream, state, task.head);
    store_gradient<EXACT>(task, place, source, out,
                          [&](const auto& u, const auto& v, int sampled, auto& du) {
                              gradient_near<EXACT>(c, u, v, sampled, du);
                          });
}

extern __shared__ Word words[];

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
    const Streamed<ASKED::anchor, WIDE> source(place);
    const Bases bases = bases_of<ASKED>(task, place);
    const Sums<double> sums =
        over_cluster<ASKED, false>(sums_of<ASKED>(task, place, source, bases), shared);
    if (writes) write_row(stats, place.n, finished<ASKED>(sums, bases.policy, bases.anchor));
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
    const float* given = upstream + place.n * int64_t{3};
    if (is_zero(given)) return store_zeros<WIDE>(place, out);
    const Streamed<EXACT != kNoKl, WIDE> source(place);
    store_far<EXACT>(task, place, source, out, given, state + place.n * int64_t{kRowState});
#endif
}

// Statistics and gradient: first near sums, on the way of the row into shared memory; where they do
// not hold, the others.
template <class ASKED, bool WIDE>
__global__ void __launch_bounds__(kThreads, WIDE ? 2 : 3)
    fused_kernel(const Task task, const uint8_t* kept, const float* upstream,
                 const LossStats stats, const LossMatrix gradient) {
#ifdef WARP_FAST_CLUSTERS
    __shared__ Shared shared;
    const Place place = place_of<ASKED::anchor>(task);
    const bool writes = place.part == 0 && threadIdx.x == 0;
    if (!kept[place.n]) {
        if (writes) write_row(stats, place.n, {});
        return store_zeros<WIDE>(place, line_of(gradient, place.n, task.width));
    }
    constexpr bool kAnchor = ASKED::anchor;
    const Pool<kAnchor, WIDE> pool = {words, static_cast<int>(task.slices.resident)};
    const Kept<kAnchor, WIDE> again = {place, pool};
    const int i = threadIdx.x;
    if (i < 3) shared.upstream[i] = upstream[place.n * int64_t{3} + i];
    const bool aligned = place.logits.skip == 0 && (!kAnchor || place.anchor.skip == 0);
    const Sums<float> mine =
        aligned ? near_sums_of<ASKED>(task, place, Arriving<kAnchor, WIDE>(place, pool), shared)
                : near_sums_of<ASKED>(task, place, Assembled<kAnchor, WIDE>(place, pool), shared);
    Sums<double> sums = over_cluster<ASKED, true>(mine, shared);
    const Bases& bases = shared.bases;
    sums.top = bases.policy, sums.anchor_top = bases.anchor;
    if (threadIdx.x == 0) shared.near = holds<ASKED>(sums, bases);
    __syncthreads();
    if (!shared.near) {  // which all blocks find alike
        cg::this_cluster().sync();
        sums = over_cluster<ASKED, false>(sums_of<ASKED>(task, place, again, bases), shared);
    }
    if (threadIdx.x == 0) {
        shared.row = finished<ASKED>(sums, bases.policy, bases.anchor);
        if (shared.near) rebase(shared.row.state);
    }
    // all have read the sampled logit and each other's sums by now: the row may be written
    cg::this_cluster().sync();
    if (writes) write_row(stats, place.n, shared.row);
    const Line out = line_of(gradient, place.n, task.width);
    const float* given = shared.upstream;
    if (is_zero(given)) return store_zeros<WIDE>(place, out);
    if (shared.near) {
        store_near<ASKED::exact>(task, place, again, out, given, shared.row.state);
    } else {
        store_far<ASKED::exact>(task, place, again, out, given, shared.row.state);
    }
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
        Raw<WIDE> raw;
        raw.load(row, k);
        float x[kVector];
        raw.get(row.code, x);
        for (int i = 0; i < kVector; ++i) x[i] *= by;
        raw.set(row.code, x);
        raw.store(row, k, slices.count(k));
    }
}

bool is_wide(const LossRows& rows) {
    return rows.logits.code == kFp32 || (rows.anchor.address && rows.anchor.code == kFp32);
}

Task task_of(const LossRows& rows, const Slices& slices) {
    return {rows.logits, rows.anchor, rows.token_ids, rows.width,
            head_of(rows.softcap, rows.temperature), slices};
}

// of the launches that keep nothing
Task task_of(const LossRows& rows) { return task_of(rows, slices_of(rows.width, 2, 0)); }

// so many blocks for each row
dim3 grid_of(int64_t rows, int parts) {
    const int64_t most = INT_MAX / parts;
    if (rows > most) {
        throw std::invalid_argument("the cuda backend takes up to " + std::to_string(most) +
                                    " rows of this width; got " + std::to_string(rows));
    }
    return dim3(static_cast<unsigned>(rows) * static_cast<unsigned>(parts));
}

// one cluster for each row; shared: bytes that a block takes
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LossRows& rows, const Task& task, int64_t shared,
            void* stream, Arguments... arguments) {
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(task.slices.parts);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid_of(rows.rows, task.slices.parts);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, task, arguments...), "launching the loss");
}

// Whether the GPU runs clusters of so many blocks with so much shared memory each: those of more
// than kMaxParts, for all of which it has to be asked.
template <class Kernel>
bool has_clusters_of(int parts, Kernel* kernel, int64_t shared) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "asking for large clusters");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(parts));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    int found = 0;
    check(cudaOccupancyMaxPotentialClusterSize(&found, kernel, &config), "asking for clusters");
    return found >= parts;
}

// rows that the blocks keep in shared memory, as far as it goes
template <class Kernel, class... Arguments>
void launch_kept(Kernel* kernel, const LossRows& rows, void* stream, Arguments... arguments) {
    int device = 0, most = 0;
    check(cudaGetDevice(&device), "finding the device");
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "asking for the shared memory of a block");
    most -= kStatic;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
          "asking for shared memory");
    const int bytes = (is_wide(rows) ? 4 : 2) * (rows.anchor.address ? 2 : 1);
    Slices slices = slices_of(rows.width, bytes, most, 2 * kMaxParts);
    if (slices.parts > kMaxParts &&
        !has_clusters_of(slices.parts, kernel, slices.resident * kVector * bytes)) {
        slices = slices_of(rows.width, bytes, most);
    }
    const int64_t shared = slices.resident * kVector * bytes;
    launch(kernel, rows, task_of(rows, slices), shared, stream, arguments...);
}

}  // namespace

void loss_stats_cuda(const LossRows& rows, const uint8_t* kept, bool entropy,
                     const LossStats& stats, void* stream) {
    if (rows.rows == 0) return;
    const Task task = task_of(rows);
    const auto run = [&](auto wide, auto asked) {
        launch(stats_kernel<decltype(asked), decltype(wide)::value>, rows, task, 0, stream, kept,
               stats);
    };
    as_constant(is_wide(rows), [&](auto wide) {
        as_constant(entropy, [&](auto entropy) {
            constexpr bool kEntropy = decltype(entropy)::value;
            if (!rows.anchor.address) return run(wide, Asked<kEntropy, false, kNoKl>());
            as_constant<kReverse, kForward, kNoKl>(rows.exact_kl, [&](auto exact_kl) {
                run(wide, Asked<kEntropy, true, decltype(exact_kl)::value>());
            });
        });
    });
}

void loss_gradient_cuda(const LossRows& rows, const float* upstream, const double* state,
                        const LossMatrix& gradient, void* stream) {
    if (rows.rows == 0) return;
    const Task task = task_of(rows);
    as_constant(is_wide(rows), [&](auto wide) {
        as_constant<kReverse, kForward, kNoKl>(rows.exact_kl, [&](auto exact_kl) {
            launch(gradient_kernel<decltype(exact_kl)::value, decltype(wide)::value>, rows, task,
                   0, stream, upstream, state, gradient);
        });
    });
}

void loss_fused_cuda(const LossRows& rows, const uint8_t* kept, const float* upstream,
                     const LossStats& stats, const LossMatrix& gradient, void* stream) {
    if (rows.rows == 0) return;
    const auto run = [&](auto wide, auto asked) {
        launch_kept(fused_kernel<decltype(asked), decltype(wide)::value>, rows, stream, kept,
                    upstream, stats, gradient);
    };
    as_constant(is_wide(rows), [&](auto wide) {
        if (!rows.anchor.address) return run(wide, Asked<true, false, kNoKl>());
        as_constant<kReverse, kForward, kNoKl>(rows.exact_kl, [&](auto exact_kl) {
            run(wide, Asked<true, true, decltype(exact_kl)::value>());
        });
    });
}

void loss_scale_cuda(const LossMatrix& matrix, int64_t rows, int64_t width, const float* factor,
                     void* stream) {
    if (rows == 0) return;
    const Slices slices = slices_of(width, 2, 0);
    const auto kernel = matrix.code == kFp32 ? scale_kernel<true> : scale_kernel<false>;
    kernel<<<grid_of(rows, slices.parts), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        matrix, width, slices, factor);
    check(cudaGetLastError(), "launching the scaling of a gradient");
}

}  // namespace warp_fast
