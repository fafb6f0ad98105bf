/* Dense symmetric matrices: the lower triangle, rows packed one behind the other, stored in double or single
   precision. One pass over the memory applies a rank-two change and multiplies by a vector. */

#include "stored.h"

#define ROWS 6 /* at a time: the vectors are read once for all of them */

#define SUFFIX double
#define STORE double
#include "symmetric_template.h"
#undef SUFFIX
#undef STORE

#define SUFFIX float
#define STORE float
#include "symmetric_template.h"
