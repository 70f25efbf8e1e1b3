// The loops of vector.inc for what the compiler takes for granted.
#define CAPABILITY baseline
#define ROWS_AT_ONCE 1
#define VECTORS_AT_ONCE 2
#include "vector.inc"
