// The loops of vector.inc for what the compiler takes for granted.
#define CAPABILITY baseline
#define LANES 4
#define ROWS_AT_ONCE 4
#define VECTORS_AT_ONCE 2
#include "vector.inc"
