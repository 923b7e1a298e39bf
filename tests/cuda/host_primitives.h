// The functions of csrc/cuda/primitives.cuh on the CPU, for tests only. The threads of a block are fibers that take
// turns. The instructions are emulated according to the tables of the PTX manual.
//
// The lanes of a warp run one after the other from one collective operation to the next. The value that a lane passes
// to the others stays in `exchange` until all have read it. A barrier does the same for the whole block. It is an error
// if threads reach different operations. Data that a thread could not have on a GPU is NaN: shared memory until it is
// written, and the target of an asynchronous copy until the copy has arrived. With SGALIGN_RACE_CHECK, it is an error
// if two threads access the same byte of shared memory, at least one of them writes, and no barrier orders the
// accesses.
#pragma once

#include <sys/mman.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace sgalign::host {

// ------------------------------------------------------------------------------------------------------- fibers

constexpr size_t kStack = 256 << 10;

extern "C" void sgalign_switch_fiber(void** from, void* to);
#if defined(__x86_64__)
// Save the registers that a function must preserve, and continue where the other fiber stopped.
asm(R"(
.text
.hidden sgalign_switch_fiber
.weak sgalign_switch_fiber
.type sgalign_switch_fiber, @function
sgalign_switch_fiber:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#else
#error "the fibers are written for x86-64"
#endif

struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool read;  // if false, the target becomes zeros
};

struct Thread {
    void* stack_pointer;
    const char* waits_for;  // the collective operation that the thread has reached
    uint32_t turns, barriers, warp_barriers;
    bool done;
    std::vector<Copy> copies;
};

union Exchange {
    uint32_t words[6];
    const void* address;
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Exchange> exchange[2];
    char* stacks = nullptr;
    size_t stack_count = 0;
    void* main = nullptr;
    int current = 0, index = 0, index_y = 0;
    std::unique_ptr<char[]> memory;
    char* shared = nullptr;
    size_t shared_bytes = 0;
    std::string error;
    void (*run)(void*) = nullptr;
    void* argument = nullptr;
};

inline Block block;

inline Thread& me() { return block.threads[block.current]; }

inline void switch_to(int thread) {
    Thread& from = me();
    block.current = thread;
    sgalign_switch_fiber(&from.stack_pointer, block.threads[thread].stack_pointer);
}

inline void fail(const std::string& message) {
    if (block.error.empty())
        block.error = message + ", thread " + std::to_string(block.current) + " of block " +
                      std::to_string(block.index) + ", " + std::to_string(block.index_y);
}

// Give up on the block and never resume its fibers. Their frames have marked the stacks for the sanitizer. These marks
// are removed, because the fibers of the next block use the same stacks.
[[noreturn]] inline void give_up(const std::string& message) {
    fail(message);
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(block.stacks, block.stack_count * kStack);
#endif
    void* unused;
    sgalign_switch_fiber(&unused, block.main);
    __builtin_unreachable();
}

inline void wait_for(const char* what, int first, int count) {
    Thread& thread = me();
    thread.waits_for = what;
    if (block.current > first) {
        const Thread& before = block.threads[block.current - 1];
        const bool same_warp = block.current % kWarp != 0;
        if (before.done || (same_warp && before.turns != thread.turns) || before.barriers != thread.barriers ||
            strcmp(before.waits_for, what))
            give_up(std::string("threads diverge at ") + what + " and " + (before.done ? "the end" : before.waits_for));
    }
    switch_to(block.current + 1 < first + count ? block.current + 1 : first);
}

// Pass `mine` to the other lanes of the warp, wait until all of them have passed theirs, and return the values of all
// lanes.
inline Exchange* exchange(const char* what, const Exchange& mine) {
    const int first = block.current / kWarp * kWarp;
    std::vector<Exchange>& all = block.exchange[++me().turns % 2];
    all[block.current] = mine;
    wait_for(what, first, kWarp);
    return &all[first];
}

__attribute__((no_sanitize("address"))) inline void fiber() {
    block.run(block.argument);
    Thread& thread = me();
    if (!thread.copies.empty()) fail("a copy is not waited for");
    thread.done = true;
    const int next = block.current + 1;
    if (block.current > 0 && !block.threads[block.current - 1].done) give_up("threads diverge at the end");
    if (next < int(block.threads.size())) switch_to(next);
    void* unused;
    sgalign_switch_fiber(&unused, block.main);
}

