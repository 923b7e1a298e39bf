// The rest of the tests' module: the primitives one by one, and what csrc/bindings.cpp wants of the CPU's kernels.
#include "../../csrc/cuda/launch.cuh"

namespace sgalign {

extern const AttentionKernels attention_baseline;
extern const RelationKernels relation_baseline;
extern const AlignmentKernels alignment_baseline;
const AttentionKernels attention_baseline{};
const RelationKernels relation_baseline{};
const AlignmentKernels alignment_baseline{};

namespace {

// Words of each lane in, words of each lane out.
struct Lanes {
    const uint32_t* in;
    uint32_t* out;
    int type;
};

template <class T>
void mma_kernel(Lanes lanes) {
    const uint32_t* in = lanes.in + 10 * lane_index();
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]}, b[2] = {in[4], in[5]};
    float d[4] = {as_float(in[6]), as_float(in[7]), as_float(in[8]), as_float(in[9])};
    mma(d, a, b, T{});
    for (int i = 0; i < 4; ++i) lanes.out[4 * lane_index() + i] = as_bits(d[i]);
}

// Four matrices of 8 rows of 16 bytes, one after the other; type 1: transposed.
void load_matrices_kernel(Lanes lanes) {
    uint32_t* const shared = (uint32_t*)shared_memory();
    copy_async(shared + 4 * lane_index(), lanes.in + 4 * lane_index(), true);
    copies_wait();
    sync_block();
    uint32_t words[4];
    if (lanes.type)
        load_matrices_transposed(words, shared + 4 * lane_index());
    else
        load_matrices(words, shared + 4 * lane_index());
    for (int i = 0; i < 4; ++i) lanes.out[4 * lane_index() + i] = words[i];
}

// Conversions of one float32, and what lanes tell each other.
void convert_kernel(Lanes lanes) {
    const float value = as_float(lanes.in[lane_index()]);
    uint32_t* const out = lanes.out + 7 * lane_index();
    out[0] = pack<Half>(value, -value);
    out[1] = pack<BFloat16>(value, -value);
    out[2] = as_bits(to_float(Half{uint16_t(out[0])}));
    out[3] = round_tf32(value);
    out[4] = as_bits(shuffle_xor(value, 5));
    out[5] = ballot(value > 0);
    out[6] = as_bits(fast_exp2(value));
}

// Mistakes that must not pass.
void mistake_kernel(Lanes lanes) {
    uint32_t* const shared = (uint32_t*)shared_memory();
    const int i = thread_index();
    switch (lanes.type) {
        case 0:  // none
            shared_store(shared + i, 1u);
            sync_block();
            lanes.out[i % 32] = shared_load(shared + (i ^ 32));
            break;
        case 1:  // a value of the other warp, without a barrier
            shared_store(shared + i, 1u);
            sync_warp();
            lanes.out[i % 32] = shared_load(shared + (i ^ 32));
            break;
        case 2:  // a neighbour's, without a barrier of the warp
            shared_store(shared + i, 1u);
            shuffle_xor(0, 1);
            lanes.out[i % 32] = shared_load(shared + (i ^ 1));
            break;
        case 3:  // written again while the other warp may read
            shared_store(shared + i, 1u);
            sync_block();
            lanes.out[i % 32] = shared_load(shared + (i ^ 32));
            shared_store(shared + i, 2u);
            break;
        case 4:  // one lane does something else
            if (i == 7)
                sync_warp();
            else
                shuffle_xor(0, 1);
            break;
        case 5:  // one warp has a barrier too many
            if (i < 32) sync_block();
            break;
        case 6:  // read before it has arrived
            copy_async(shared + 4 * i, lanes.in, true);
            lanes.out[i % 32] = shared_load(shared + 4 * i);
            copies_wait();
            break;
        case 7: copy_async(shared + 4 * i, lanes.in, true); break;  // never waited for
        case 8:                                                     // no multiple of 16
            copy_async(shared + 4 * i + 1, lanes.in, true);
            copies_wait();
            break;
        case 9:  // written after another lane of the warp and this one have read
            if (i < 2) lanes.out[i] = shared_load(shared);
            if (i == 1) shared_store(shared, 1u);
            break;
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void run_mma(int type, const uint32_t* in, uint32_t* out) {
    void (*const kernels[])(Lanes) = {mma_kernel<Half>, mma_kernel<BFloat16>, mma_kernel<float>};
    cuda::launch("mma", kernels[type], 1, 1, 32, 0, {}, Lanes{in, out, 0});
}
EXPORT void run_load_matrices(int transposed, const uint32_t* in, uint32_t* out) {
    cuda::launch("load_matrices", load_matrices_kernel, 1, 1, 32, 512, {}, Lanes{in, out, transposed});
}
EXPORT void run_convert(const uint32_t* in, uint32_t* out) {
    cuda::launch("convert", convert_kernel, 1, 1, 32, 0, {}, Lanes{in, out, 0});
}
// The message of the mistake, or nothing.
EXPORT void run_mistake(int which, const uint32_t* in, uint32_t* out, char* message) {
    message[0] = 0;
    try {
        cuda::launch("mistake", mistake_kernel, 1, 1, 64, 2048, {}, Lanes{in, out, which});
    } catch (const std::exception& error) {
        strncpy(message, error.what(), 199);
    }
}

}  // namespace sgalign
