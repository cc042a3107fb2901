// x (R, K) times the transpose of a weight (N, K) that lies in few bits, for few rows of x: each weight is read once, and
// the memory's speed is the limit.
//
// few_rows.py writes WIDTH (bits of a code), BLOCK (elements that share a scale, 0: none), SCALE_BITS (the type of a
// scale's bits, or float, which is the scale itself) and ZERO_POINT (whether each block has one) before it. A zero point
// is subtracted from the levels of its block while these are whole numbers, so nothing is rounded for it. Sums are
// float32, in LANES lanes whatever the processor has, so that their order depends on the shapes alone:
// 1. The K elements of a line are taken in chunks of 16 bytes. Lane l of half h adds the elements 8 h + l of each of the
//    FIELDS codes of a byte, the first in the low bits first.
// 2. A half's sum over a run (a block, or four chunks where there are none) is multiplied by its block scale and added to
//    the half's total. In bfloat16, chunks are added by turns to two totals, and these to each other.
// 3. The two halves are added, then lanes l and l + 4, l and l + 2, l and l + 1. The sum is multiplied by the unit,
//    and by the line's scale where there are such.
// The order does not depend on R, so a row's result is the same alone and among others. Before that, x may be rotated, in
// the order of reference.py, and rounded to bfloat16; then the results are too.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __SSSE3__
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

// Of each row of x.
struct Rotation {
  const float* signs;  // (block), or null
  int64_t block;
  float norm;  // 1 / sqrt(block)
};

// x (count, K), whose rows are rotated, if there is a rotation, and then rounded to bfloat16, if the product is in it:
// then its results are too.
struct Rows {
  const void* x;
  int is_bfloat16;
  int rounds;
  const Rotation* rotation;
};

inline vf of_bfloat16(const uint16_t* from) {
  return (vf)(__builtin_convertvector(loaded<vh>(from), vu) << 16);
}
inline vf rounded(vf x) {  // to the nearest bfloat16, ties to even
  const vu bits = (vu)x;
  return (vf)(x != x ? vu{} + 0x7fc00000 : (bits + (0x7fff + (bits >> 16 & 1))) & 0xffff0000);
}

inline void put(float* to, vf x) { memcpy(to, &x, sizeof x); }

template <int... LANE>
inline vf swapped(vf v) {
#ifdef __clang__
  return __builtin_shufflevector(v, v, LANE...);
#else
  return __builtin_shuffle(v, vi{LANE...});
#endif
}
// The sum in the first of two lanes that lie so far apart, and the difference in the second.
inline vf crossed(vf v, vf other, int apart) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return (lane & apart) != 0 ? other - v : v + other;
}

// v (size) -> v D H, in blocks: elements half a block apart first, then a quarter.
void rotate(float* v, int64_t size, const Rotation& rotation) {
  for (int64_t i = 0; rotation.signs && i < size; i++) v[i] *= rotation.signs[i % rotation.block];
  int64_t half = rotation.block / 2;
  for (; half >= LANES; half /= 2)
    for (int64_t first = 0; first < size; first += 2 * half)
      for (int64_t i = first; i < first + half; i += LANES) {
        const vf a = loaded<vf>(v + i), b = loaded<vf>(v + i + half);
        put(v + i, a + b);
        put(v + i + half, a - b);
      }
  for (int64_t i = 0; i < size; i += LANES) {
    vf found = loaded<vf>(v + i);
    if (half >= 4) found = crossed(found, swapped<4, 5, 6, 7, 0, 1, 2, 3>(found), 4);
    if (half >= 2) found = crossed(found, swapped<2, 3, 0, 1, 6, 7, 4, 5>(found), 2);
    if (half >= 1) found = crossed(found, swapped<1, 0, 3, 2, 5, 4, 7, 6>(found), 1);
    put(v + i, found * rotation.norm);
  }
}

// As float32.
std::vector<float> read(const Rows& rows, int64_t count, int64_t k) {
  std::vector<float> found(count * k);
  float* v = found.data();
  for (int64_t i = 0; i < count * k; i += LANES)
    put(v + i, rows.is_bfloat16 ? of_bfloat16((const uint16_t*)rows.x + i) : loaded<vf>((const float*)rows.x + i));
  if (rows.rotation) rotate(v, count * k, *rows.rotation);
  for (int64_t i = 0; rows.rounds && i < count * k; i += LANES) put(v + i, rounded(loaded<vf>(v + i)));
  return found;
}

