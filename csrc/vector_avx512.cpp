// The loops of vector.inc for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#define CAPABILITY avx512
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define LANES 16
#define ROWS_AT_ONCE 6
#define VECTORS_AT_ONCE 4
#include "vector.inc"
#endif
