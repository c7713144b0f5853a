#include "model/kv_cache.h"

#include "core/memory.h"

int b2_kv_cache_create(b2_kv_cache *cache, b2_memory *memory, b2_dtype dtype, int layers, int64_t width, int64_t rows,
                       b2_err *err)
{
    *cache = (b2_kv_cache){.memory = memory, .dtype = dtype, .layers = layers, .width = width, .rows = rows};
    if (rows > INT32_MAX)
        return b2_fail(err, B2_E_VALUE, "KV cache: %lld tokens at once are too many", (long long)rows);
    size_t count = (size_t)layers * (size_t)rows, size = (size_t)width * b2_dtype_size(dtype);
    cache->k = b2_memory_alloc(memory, count, size, "KV cache, keys", err);
    cache->v = cache->k ? b2_memory_alloc(memory, count, size, "KV cache, values", err) : NULL;
    if (cache->v)
        return 0;
    b2_kv_cache_release(cache);
    return -1;
}

void b2_kv_cache_release(b2_kv_cache *cache)
{
    b2_memory_free(cache->memory, cache->k);
    b2_memory_free(cache->memory, cache->v);
    *cache = (b2_kv_cache){0};
}

static b2_tensor layer_of(const b2_kv_cache *cache, char *block, int layer)
{
    size_t bytes = (size_t)(cache->rows * cache->width) * b2_dtype_size(cache->dtype);
    return b2_tensor_of((float *)(void *)(block + (size_t)layer * bytes), cache->rows, cache->width);
}

b2_tensor b2_kv_cache_keys(const b2_kv_cache *cache, int layer)
{
    return layer_of(cache, cache->k, layer);
}

b2_tensor b2_kv_cache_values(const b2_kv_cache *cache, int layer)
{
    return layer_of(cache, cache->v, layer);
}