inline void run_block(int threads) {
    if (block.stack_count < size_t(threads)) {
        if (block.stacks) munmap(block.stacks, block.stack_count * kStack);
        block.stack_count = threads;
        block.stacks =
            (char*)mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (block.stacks == MAP_FAILED) throw std::bad_alloc();
    }
    block.threads.assign(threads, {});
    for (auto& all : block.exchange) all.resize(threads);
    for (int i = 0; i < threads; ++i) {
        void** top = (void**)(block.stacks + (i + 1) * kStack) - 2;
        *top = (void*)&fiber;
        block.threads[i].stack_pointer = top - 6;  // six saved registers
    }
    block.current = 0;
    sgalign_switch_fiber(&block.main, block.threads[0].stack_pointer);
}

// -------------------------------------------------------------------------------------------------- shared memory

struct Access {
    int thread = -1;  // -1: none; kLanes + warp: several threads of a warp; kMany: threads of several warps
    uint32_t barriers, warp_barriers;
};
struct Byte {
    Access write, read;
};
constexpr int kLanes = 1 << 16, kMany = 1 << 20;
#ifdef SGALIGN_RACE_CHECK
inline std::vector<Byte> accesses;

inline int warp_of(int thread) { return thread < kLanes ? thread / kWarp : thread - kLanes; }

inline bool is_ordered(const Access& before) {
    if (before.thread < 0 || before.thread == block.current || before.barriers < me().barriers) return true;
    return warp_of(before.thread) == block.current / kWarp && before.warp_barriers < me().warp_barriers;
}

inline void check_access(const void* address, int bytes, bool writes) {
    const ptrdiff_t first = (const char*)address - block.shared;
    for (ptrdiff_t i = first; i < first + bytes; ++i) {
        Byte& byte = accesses.at(i);
        if (!is_ordered(byte.write) || (writes && !is_ordered(byte.read)))
            fail("a race at byte " + std::to_string(i) + " of shared memory");
        Access now{block.current, me().barriers, me().warp_barriers};
        if (writes) {
            byte.write = now;
        } else {
            const Access& last = byte.read;
            if (last.thread >= 0 && last.thread != block.current && last.barriers == now.barriers) {
                if (warp_of(last.thread) != block.current / kWarp)
                    now.thread = kMany;
                else if (last.warp_barriers == now.warp_barriers)
                    now.thread = kLanes + block.current / kWarp;
            }
            byte.read = now;
        }
    }
}
#else
inline void check_access(const void*, int, bool) {}
#endif

inline float half_to_float(uint16_t bits) {
    static const std::vector<float> table = [] {
        std::vector<float> values(1 << 16);
        for (int i = 0; i < 1 << 16; ++i) {
            const int exponent = i >> 10 & 31, fraction = i & 1023;
            const float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                                : exponent == 0 ? std::ldexp(float(fraction), -24)
                                                : std::ldexp(float(fraction + 1024), exponent - 25);
            values[i] = i >> 15 ? -value : value;
        }
        return values;
    }();
    return table[bits];
}

inline uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    const float size = std::fabs(value);
    if (std::isnan(value)) return 0x7fff;
    if (size >= 65520) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | uint16_t(std::nearbyint(std::ldexp(size, 24)));
    bits &= 0x7fffffff;
    bits += 0xfff + (bits >> 13 & 1);
    return sign | uint16_t((bits >> 13) - (112 << 10));
}

inline uint16_t float_to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace sgalign::host

