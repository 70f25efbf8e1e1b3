// The loops of vector.inc for what the compiler takes for granted.
#include "vector.h"

namespace {
// Sums kept in registers by the portable product.
constexpr int kRowsAtOnce = 1, kVectorsAtOnce = 2;
}  // namespace

#include "vector.inc"

namespace mcpo {

extern const Vector k_baseline;
const Vector k_baseline = {"baseline", transpose, interleave, round,
                         finish,   fold,      dlogits,    multiply};

}  // namespace mcpo
