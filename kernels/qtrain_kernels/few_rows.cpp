// x (R, K) times the transpose of a weight (N, K) that lies in few bits, for few rows of x: each weight is read once, and
// the memory's speed is the limit.
//
// few_rows.py writes WIDTH (bits of a code), BLOCK (elements that share a scale, 0: none) and SCALE_BITS (the type of a
// scale's bits) before it. Sums are
// float32, in LANES lanes whatever the processor has, so that their order depends on the shapes alone:
// 1. The K elements of a line are taken in chunks of 16 bytes. Lane l of half h adds the elements 8 h + l of each of the
//    FIELDS codes of a byte, the first in the low bits first.
// 2. A half's sum over a run (a block, or four chunks where there are none) is multiplied by its block scale and added to
//    the half's total.
// 3. The two halves are added, then lanes l and l + 4, l and l + 2, l and l + 1. The sum is multiplied by the unit,
//    and by the line's scale where there are such.
// The order does not depend on R, so a row's result is the same alone and among others.

#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef int8_t vc __attribute__((vector_size(16)));
typedef uint16_t vp __attribute__((vector_size(16)));
typedef int8_t vb __attribute__((vector_size(LANES)));

template <class V>
inline V loaded(const void* from) {
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}

inline float folded(vf v) {
  float a[LANES];
  memcpy(a, &v, sizeof(a));
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; l++) a[l] += a[l + half];
  return a[0];
}

}  // namespace

#ifdef CODES

namespace {

constexpr int FIELDS = 8 / WIDTH;
constexpr int CHUNK = 16 * FIELDS;                             // elements
constexpr bool SPLIT = BLOCK == CHUNK / 2;                     // each half of a chunk has a scale of its own
constexpr int RUN = BLOCK == 0 ? 4 : SPLIT ? 1 : BLOCK / CHUNK;  // chunks

// Bytes 0 to 7 and 8 to 15. GCC 12 takes the conversion apart byte by byte.
inline void widen(vc v, vf& low, vf& high) {
#ifdef __AVX2__
  low = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32((__m128i)v));
  high = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64((__m128i)v, (__m128i)v)));
#else
  for (int l = 0; l < LANES; l++) low[l] = v[l], high[l] = v[l + LANES];
#endif
}

// Elements of a chunk in the order in which its codes are decoded: by field, then by byte.
void reorder(const float* x, int64_t size, float* out) {
  for (int64_t chunk = 0; chunk < size; chunk += CHUNK)
    for (int field = 0; field < FIELDS; field++)
      for (int byte = 0; byte < 16; byte++) out[chunk + field * 16 + byte] = x[chunk + byte * FIELDS + field];
}

}  // namespace

// codes (N, K WIDTH / 8); scales (N, K / BLOCK), each a place in table; levels (16): of a code, in units of `unit`;
// line: a scale for each of the N lines, or one (apart 0), or null; x (ROWS, K); out (ROWS, N).
template <int ROWS>
void product(const uint8_t* codes, const SCALE_BITS* scales, const float* table, const int8_t* levels, float unit,
             const float* line, int apart, const float* x, int64_t n, int64_t k, float* out, int threads) {
  const vc grid = loaded<vc>(levels);
  std::vector<float> ordered(ROWS * k);
  for (int r = 0; r < ROWS; r++) reorder(x + r * k, k, ordered.data() + r * k);
  const float* xs = ordered.data();
  const int64_t chunks = k / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < n; row++) {
    const uint8_t* from = codes + row * chunks * 16;
    const SCALE_BITS* scale = BLOCK ? scales + row * (k / (BLOCK ? BLOCK : 1)) : nullptr;
    vf total[2][ROWS] = {};
    for (int64_t chunk = 0; chunk < chunks;) {
      const int64_t end = chunk + RUN < chunks ? chunk + RUN : chunks;
      vf part[2][ROWS] = {};
      for (; chunk < end; chunk++, from += 16) {
        const vp pairs = loaded<vp>(from);
        for (int field = 0; field < FIELDS; field++) {
          const vc places = (vc)(pairs >> (WIDTH * field)) & (char)((1 << WIDTH) - 1);  // what comes from above is masked
          const vc found = __builtin_shuffle(grid, places);
          vf low, high;
          widen(found, low, high);
          for (int r = 0; r < ROWS; r++) {
            const float* at = xs + r * k + chunk * CHUNK + field * 16;
            part[0][r] += low * loaded<vf>(at);
            part[1][r] += high * loaded<vf>(at + LANES);
          }
        }
      }
      if (BLOCK) {
        const float first = table[*scale++], second = SPLIT ? table[*scale++] : first;
        for (int r = 0; r < ROWS; r++) {
          total[0][r] += part[0][r] * first;
          total[1][r] += part[1][r] * second;
        }
      } else {
        for (int h = 0; h < 2; h++)
          for (int r = 0; r < ROWS; r++) total[h][r] += part[h][r];
      }
    }
    for (int r = 0; r < ROWS; r++) {
      const float sum = folded(total[0][r] + total[1][r]) * unit;
      out[r * n + row] = line ? sum * line[row * apart] : sum;
    }
  }
}

#else

namespace {

inline vf widened(const uint16_t* from) {
#ifdef __AVX2__
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(loaded<__m128i>(from)), 16);
#else
  return (vf)(__builtin_convertvector(loaded<vh>(from), vu) << 16);
#endif
}

}  // namespace

// weight (N, K) bfloat16; x (ROWS, K); out (ROWS, N). K is a multiple of 32.
template <int ROWS>
void product(const uint16_t* weight, const float* x, int64_t n, int64_t k, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < n; row++) {
    const uint16_t* from = weight + row * k;
    vf total[2][ROWS] = {};
    for (int64_t at = 0; at < k; at += 4 * LANES) {
      for (int v = 0; v < 4; v++) {
        const vf w = widened(from + at + v * LANES);
        for (int r = 0; r < ROWS; r++) total[v & 1][r] += w * loaded<vf>(x + r * k + at + v * LANES);
      }
    }
    for (int r = 0; r < ROWS; r++) out[r * n + row] = folded(total[0][r] + total[1][r]);
  }
}

#endif

auto of_rows(int rows) {
  return rows == 1   ? product<1>
         : rows == 2 ? product<2>
         : rows == 3 ? product<3>
         : rows == 4 ? product<4>
         : rows == 5 ? product<5>
         : rows == 6 ? product<6>
         : rows == 7 ? product<7>
                     : product<8>;
}

#ifdef CODES

extern "C" void few_rows(int rows, const uint8_t* codes, const SCALE_BITS* scales, const float* table,
                         const int8_t* levels, float unit, const float* line, int apart, const float* x, int64_t n,
                         int64_t k, float* out, int threads) {
  of_rows(rows)(
      codes, scales, table, levels, unit, line, apart, x, n, k, out, threads);
}

#else

extern "C" void few_rows(int rows, const uint16_t* weight, const float* x, int64_t n, int64_t k, float* out,
                         int threads) {
  of_rows(rows)(weight, x, n, k, out, threads);
}

#endif
