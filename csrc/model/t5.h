/* What of T5 is of use alone. */
#ifndef B2_MODEL_T5_H
#define B2_MODEL_T5_H

#include <stdint.h>

/* T5's relative position bias, from buckets to distances: out [H, 2L - 1] with L = max_distance + 1, entry d + L - 1 for
 * a key d places behind its query (d < 0: before it), which is the form that b2_attention reads; table [R, H] as the
 * checkpoint has it. Half of the buckets count single places, the others grow with the logarithm up to max_distance,
 * from where all are alike (T5Attention._relative_position_bucket). `bidirectional`: the buckets are shared out between
 * both directions; else keys behind the query, which a causal mask hides, count as distance 0.
 * Needs buckets >= 4 and max_distance > buckets / 2. */
void b2_t5_distance_bias(float *out, const float *table, int buckets, int heads, int64_t max_distance,
                         int bidirectional);

#endif
