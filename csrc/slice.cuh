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
    Line logits, anchor;
    int64_t n, token;
    int part, first, last;  // vectors
    int short_one, short_count;  // the vector that the end of the row cuts, and what is left of it
    int sampled_one, sampled;  // the vector of the sampled token, and where it is in there

    __device__ int count(int k) const { return k == short_one ? short_count : kVector; }
    __device__ int sampled_of(int k) const { return k == sampled_one ? sampled : -1; }
    // whether some element of the vector does not count in the sums
    __device__ bool is_partial(int k) const { return k == short_one || k == sampled_one; }
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

    __device__ void begin(int k) {
        if (k < place.last) ahead.load(place, k);
    }
    __device__ Pair<ANCHOR, WIDE> take(int k) {
        const Pair<ANCHOR, WIDE> found = ahead;
        begin(k + kThreads);
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

// from memory into the pool; what does not fit there is streamed without looking ahead
template <bool ANCHOR, bool WIDE>
struct Arriving {
    const Place& place;
    Pool<ANCHOR, WIDE> pool;

    __device__ void begin(int k) const {
        for (int i = 0; i < kAhead; ++i) send(k + i * kThreads);
    }
    __device__ Pair<ANCHOR, WIDE> take(int k) const {
        send(k + kAhead * kThreads);
        __pipeline_wait_prior(kAhead);
        return Kept{place, pool}.take(k);
    }

    // the same vectors once more
    struct Kept {
        const Place& place;
        Pool<ANCHOR, WIDE> pool;

        __device__ void begin(int) const {}
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

    __device__ void send(int k) const {
        if (k < place.last && k - place.first < pool.count) {
            copy(place.logits, k, false);
            if (ANCHOR) copy(place.anchor, k, true);
        }
        __pipeline_commit();
    }
    // rows that are not aligned wait: their words have to be put together
    __device__ void copy(const Line& line, int k, bool anchor) const {
        const int at = k - place.first;
        if (line.skip) {
            Raw<WIDE> raw;
            raw.load(line, k);
            for (int w = 0; w <= WIDE; ++w) *pool.word(anchor, w, at) = raw.word[w];
            return;
        }
        const char* from = place_in<WIDE>(line, k);
        for (int w = 0; w <= WIDE; ++w, from += sizeof(Word)) {
            if (w > 0 && (line.code != kFp32 || from >= line.end)) return;
            __pipeline_memcpy_async(pool.word(anchor, w, at), from, sizeof(Word));
        }
    }
};

// this thread's vectors, one after the other
template <class Source, class Each>
__device__ __forceinline__ void each_vector(const Place& place, Source source, Each each) {
    int k = place.first + threadIdx.x;
    source.begin(k);
    for (; k < place.last; k += kThreads) {
        auto pair = source.take(k);
        each(k, pair);
    }
}

}  // namespace warp_fast