inline void write(void* out, int64_t i, float x, int rounds) {
  if (rounds) ((uint16_t*)out)[i] = (uint32_t)((vu)rounded(vf{} + x))[0] >> 16;
  else ((float*)out)[i] = x;
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

// Lines of the weight that are summed side by side: one alone waits for each of its multiply-adds.
#ifdef __AVX512F__
constexpr int lines_for(int rows) { return rows == 1 ? 8 : 2; }
#else
constexpr int lines_for(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }  // half the registers
#endif

// Lines from the one that is read to the one that is fetched: the processor foresees where a line goes on, and not where
// the next begins.
constexpr int AHEAD = 8;

// work(first line, how many lines, a compile-time constant) for all n.
template <int LINES, class F>
void over_lines(int64_t n, int threads, F work) {
  const int64_t groups = n / LINES;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t group = 0; group < groups; group++) work(group * LINES, std::integral_constant<int, LINES>());
  for (int64_t line = groups * LINES; line < n; line++) work(line, std::integral_constant<int, 1>());
}

// A chunk of a line is loaded once, and then its codes are decoded field by field: whole numbers as floats, less the zero
// points of their blocks. zero: those of block `at` of a line, and of the block of the chunk's second half.
inline uint8_t zero_point(const uint8_t* line, int64_t block) {
  return line[block / FIELDS] >> (block % FIELDS * WIDTH) & ((1 << WIDTH) - 1);
}

#ifdef __AVX512F__

struct Grid {
  __m512 levels;  // periodic: a place's bits above WIDTH do not matter, nor do those above its fourth
  explicit Grid(const int8_t* from) {
    float level[16];
    for (int i = 0; i < 16; i++) level[i] = from[i & ((1 << WIDTH) - 1)];
    levels = _mm512_loadu_ps(level);
  }
};
typedef __m512i Chunk;
typedef Wide Zero;
inline Chunk load(const uint8_t* from) { return _mm512_cvtepu8_epi32(loaded<__m128i>(from)); }
inline Zero zero_of(const uint8_t* line, int64_t at) {
  return of_halves(zero_point(line, at), zero_point(line, at + SPLIT));
}
inline Wide decoded(const Grid& grid, Chunk chunk, int field, const Zero& zero) {
  const vw found = (vw)_mm512_permutexvar_ps(_mm512_srli_epi32(chunk, WIDTH * field), grid.levels);
  return {ZERO_POINT ? found - zero.v : found};
}

#else

struct Grid {
  vc levels;
  explicit Grid(const int8_t* from) : levels(loaded<vc>(from)) {}
};
typedef vp Chunk;
typedef vc Zero;
inline Chunk load(const uint8_t* from) { return loaded<vp>(from); }
inline Zero zero_of(const uint8_t* line, int64_t at) {
  typedef uint64_t v2 __attribute__((vector_size(16)));
  return (vc)(v2{zero_point(line, at), zero_point(line, at + SPLIT)} * 0x0101010101010101ull);
}
inline vc at_places(vc grid, vc places) {
#if defined(__SSSE3__)
  return (vc)_mm_shuffle_epi8((__m128i)grid, (__m128i)places);
#elif defined(__clang__)
  vc found;
  for (int l = 0; l < 16; l++) found[l] = grid[places[l]];
  return found;
#else
  return __builtin_shuffle(grid, places);
#endif
}
inline Wide widen(vc v) {  // GCC 12 takes the conversion apart byte by byte
#ifdef __AVX2__
  return {(vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32((__m128i)v)),
          (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64((__m128i)v, (__m128i)v)))};
#else
  Wide wide;
  for (int l = 0; l < LANES; l++) wide.low[l] = v[l], wide.high[l] = v[l + LANES];
  return wide;
#endif
}
inline Wide decoded(const Grid& grid, Chunk chunk, int field, Zero zero) {
  const vc places = (vc)(chunk >> (WIDTH * field)) & (char)((1 << WIDTH) - 1);  // masks what comes from above
  return widen(ZERO_POINT ? at_places(grid.levels, places) - zero : at_places(grid.levels, places));
}

#endif

// Elements of a chunk in the order in which its codes are decoded: by field, then by byte.
void reorder(const float* x, int64_t size, float* out) {
  for (int64_t chunk = 0; chunk < size; chunk += CHUNK)
    for (int field = 0; field < FIELDS; field++)
      for (int byte = 0; byte < 16; byte++) out[chunk + field * 16 + byte] = x[chunk + byte * FIELDS + field];
}

}  // namespace

inline float scale_of(const float*, float scale) { return scale; }
template <class T>
inline float scale_of(const float* table, T bits) { return table[bits]; }

struct Weight {
  const uint8_t* codes;      // (N, K WIDTH / 8)
  const SCALE_BITS* scales;  // (N, K / BLOCK), each a float or a place in table
  const uint8_t* zeros;      // zero points, WIDTH bits each, every line's in bytes of its own
  const float* table;
  const int8_t* levels;      // (16), of a code, in units of `unit`
  const float* line;         // a scale for each of the N lines, or one (apart 0), or null
  int64_t n, k;
  int64_t apart;
  float unit;
};

