// Enough of CUDA to run the package's kernels on the CPU, for tests that need no GPU; and not fast.
//
// The threads of a block take turns, each with a stack of its own. A warp runs until all of it waits for other warps or
// has ended, then the next one: as far ahead of each other as barriers let them, in one of two orders. So runs are
// repeatable, and a missing barrier shows as a wrong result in one of the orders. A shuffle is a barrier of its warp;
// threads that wait for each other at different barriers are an error.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __restrict__
#define __forceinline__ inline
#define __launch_bounds__(threads)

using std::exp;

struct Index {
    unsigned x, y;
};

Index threadIdx, blockIdx, blockDim, gridDim;

constexpr std::size_t SHARED_BYTES = 48 * 1024, STACK_BYTES = 32 * 1024, WARP = 32;
REAL tile[SHARED_BYTES / sizeof(REAL)];

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Thread {
    ucontext_t context;
    State state;
    Index index;
    REAL shuffled;
};

std::vector<Thread> threads;
std::vector<unsigned char> stacks;
ucontext_t scheduler;
std::size_t current;

inline void wait(State barrier)
{
    threads[current].state = barrier;
    const std::size_t self = current;
    swapcontext(&threads[self].context, &scheduler);
}

inline void __syncthreads() { wait(State::at_block_barrier); }

inline REAL __shfl_xor_sync(unsigned, REAL value, int lanes)
{
    const std::size_t self = current, other = self / WARP * WARP + (self % WARP ^ lanes);
    threads[self].shuffled = value;
    wait(State::at_warp_barrier);
    const REAL result = threads[other].shuffled;
    wait(State::at_warp_barrier);
    return result;
}

inline float __int_as_float(unsigned bits)
{
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Lets the threads from `begin` to `end` go on that wait at a barrier, if all do that have not ended.
inline bool release(std::size_t begin, std::size_t end, State barrier)
{
    bool any = false;
    for (std::size_t i = begin; i < end; ++i) {
        if (threads[i].state != barrier && threads[i].state != State::done) return false;
        any |= threads[i].state == barrier;
    }
    for (std::size_t i = begin; i < end; ++i)
        if (threads[i].state == barrier) threads[i].state = State::ready;
    return any;
}

inline void resume(std::size_t thread)
{
    if (threads[thread].state != State::ready) return;
    current = thread;
    threadIdx = threads[thread].index;
    swapcontext(&scheduler, &threads[thread].context);
}

enum Result { fine = 0, deadlock = 1, shared_overrun = 2 };

struct Launch {
    unsigned grid_x, grid_y, block_x, block_y, shared;
    int descending;
};

template <class... Args, std::size_t... I>
int run(void (*kernel)(Args...), const Launch& launch, void** args, std::index_sequence<I...>)
{
    static void (*entry)(Args...);
    static void** arguments;
    entry = kernel;
    arguments = args;
    void (*const start)() = [] {
        entry(*static_cast<Args*>(arguments[I])...);
        threads[current].state = State::done;
    };

    const std::size_t count = launch.block_x * launch.block_y;
    gridDim = {launch.grid_x, launch.grid_y};
    blockDim = {launch.block_x, launch.block_y};
    threads.resize(count);
    stacks.resize(count * STACK_BYTES);
    for (std::size_t block = 0; block < std::size_t{launch.grid_x} * launch.grid_y; ++block) {
        blockIdx = {unsigned(block % launch.grid_x), unsigned(block / launch.grid_x)};
        std::memset(tile, 0xff, sizeof tile);  // NaN
        for (std::size_t i = 0; i < count; ++i) {
            Thread& thread = threads[i];
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = &stacks[i * STACK_BYTES];
            thread.context.uc_stack.ss_size = STACK_BYTES;
            thread.context.uc_link = &scheduler;
            makecontext(&thread.context, start, 0);
            thread.state = State::ready;
            thread.index = {unsigned(i % launch.block_x), unsigned(i / launch.block_x)};
        }
        const std::size_t warps = (count + WARP - 1) / WARP;
        do {
            for (std::size_t turn = 0; turn < warps; ++turn) {
                const std::size_t begin = WARP * (launch.descending ? warps - 1 - turn : turn);
                const std::size_t end = begin + WARP < count ? begin + WARP : count;
                do {
                    for (std::size_t lane = 0; lane < end - begin; ++lane)
                        resume(launch.descending ? end - 1 - lane : begin + lane);
                } while (release(begin, end, State::at_warp_barrier));
            }
        } while (release(0, count, State::at_block_barrier));
        for (const Thread& thread : threads)
            if (thread.state != State::done) return deadlock;
        const unsigned char* bytes = reinterpret_cast<const unsigned char*>(tile);
        for (std::size_t i = launch.shared; i < sizeof tile; ++i)
            if (bytes[i] != 0xff) return shared_overrun;
    }
    return fine;
}

template <class... Args>
int run(void (*kernel)(Args...), const Launch& launch, void** args)
{
    return run(kernel, launch, args, std::index_sequence_for<Args...>{});
}

// What a test calls for a kernel, with the arguments as cuLaunchKernel takes them.
#define KERNEL(name)                                                      \
    extern "C" int run_##name(const Launch* launch, void** args)          \
    {                                                                     \
        return run(name, *launch, args);                                  \
    }
