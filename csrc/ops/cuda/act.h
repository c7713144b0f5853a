/* The activations on one value, as the kernels of products and of rows apply them. erff, expf and tanhf are CUDA's own
 * (within 2 ulp). */
#ifndef B2_OPS_CUDA_ACT_H
#define B2_OPS_CUDA_ACT_H

#include "ops/cuda/cuda.h"

static __device__ __forceinline__ float b2_cuda_sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

static __device__ __forceinline__ float b2_cuda_act(float x, int act)
{
    switch (act) {
    case B2_ACT_GELU_ERF: return 0.5f * x * (1.0f + erff(x * 0.707106781f));
    case B2_ACT_RELU: return x < 0.0f ? 0.0f : x; /* NaN stays */
    case B2_ACT_GELU_TANH:
        /* (1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3) */
        return x * b2_cuda_sigmoid(1.59576912f * fmaf(0.044715f * x * x, x, x));
    case B2_ACT_QUICK_GELU: return x * b2_cuda_sigmoid(1.702f * x);
    case B2_ACT_SILU: return x * b2_cuda_sigmoid(x);
    default: return x;
    }
}

#endif
