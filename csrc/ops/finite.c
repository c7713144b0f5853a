/* What backends say of numbers that are none. A file of its own because each backend that is a library has it too. */
#include "ops/ops.h"

int b2_fail_finite(b2_err *err, const char *stage, int layer, int64_t row)
{
    if (layer == B2_LOGITS)
        return b2_fail(err, B2_E_NUMERIC, "%s head: NaN or Inf in the logits of row %lld", stage, (long long)row);
    if (layer == B2_GIVEN)
        return b2_fail(err, B2_E_NUMERIC, "%s: row %lld holds values that are not finite", stage, (long long)row);
    if (layer == 0)
        return b2_fail(err, B2_E_NUMERIC, "%s embeddings: NaN or Inf in row %lld", stage, (long long)row);
    return b2_fail(err, B2_E_NUMERIC, "%s layer %d: NaN or Inf in row %lld of its output", stage, layer - 1,
                   (long long)row);
}
