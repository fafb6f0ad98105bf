/* Pieces of a symmetric matrix times a few columns: one pass over the memory of a piece gives the products with it and
   with its transpose. */

#include "vectors.h"

#define ROWS (REGISTERS / 5) /* at a time: what is added to columns is read once for all of them */
#define PANELS 2             /* vectors of columns of the tables at a time */
#define TILE 256             /* sums of so many columns of a piece at a time stay in the first cache (our choice) */

#define SUFFIX double
#define REAL double
#include "pieces_template.h"
#undef SUFFIX
#undef REAL

#define SUFFIX float
#define REAL float
#include "pieces_template.h"