namespace sgalign {

inline int thread_index() { return host::block.current; }
inline int block_index() { return host::block.index; }
inline int block_index_y() { return host::block.index_y; }
inline int lane_index() { return thread_index() % kWarp; }
inline int warp_index() { return thread_index() / kWarp; }
inline char* shared_memory() { return host::block.shared; }

template <class T>
inline T shared_load(const T* address) {
    host::check_access(address, sizeof(T), false);
    return *address;
}
template <class T>
inline void shared_store(T* address, T value) {
    host::check_access(address, sizeof(T), true);
    *address = value;
}

inline void sync_block() {
    ++host::me().barriers;
    host::wait_for("sync_block", 0, int(host::block.threads.size()));
}
inline void sync_warp() {
    ++host::me().turns;
    ++host::me().warp_barriers;
    host::wait_for("sync_warp", thread_index() / kWarp * kWarp, kWarp);
}
inline uint64_t multiply_wide(uint32_t a, uint32_t b) { return uint64_t(a) * b; }
inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float shuffle_xor(float value, int mask) {
    return as_float(host::exchange("shuffle_xor", {{as_bits(value)}})[lane_index() ^ mask].words[0]);
}
inline uint32_t ballot(bool vote) {
    const host::Exchange* votes = host::exchange("ballot", {{vote}});
    uint32_t result = 0;
    for (int i = 0; i < kWarp; ++i) result |= votes[i].words[0] << i;
    return result;
}

}  // namespace sgalign

namespace sgalign::host {

inline void start_copy(const char* what, const Copy& copy) {
    if (uintptr_t(copy.to) % copy.bytes || uintptr_t(copy.from) % copy.bytes)
        fail(std::string(what) + ": an address is not a multiple of " + std::to_string(copy.bytes));
    check_access(copy.to, copy.bytes, true);
    memset(copy.to, 0xff, copy.bytes);
    me().copies.push_back(copy);
}

}  // namespace sgalign::host

namespace sgalign {

inline void copy_async(void* to, const void* from, bool read) { host::start_copy("copy_async", {to, from, 16, read}); }
inline void copy_word_async(void* to, const void* from, bool read) {
    host::start_copy("copy_word_async", {to, from, 4, read});
}
inline void copies_wait() {
    for (const host::Copy& copy : host::me().copies) {
        host::check_access(copy.to, copy.bytes, true);
        if (copy.read)
            memcpy(copy.to, copy.from, copy.bytes);
        else
            memset(copy.to, 0, copy.bytes);
    }
    host::me().copies.clear();
}

inline void load_matrices(uint32_t (&words)[4], const void* row) {
    if (uintptr_t(row) % 16) host::fail("load_matrices: an address is not a multiple of 16");
    host::Exchange mine{};
    mine.address = row;
    const host::Exchange* rows = host::exchange("load_matrices", mine);
    for (int m = 0; m < 4; ++m)
        words[m] = shared_load((const uint32_t*)rows[8 * m + lane_index() / 4].address + lane_index() % 4);
}
inline void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
    if (uintptr_t(row) % 16) host::fail("load_matrices_transposed: an address is not a multiple of 16");
    host::Exchange mine{};
    mine.address = row;
    const host::Exchange* rows = host::exchange("load_matrices_transposed", mine);
    for (int m = 0; m < 4; ++m) {
        const int first = 8 * m + 2 * (lane_index() % 4), column = lane_index() / 4;
        words[m] = shared_load((const uint16_t*)rows[first].address + column) |
                   shared_load((const uint16_t*)rows[first + 1].address + column) << 16;
    }
}

// At least as inaccurate as on a GPU: the exact number is truncated after 22 bits.
inline float fast_exp2(float value) {
    const float exact = float(std::exp2(double(value)));
    return exact < 0x1p-126f ? 0 : as_float(as_bits(exact) & (std::isfinite(exact) ? ~3u : ~0u));
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return as_float(uint32_t(value.bits) << 16); }
inline float to_float(Half value) { return host::half_to_float(value.bits); }

// The place of an element in the PTX manual's figures for mma.m16n8k16 (16-bit) and mma.m16n8k8 (tf32).
struct Place {
    int lane, word, half;
};
template <class T>
constexpr int kMmaDepth = sizeof(T) == 2 ? 16 : 8;
template <class T>
constexpr Place place_of_a(int row, int k) {
    if (sizeof(T) == 2) return {row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2};
    return {row % 8 * 4 + k % 4, row / 8 + k / 4 * 2, 0};
}
template <class T>
constexpr Place place_of_b(int k, int column) {
    if (sizeof(T) == 2) return {column * 4 + k % 8 / 2, k / 8, k % 2};
    return {column * 4 + k % 4, k / 4, 0};
}
constexpr Place place_of_accumulator(int row, int column) {
    return {row % 8 * 4 + column / 2, row / 8 * 2 + column % 2, 0};
}