// out (ROWS, N). scaled: by the lines' scales.
template <int ROWS>
void product(const Weight& weight, const Rows& rows, int scaled, void* out, int threads) {
  const uint8_t *codes = weight.codes, *zeros = weight.zeros;
  const SCALE_BITS* scales = weight.scales;
  const float *table = weight.table, *line = scaled ? weight.line : nullptr, unit = weight.unit;
  const int64_t n = weight.n, k = weight.k, apart = weight.apart;
  const Grid grid(weight.levels);
  std::vector<float> ordered(ROWS * k);
  reorder(read(rows, ROWS, k).data(), ROWS * k, ordered.data());
  const float* xs = ordered.data();
  const int rounds = rows.rounds;
  const int64_t chunks = k / CHUNK, zero_bytes = (k / (BLOCK ? BLOCK : 1) * WIDTH + 7) / 8;
  over_lines<lines_for(ROWS)>(n, threads, [=](int64_t first, auto count) {
    constexpr int L = count;
    const uint8_t* from = codes + first * chunks * 16;
    const SCALE_BITS* scale = BLOCK ? scales + first * (k / (BLOCK ? BLOCK : 1)) : nullptr;
    Wide total[L][ROWS] = {};
    for (int64_t chunk = 0; chunk < chunks;) {
      const int64_t end = chunk + RUN < chunks ? chunk + RUN : chunks;
      Wide part[L][ROWS] = {};
      Zero zero[L];
      for (int l = 0; ZERO_POINT && l < L; l++)
        zero[l] = zero_of(zeros + (first + l) * zero_bytes, chunk * CHUNK / (BLOCK ? BLOCK : 1));
      for (; chunk < end; chunk++, from += 16) {
        Chunk here[L];
        for (int l = 0; l < L; l++) {
          here[l] = load(from + l * chunks * 16);
          __builtin_prefetch(from + (l + AHEAD) * chunks * 16);
        }
        for (int field = 0; field < FIELDS; field++)
          for (int l = 0; l < L; l++) {
            const Wide found = decoded(grid, here[l], field, zero[l]);
            for (int r = 0; r < ROWS; r++) add(part[l][r], found, xs + r * k + chunk * CHUNK + field * 16);
          }
      }
      for (int l = 0; l < L; l++) {
        const SCALE_BITS* own = scale + l * (k / (BLOCK ? BLOCK : 1));
        for (int r = 0; r < ROWS; r++) {
          if (!BLOCK) total[l][r] += part[l][r];
          else total[l][r] += part[l][r] * of_halves(scale_of(table, own[0]), scale_of(table, own[SPLIT]));
        }
      }
      if (BLOCK) scale += 1 + SPLIT;
    }
    for (int l = 0; l < L; l++)
      for (int r = 0; r < ROWS; r++) {
        const float sum = folded(both(total[l][r])) * unit;
        write(out, r * n + first + l, line ? sum * line[(first + l) * apart] : sum, rounds);
      }
  });
}

#else

namespace {

// Elements from what is read to what is fetched: 16 KB are more than memory brings a core in the time of one access.
constexpr int64_t AHEAD = 8192;

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

struct Weight {
  const uint16_t* values;  // (N, K) bfloat16, K a multiple of 32
  int64_t n, k;
};

// out (ROWS, N)
template <int ROWS>
void product(const Weight& weight, const Rows& rows, int, void* out, int threads) {
  const uint16_t* values = weight.values;
  const int64_t n = weight.n, k = weight.k;
  const std::vector<float> found = read(rows, ROWS, k);
  const float* x = found.data();
  const int rounds = rows.rounds;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t line = 0; line < n; line++) {
    const uint16_t* from = values + line * k;
    Wide even[ROWS] = {}, odd[ROWS] = {};  // one alone would wait for each of its multiply-adds
    for (int64_t at = 0; at < k; at += 4 * LANES) {
      __builtin_prefetch(from + at + AHEAD);
      const Wide first = widened(from + at), second = widened(from + at + 2 * LANES);
      for (int r = 0; r < ROWS; r++) {
        add(even[r], first, x + r * k + at);
        add(odd[r], second, x + r * k + at + 2 * LANES);
      }
    }
    for (int r = 0; r < ROWS; r++) {
      even[r] += odd[r];
      write(out, r * n + line, folded(both(even[r])), rounds);
    }
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

extern "C" void few_rows(const Weight* weight, const Rotation* rotation, int count, const void* x, int is_bfloat16,
                         int rounds, int scaled, void* out, int threads) {
  of_rows(count)(*weight, {x, is_bfloat16, rounds, rotation}, scaled, out, threads);
}
