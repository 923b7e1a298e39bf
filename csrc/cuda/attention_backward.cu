#include "attention_backward.cuh"

namespace sgalign::cuda {

template void backward<SGALIGN_TYPE>(AttentionCall, const Queue&);

}  // namespace sgalign::cuda
