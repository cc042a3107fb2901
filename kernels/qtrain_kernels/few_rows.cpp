// x (R, K) times the transpose of a weight (N, K) that lies in few bits, for few rows of x: each weight is read once, and
// the memory's speed is the limit.
//
// few_rows.py writes WIDTH (bits of a code), BLOCK (elements that share a scale, 0: none), SCALE_BITS (the type of a
// scale's bits) and ZERO_POINT (whether each block has one) before it. A zero point is subtracted from the levels of its
// block while these are whole numbers, so nothing is rounded for it. Sums are float32, in LANES lanes whatever the
// processor has, so that their order depends on the shapes alone:
// 1. The K elements of a line are taken in chunks of 16 bytes. Lane l of half h adds the elements 8 h + l of each of the
//    FIELDS codes of a byte, the first in the low bits first.
// 2. A half's sum over a run (a block, or four chunks where there are none) is multiplied by its block scale and added to
//    the half's total.
// 3. The two halves are added, then lanes l and l + 4, l and l + 2, l and l + 1. The sum is multiplied by the unit,
//    and by the line's scale where there are such.
// The order does not depend on R, so a row's result is the same alone and among others.

#include <cstdint>
#include <cstring>
#include <type_traits>
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

// Both halves: one register with AVX-512, else two.
#ifdef __AVX512F__
typedef float vw __attribute__((vector_size(64)));
struct Wide { vw v; };
inline Wide operator*(Wide a, Wide b) { return {a.v * b.v}; }
inline void operator+=(Wide& a, Wide b) { a.v += b.v; }
inline void add(Wide& a, Wide b, const float* x) { a.v += b.v * loaded<vw>(x); }  // one multiply-add
inline Wide of_halves(float low, float high) {
  return {(vw)_mm512_mask_blend_ps(0xff00, _mm512_set1_ps(low), _mm512_set1_ps(high))};
}
inline vf both(Wide a) {
  return (vf)_mm256_add_ps(_mm512_castps512_ps256((__m512)a.v), (__m256)_mm512_extractf64x4_pd((__m512d)a.v, 1));
}
#else
struct Wide { vf low, high; };
inline void operator+=(Wide& a, Wide b) { a.low += b.low, a.high += b.high; }
inline void add(Wide& a, Wide b, const float* x) {
  a.low += b.low * loaded<vf>(x);
  a.high += b.high * loaded<vf>(x + LANES);
}
inline Wide operator*(Wide a, Wide b) { return {a.low * b.low, a.high * b.high}; }
inline Wide of_halves(float low, float high) { return {vf{} + low, vf{} + high}; }
inline vf both(Wide a) { return a.low + a.high; }
#endif

// Groups of lines, from the one that is read to the one that is fetched: the processor foresees where a line goes on, and
// not where the next begins.
constexpr int AHEAD = 2;

// Lines of the weight that are summed side by side: one alone waits for each of its multiply-adds.
#ifdef __AVX512F__
constexpr int lines_for(int rows) { return rows == 1 ? 4 : 2; }
#else
constexpr int lines_for(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }  // half the registers
#endif

// work(first line, how many lines, a compile-time constant) for all n.
template <int LINES, class F>
void over_lines(int64_t n, int threads, F work) {
  const int64_t groups = n / LINES;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t group = 0; group < groups; group++) work(group * LINES, std::integral_constant<int, LINES>());
  for (int64_t line = groups * LINES; line < n; line++) work(line, std::integral_constant<int, 1>());
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
inline Wide widen(vc v) {
#if defined(__AVX512F__)
  return {(vw)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v))};
#elif defined(__AVX2__)
  return {(vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32((__m128i)v)),
          (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64((__m128i)v, (__m128i)v)))};
#else
  Wide wide;
  for (int l = 0; l < LANES; l++) wide.low[l] = v[l], wide.high[l] = v[l + LANES];
  return wide;
#endif
}

// The zero points of block `at` of a line, and of the block of its second half, at each byte of a chunk.
inline vc zero_points(const uint8_t* line, int64_t at) {
  const auto one = [=](int64_t block) -> uint64_t {
    return (line[block / FIELDS] >> (block % FIELDS * WIDTH) & ((1 << WIDTH) - 1)) * 0x0101010101010101ull;
  };
  typedef uint64_t v2 __attribute__((vector_size(16)));
  return (vc)v2{one(at), one(at + SPLIT)};
}

// Elements of a chunk in the order in which its codes are decoded: by field, then by byte.
void reorder(const float* x, int64_t size, float* out) {
  for (int64_t chunk = 0; chunk < size; chunk += CHUNK)
    for (int field = 0; field < FIELDS; field++)
      for (int byte = 0; byte < 16; byte++) out[chunk + field * 16 + byte] = x[chunk + byte * FIELDS + field];
}

}  // namespace

