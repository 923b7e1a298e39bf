#include "attention_forward.cuh"

namespace sgalign::cuda {

template void forward<SGALIGN_TYPE>(const AttentionCall&, const Queue&);

}  // namespace sgalign::cuda
