// The slice of a row that a block takes, and how its vectors come to the threads: streamed through
// registers, or by way of shared memory, where they stay for a second look.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "lines.cuh"

namespace warp_fast {

constexpr int kThreads = 256;
constexpr int kAhead = 4;  // vectors of each thread that are on their way into shared memory

// one row and the slice of it that is this block's
struct Place {
    const Slices& slices;
    Line logits, anchor;
    int64_t token;
    int n, part, first, last;  // the row, the slice of it and its vectors
    int sampled_one, sampled;  // the vector of the sampled token, and where it is in there

    __device__ int sampled_of(int k) const { return k == sampled_one ? sampled : -1; }
    // whether some element of the vector does not count in the sums
    __device__ bool is_partial(int k) const { return k == slices.short_one || k == sampled_one; }
};

// a vector of the policy, and one of the anchor where there is one
template <bool ANCHOR, bool WIDE>
struct Pair {
    Raw<WIDE> logits, anchor;

    __device__ void load(const Place& place, int k) {
        logits.load(place.logits, k);
        if (ANCHOR) anchor.load(place.anchor, k);
    }
};

// straight from memory: the next vectors travel while these are worked on
template <bool ANCHOR, bool WIDE>
struct Streamed {
    const Place& place;
    Pair<ANCHOR, WIDE> ahead;

    __device__ explicit Streamed(const Place& place) : place(place) {
        load(place.first + threadIdx.x);
    }
    __device__ void load(int k) {
        if (k < place.last) ahead.load(place, k);
    }
    __device__ Pair<ANCHOR, WIDE> take(int k) {
        const Pair<ANCHOR, WIDE> found = ahead;
        load(k + kThreads);
        return found;
    }
};

// The shared memory of a block: the first `count` vectors of its slice, word by word over all of
// them, so that neighbours meet no bank conflict. A thread reads only what it put there itself.
template <bool ANCHOR, bool WIDE>
struct Pool {
    Word* words;
    int count;

    __device__ Word* word(bool anchor, int w, int k) const {
        return words + (anchor * (1 + WIDE) + w) * count + k;
    }
};

// once more from the pool; what did not fit there is loaded without looking ahead
template <bool ANCHOR, bool WIDE>
struct Kept {
    const Place& place;
    Pool<ANCHOR, WIDE> pool;

    __device__ Pair<ANCHOR, WIDE> take(int k) const {
        const int at = k - place.first;
        Pair<ANCHOR, WIDE> found;
        if (at >= pool.count) {
            found.load(place, k);
            return found;
        }
        for (int w = 0; w <= WIDE; ++w) {
            found.logits.word[w] = *pool.word(false, w, at);
            if (ANCHOR) found.anchor.word[w] = *pool.word(true, w, at);
        }
        return found;
    }
};

// from memory into the pool without a register between, some vectors ahead; rows that are aligned
template <bool ANCHOR, bool WIDE>
struct Arriving {
    const Place& place;
    Pool<ANCHOR, WIDE> pool;

    __device__ Arriving(const Place& place, const Pool<ANCHOR, WIDE>& pool)
        : place(place), pool(pool) {
        for (int i = 0; i < kAhead; ++i) send(place.first + threadIdx.x + i * kThreads);
    }
    __device__ Pair<ANCHOR, WIDE> take(int k) const {
        send(k + kAhead * kThreads);
        __pipeline_wait_prior(kAhead);
        return Kept<ANCHOR, WIDE>{place, pool}.take(k);
    }
    // whole words, as `window` reads: the last may hold bytes from behind the row
    __device__ void send(int k) const {
        if (k < place.last && k - place.first < pool.count) {
            copy(place.logits, k, false);
            if (ANCHOR) copy(place.anchor, k, true);
        }
        __pipeline_commit();
    }
    __device__ void copy(const Line& line, int k, bool anchor) const {
        const char* from = place_in<WIDE>(line, k);
        for (int w = 0; w <= WIDE; ++w, from += sizeof(Word)) {
            if (w > 0 && (line.code != kFp32 || from >= line.end)) return;
            __pipeline_memcpy_async(pool.word(anchor, w, k - place.first), from, sizeof(Word));
        }
    }
};

// the same of other rows, whose words have to be put together in registers
template <bool ANCHOR, bool WIDE>
struct Assembled {
    Streamed<ANCHOR, WIDE> source;
    Pool<ANCHOR, WIDE> pool;

    __device__ Assembled(const Place& place, const Pool<ANCHOR, WIDE>& pool)
        : source(place), pool(pool) {}
    __device__ Pair<ANCHOR, WIDE> take(int k) {
        const Pair<ANCHOR, WIDE> found = source.take(k);
        const int at = k - source.place.first;
        for (int w = 0; w <= WIDE && at < pool.count; ++w) {
            *pool.word(false, w, at) = found.logits.word[w];
            if (ANCHOR) *pool.word(true, w, at) = found.anchor.word[w];
        }
        return found;
    }
};

// this thread's vectors, one after the other
template <class Source, class Each>
__device__ __forceinline__ void each_vector(const Place& place, Source& source, Each each) {
    for (int k = place.first + threadIdx.x; k < place.last; k += kThreads) {
        auto pair = source.take(k);
        each(k, pair);
    }
}

}  // namespace warp_fast
