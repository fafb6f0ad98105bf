/* Rows of a dense matrix F, stored in double or single precision. One pass over the memory applies a rank-two change
   and multiplies by F and by its transpose: a row is still in the cache when the second product needs it. */

#include "stored.h"

#define ROWS 4 /* at a time: the vectors are read once for all of them */

#define SUFFIX double
#define STORE double
#include "factored_template.h"
#undef SUFFIX
#undef STORE

#define SUFFIX float
#define STORE float
#include "factored_template.h"
