// From the sums of threads to those of a row: over the lanes of a warp, the warps of a block and
// the blocks of a cluster, in fp64 and in a fixed order.
#pragma once

#include <cooperative_groups.h>

#include "near.cuh"
#include "slice.cuh"

namespace warp_fast {

namespace cg = cooperative_groups;

constexpr int kWarps = kThreads / 32;

struct Shared {
    Sums<double> warps[kWarps], block;
    Bases bases;
    Row row;
    float upstream[3];
    bool near;
};
static_assert(sizeof(Shared) <= kStatic);

template <class T>
__device__ T largest_of_lanes(T value) {
    for (int lane = 16; lane > 0; lane /= 2) {
        value = larger(value, __shfl_xor_sync(0xFFFFFFFFu, value, lane));
    }
    return value;
}

__device__ inline double sum_of_lanes(double value) {
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lane);
    return value;
}

// the sums of the 32 lanes of a warp as one, the same in each; NEAR: all relative to one score
template <class ASKED, bool NEAR, class T>
__device__ Sums<double> over_lanes(Sums<T> part) {
    Sums<double> all;
    if (!NEAR) {
        const T top = largest_of_lanes(part.top);
        const T anchor_top = ASKED::anchor ? largest_of_lanes(part.anchor_top) : part.anchor_top;
        part = lifted<ASKED>(part, top, anchor_top);
        all.top = top, all.anchor_top = anchor_top;
    }
    all.total = sum_of_lanes(part.total);
    if (ASKED::entropy) all.weighted = sum_of_lanes(part.weighted);
    if (ASKED::anchor) all.anchor_total = sum_of_lanes(part.anchor_total);
    if (ASKED::exact) all.apart = sum_of_lanes(part.apart);
    return all;
}

// The sums of the whole row, in every lane of warp 0 of every block of the cluster. No block may
// leave or come here again before all have read: a barrier of the cluster has to follow.
template <class ASKED, bool NEAR>
__device__ Sums<double> over_cluster(const Sums<float>& mine, Shared& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Sums<double> sums = over_lanes<ASKED, NEAR>(mine);
    if (lane == 0) shared.warps[warp] = sums;
    __syncthreads();
    if (warp == 0) {
        sums = over_lanes<ASKED, NEAR>(lane < kWarps ? shared.warps[lane] : Sums<double>());
        if (lane == 0) shared.block = sums;
    }
    cg::cluster_group cluster = cg::this_cluster();
    cluster.sync();
    if (warp == 0) {
        Sums<double> part;
        if (lane < cluster.num_blocks()) part = *cluster.map_shared_rank(&shared.block, lane);
        sums = over_lanes<ASKED, NEAR>(part);
    }
    return sums;
}

}  // namespace warp_fast
