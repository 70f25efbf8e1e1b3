// The loops of vector.inc for AVX2 and FMA.
#if defined(__x86_64__)
#define CAPABILITY avx2
#define TARGET "avx2,fma"
#define LANES 8
#define ROWS_AT_ONCE 4
#define VECTORS_AT_ONCE 2
#include "vector.inc"
#endif