template <class T>
inline float element_of(const host::Exchange* all, Place place, int offset) {
    const uint32_t word = all[place.lane].words[offset + place.word];
    if constexpr (sizeof(T) == 2)
        return to_float(T{uint16_t(word >> 16 * place.half)});
    else
        return as_float(word & 0xffffe000);  // tensor cores ignore the bits that tf32 does not have
}

// The sum as tensor cores compute it. They do not round. They truncate each number at a bit that depends on the largest
// number, and then they truncate the sum.
inline float truncated_sum(const float* numbers, int count) {
    float largest = 0;
    double sum = 0;
    for (int i = 0; i < count; ++i) {
        if (!std::isfinite(numbers[i])) largest = INFINITY;
        largest = std::max(largest, std::fabs(numbers[i]));
    }
    if (largest == 0 || std::isinf(largest)) {
        for (int i = 0; i < count; ++i) sum += numbers[i];
        return float(sum);
    }
    // The largest power of two in `largest`, at least the smallest normal number, times 2^-24. So each number keeps one
    // more bit than a float32 has.
    const double unit = double(as_float(std::max(as_bits(largest) & 0x7f800000, 1u << 23))) * 0x1p-24;
    int64_t units = 0;
    for (int i = 0; i < count; ++i) units += int64_t(numbers[i] * (1 / unit));
    sum = double(units) * unit;
    const float rounded = float(sum);
    return std::fabs(rounded) > std::fabs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
    const host::Exchange* all = host::exchange("mma", {{a[0], a[1], a[2], a[3], b[0], b[1]}});
    const int group = lane_index() / 4, pair = lane_index() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = group + i / 2 * 8, column = 2 * pair + i % 2;
        float numbers[kMmaDepth<T> + 1];
        for (int k = 0; k < kMmaDepth<T>; ++k)
            numbers[k] = element_of<T>(all, place_of_a<T>(row, k), 0) * element_of<T>(all, place_of_b<T>(k, column), 4);
        numbers[kMmaDepth<T>] = d[i];
        d[i] = truncated_sum(numbers, kMmaDepth<T> + 1);
    }
}

inline uint32_t round_tf32(float value) {
    return std::isnan(value) || std::isinf(value) ? as_bits(value) : (as_bits(value) + 0x1000) & 0xffffe000;
}

template <class T>
inline uint32_t pack(float low, float high);
template <>
inline uint32_t pack<Half>(float low, float high) {
    return host::float_to_half(low) | uint32_t(host::float_to_half(high)) << 16;
}
template <>
inline uint32_t pack<BFloat16>(float low, float high) {
    return host::float_to_bfloat16(low) | uint32_t(host::float_to_bfloat16(high)) << 16;
}

}  // namespace sgalign

namespace sgalign::host {

// Run the blocks of a grid one after the other.
template <class Parameters>
void run_grid(void (*kernel)(Parameters), int64_t blocks, int blocks_y, int threads, size_t shared_bytes,
              const Parameters& parameters) {
    struct Call {
        void (*kernel)(Parameters);
        const Parameters& parameters;
    } call{kernel, parameters};
    block.run = [](void* argument) {
        const Call& call = *(const Call*)argument;
        call.kernel(call.parameters);
    };
    block.argument = &call;
    block.error.clear();
    for (block.index_y = 0; block.index_y < blocks_y; ++block.index_y)
        for (block.index = 0; block.index < blocks; ++block.index) {
            block.memory.reset(new char[shared_bytes + 128]);  // new for each block, so a sanitizer sees where it ends
            block.shared = block.memory.get();
            block.shared += (128 - uintptr_t(block.shared) % 128) % 128;
            memset(block.shared, 0xff, shared_bytes);
#ifdef SGALIGN_RACE_CHECK
            accesses.assign(shared_bytes, {});
#endif
            run_block(threads);
            if (!block.error.empty()) throw std::runtime_error(block.error);
        }
}

}  // namespace sgalign::host
