#include "model/lm.h"

#include <string.h>

static const b2_lm_class *const classes[] = {
    &b2_opt_class,
    &b2_t5_class,
};

const b2_lm_class *b2_lm_class_of(const char *model_type)
{
    for (size_t i = 0; i < sizeof classes / sizeof *classes; i++)
        if (strcmp(classes[i]->model_type, model_type) == 0)
            return classes[i];
    return NULL;
}
