/* Between the two halves of the stand-in: fibers.cpp runs blocks, runtime.cpp has memory, streams and graphs. */
#ifndef CUDA_HOST_HOST_H
#define CUDA_HOST_HOST_H

#include <string>

#include "cuda_runtime.h"

/* Runs one launch to its end on this thread. Returns "" or what went wrong. */
std::string cuda_host_run(const char *name, dim3 grid, dim3 block, size_t shared, const std::function<void()> &body);

enum { CUDA_HOST_SHARED_MOST = 227 << 10 };

#endif
