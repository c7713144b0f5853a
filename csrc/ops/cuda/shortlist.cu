/* Shortlists (shortlist.h) on their own: a block per row, then to the host. */
#include "ops/cuda/shortlist.h"

#include "ops/cuda/cuda_ops.h"

static __global__ void __launch_bounds__(B2_SHORTLIST_THREADS) shortlist_kernel(b2_tensor x, b2_shortlist_parts all, int adds_up)
{
    b2_shortlist_row(x, all, blockIdx.x, adds_up);
}

int b2_cuda_shortlist(b2_ctx *ctx, b2_shortlist *list, b2_tensor x, void *there, void *here, b2_err *err)
{
    b2_shortlist_parts device = b2_shortlist_parts_of(there, x.rows, list->k, list->listed_ld);
    b2_shortlist_parts host = b2_shortlist_parts_of(here, x.rows, list->k, list->listed_ld);
    size_t listed_bytes = (size_t)(x.rows * list->listed_ld) * sizeof(int32_t);
    size_t bytes = (size_t)((char *)device.listed - (char *)there);
    if (listed_bytes > 0 && b2_cuda_upload(ctx, device.listed, list->listed, listed_bytes, err) < 0)
        return -1;
    B2_LAUNCH(shortlist_kernel, dim3((unsigned)x.rows), dim3(B2_SHORTLIST_THREADS), 0, b2_cuda_stream(ctx), x,
              device, list->adds_up);
    if (b2_cuda_launched("shortlist", err) < 0 || b2_cuda_download(ctx, here, there, bytes, err) < 0)
        return -1;
    list->sums = host.sums;
    list->tops = host.tops;
    list->crowded = host.crowded;
    list->values = host.values;
    list->ids = host.ids;
    list->listed_values = host.listed_values;
    return 0;
}