// codes (N, K WIDTH / 8); scales (N, K / BLOCK), each a place in table; zeros: zero points, WIDTH bits each, every
// line's in bytes of its own; levels (16): of a code, in units of `unit`; line: a scale for each of the N lines, or one
// (apart 0), or null; x (ROWS, K); out (ROWS, N).
template <int ROWS>
void product(const uint8_t* codes, const SCALE_BITS* scales, const uint8_t* zeros, const float* table,
             const int8_t* levels, float unit, const float* line, int apart, const float* x, int64_t n, int64_t k,
             float* out, int threads) {
  const vc grid = loaded<vc>(levels);
  std::vector<float> ordered(ROWS * k);
  for (int r = 0; r < ROWS; r++) reorder(x + r * k, k, ordered.data() + r * k);
  const float* xs = ordered.data();
  const int64_t chunks = k / CHUNK, zero_bytes = (k / (BLOCK ? BLOCK : 1) * WIDTH + 7) / 8;
  over_lines<lines_for(ROWS)>(n, threads, [=](int64_t first, auto count) {
    constexpr int L = count;
    const uint8_t* from = codes + first * chunks * 16;
    const SCALE_BITS* scale = BLOCK ? scales + first * (k / (BLOCK ? BLOCK : 1)) : nullptr;
    Wide total[L][ROWS] = {};
    for (int64_t chunk = 0; chunk < chunks;) {
      const int64_t end = chunk + RUN < chunks ? chunk + RUN : chunks;
      Wide part[L][ROWS] = {};
      vc zero[L];
      for (int l = 0; ZERO_POINT && l < L; l++)
        zero[l] = zero_points(zeros + (first + l) * zero_bytes, chunk * CHUNK / (BLOCK ? BLOCK : 1));
      for (; chunk < end; chunk++, from += 16) {
        vp pairs[L];
        for (int l = 0; l < L; l++) {
          pairs[l] = loaded<vp>(from + l * chunks * 16);
          __builtin_prefetch(from + (l + AHEAD * L) * chunks * 16);
        }
        for (int field = 0; field < FIELDS; field++)
          for (int l = 0; l < L; l++) {
            const vc places = (vc)(pairs[l] >> (WIDTH * field)) & (char)((1 << WIDTH) - 1);  // masks what comes from above
            const vc codes = ZERO_POINT ? __builtin_shuffle(grid, places) - zero[l] : __builtin_shuffle(grid, places);
            const Wide found = widen(codes);
            for (int r = 0; r < ROWS; r++) add(part[l][r], found, xs + r * k + chunk * CHUNK + field * 16);
          }
      }
      for (int l = 0; l < L; l++) {
        const SCALE_BITS* own = scale + l * (k / (BLOCK ? BLOCK : 1));
        for (int r = 0; r < ROWS; r++) {
          if (!BLOCK) total[l][r] += part[l][r];
          else total[l][r] += part[l][r] * of_halves(table[own[0]], table[own[SPLIT]]);
        }
      }
      if (BLOCK) scale += 1 + SPLIT;
    }
    for (int l = 0; l < L; l++)
      for (int r = 0; r < ROWS; r++) {
        const float sum = folded(both(total[l][r])) * unit;
        out[r * n + first + l] = line ? sum * line[(first + l) * apart] : sum;
      }
  });
}

#else

namespace {

inline Wide widened(const uint16_t* from) {
#if defined(__AVX512F__)
  return {(vw)_mm512_slli_epi32(_mm512_cvtepu16_epi32(loaded<__m256i>(from)), 16)};
#elif defined(__AVX2__)
  return {(vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(loaded<__m128i>(from)), 16),
          (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(loaded<__m128i>(from + LANES)), 16)};
#else
  return {(vf)(__builtin_convertvector(loaded<vh>(from), vu) << 16),
          (vf)(__builtin_convertvector(loaded<vh>(from + LANES), vu) << 16)};
#endif
}

}  // namespace

// weight (N, K) bfloat16; x (ROWS, K); out (ROWS, N). K is a multiple of 32.
template <int ROWS>
void product(const uint16_t* weight, const float* x, int64_t n, int64_t k, float* out, int threads) {
  over_lines<lines_for(ROWS)>(n, threads, [=](int64_t first, auto count) {
    constexpr int L = count;
    const uint16_t* from = weight + first * k;
    Wide total[L][ROWS] = {};
    for (int64_t at = 0; at < k; at += 4 * LANES) {
      for (int l = 0; l < L; l++) __builtin_prefetch(from + (l + AHEAD * L) * k + at);
      for (int v = 0; v < 4; v += 2)
        for (int l = 0; l < L; l++) {
          const Wide w = widened(from + l * k + at + v * LANES);
          for (int r = 0; r < ROWS; r++) add(total[l][r], w, x + r * k + at + v * LANES);
        }
    }
    for (int l = 0; l < L; l++)
      for (int r = 0; r < ROWS; r++) out[r * n + first + l] = folded(both(total[l][r]));
  });
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

extern "C" void few_rows(int rows, const uint8_t* codes, const SCALE_BITS* scales, const uint8_t* zeros,
                         const float* table, const int8_t* levels, float unit, const float* line, int apart,
                         const float* x, int64_t n, int64_t k, float* out, int threads) {
  of_rows(rows)(
      codes, scales, zeros, table, levels, unit, line, apart, x, n, k, out, threads);
}

#else

extern "C" void few_rows(int rows, const uint16_t* weight, const float* x, int64_t n, int64_t k, float* out,
                         int threads) {
  of_rows(rows)(weight, x, n, k, out, threads);
}

#endif
