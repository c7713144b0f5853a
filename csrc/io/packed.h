/* Files of packed weights: safetensors files whose tensors are the blocks that kernels read, so that they are mapped and
 * used as they lie. docs/FORMATS.md has the form.
 *
 * Every tensor is U8 [bytes], at a multiple of 64 bytes of the file; what lies in it stands in __metadata__ under its name:
 *     "I4 quads n=2560 k=10240 group=32 columns=1"
 * beside the entries named here. Nothing of it depends on the machine that wrote it. */
#ifndef B2_IO_PACKED_H
#define B2_IO_PACKED_H

#include "core/tensor.h"
#include "io/safetensors.h"

/* Changes when an old file would be read wrongly. */
#define B2_PACKED_VERSION "1"
#define B2_PACKED_VERSION_KEY "blip2c.packed"
#define B2_PACKED_DTYPES_KEY "blip2c.dtypes" /* how each part is held, see b2_policies_name */

enum { B2_PACKED_TEXT = 128, B2_PACKED_ALIGNMENT = 64 };

/* 1: a file of packed weights of this version; 0: another kind of file; -1: of another version. */
int b2_packed_is(const b2_st_file *file, b2_err *err);

/* The text for `w` (dtype, layout, n, k, group, column_scales are read). */
void b2_packed_describe(char text[B2_PACKED_TEXT], const b2_weight *w);

/* Reads dtype, layout, n, k and group of `tensor` from its file into `w` (no pointers are set). Only what
 * b2_packed_describe writes is taken, and only layouts, groups and dtypes that belong together; B2_E_FORMAT naming the
 * file, the rule and the tensor. Sizes are for the caller to check: they belong to the packing. */
int b2_packed_read(b2_weight *w, int *has_column_scales, const b2_st_file *file, const b2_st_tensor *tensor, b2_err *err);

#endif
