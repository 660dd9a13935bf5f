/* The same product as tile.h on the matrix unit (AMX): acc[rows][16 or 32] += X W for up to 32
 * rows. Part of ops_fast.c, in the variant with AMX only.
 *
 * The unit has eight tiles of up to 16 rows of 64 bytes. A panel's 16 steps (16 pairs of k for 16
 * columns) are one tile as they lie in memory, and so are 16 pairs of k of 16 rows of X:
 *
 *   tiles 0 1 2 3   sums of (rows 0-15, rows 16-31) x (first, second panel)
 *   tiles 4 5       X of rows 0-15, 16-31
 *   tiles 6 7       W of the first, second panel
 *
 * so four loads feed four products of 16 cycles each, which also covers a product's latency of 52.
 *
 * One product sums 16 steps of an element on its own and adds that to the element. So the sum of an
 * element is a chain over pieces of 16 steps that begin at multiples of 16: whoever splits k must
 * split it there (the chunks of gemm_dx and gemm_tn do), and a last piece that is shorter is
 * completed with zeros. Like the dot instruction the unit takes subnormal numbers for 0.
 *
 * The compiler does not know that these instructions read and write memory; each says so itself. */
#ifndef CLAAS_CPU_AMX_H
#define CLAAS_CPU_AMX_H

#define AMX_ROWS  16              /* of a tile */
#define AMX_STEPS 16              /* of one product */
#define AMX_BYTES (AMX_ROWS * 64) /* of a whole tile */
#define AMX_ITEMS (AMX_BYTES / 2) /* bfloat16 numbers of a whole tile */
#define AMX_AHEAD (2 * AMX_BYTES) /* of a panel to prefetch */

#define AMX_LOAD(tile, p, ld)                                                                      \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(p), "r"((ptrdiff_t)(ld)) : "memory")
#define AMX_STORE(tile, p, ld)                                                                     \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(p), "r"((ptrdiff_t)(ld))         \
                     : "memory")
#define AMX_MULTIPLY(sum, x, w)                                                                    \
    __asm__ volatile("tdpbf16ps %%tmm" #w ", %%tmm" #x ", %%tmm" #sum ::)

/* What LDTILECFG reads. */
struct amx_config {
    uint8_t palette, start_row, zero[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct amx_config) == 64, "the layout that the instruction reads");

/* The rows that this thread's tiles are set up for; changing them costs as much as five products.
 */
static __thread int amx_rows;

static void amx_set_rows(int rows)
{
    const int first = smaller(rows, AMX_ROWS), second = larger(rows - AMX_ROWS, 1);
    const uint8_t heights[8] = {(uint8_t)first, (uint8_t)first,  (uint8_t)second, (uint8_t)second,
                                (uint8_t)first, (uint8_t)second, AMX_STEPS,       AMX_STEPS};
    struct amx_config config = {.palette = 1};

    if (amx_rows == rows)
        return;
    for (int i = 0; i < 8; i++) {
        config.rows[i] = heights[i];
        config.row_bytes[i] = 64;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
    amx_rows = rows;
}

/* Sums into and out of the tiles; second_rows, second_panel: whether there are any. */
INLINE void amx_take_sums(const float *acc, ptrdiff_t bytes, bool second_rows, bool second_panel)
{
    const float *lower = acc + AMX_ROWS * (bytes / (ptrdiff_t)sizeof(float));

    AMX_LOAD(0, acc, bytes);
    if (second_panel)
        AMX_LOAD(1, acc + 16, bytes);
    if (second_rows)
        AMX_LOAD(2, lower, bytes);
    if (second_rows && second_panel)
        AMX_LOAD(3, lower + 16, bytes);
}
INLINE void amx_give_sums(float *acc, ptrdiff_t bytes, bool second_rows, bool second_panel)
{
    float *lower = acc + AMX_ROWS * (bytes / (ptrdiff_t)sizeof(float));

    AMX_STORE(0, acc, bytes);
    if (second_panel)
        AMX_STORE(1, acc + 16, bytes);
    if (second_rows)
        AMX_STORE(2, lower, bytes);
    if (second_rows && second_panel)
        AMX_STORE(3, lower + 16, bytes);
}

/* 16 steps of everything. */
INLINE void amx_product(const char *x, ptrdiff_t ld, const char *w, const char *w2,
                        bool second_rows, bool second_panel)
{
    AMX_LOAD(6, w, 64);
    AMX_LOAD(4, x, ld);
    AMX_MULTIPLY(0, 4, 6);
    if (second_panel) {
        AMX_LOAD(7, w2, 64);
        AMX_MULTIPLY(1, 4, 7);
    }
    if (second_rows) {
        AMX_LOAD(5, x + AMX_ROWS * ld, ld);
        AMX_MULTIPLY(2, 5, 6);
    }
    if (second_rows && second_panel)
        AMX_MULTIPLY(3, 5, 7);
}

/* The last steps < 16, completed with zeros: what follows them in memory may be anything. */
static void amx_rest(int rows, const char *x, ptrdiff_t ld, const char *w, const char *w2,
                     int steps, bool second_panel)
{
    char xs[2 * AMX_ROWS][64] __attribute__((aligned(64)));
    char ws[2][AMX_BYTES] __attribute__((aligned(64)));

    memset(xs, 0, sizeof(xs));
    memset(ws, 0, sizeof(ws));
    for (int i = 0; i < rows; i++)
        memcpy(xs[i], x + i * ld, (size_t)steps * 4);
    memcpy(ws[0], w, (size_t)steps * 64);
    if (second_panel)
        memcpy(ws[1], w2, (size_t)steps * 64);
    amx_product(xs[0], 64, ws[0], ws[1], rows > AMX_ROWS, second_panel);
}

INLINE void amx_walk(int rows, const char *x, ptrdiff_t ld, const char *w, ptrdiff_t second,
                     int steps, bool second_rows, bool second_panel)
{
    const char *w2 = w + second;
    int left = steps;

    for (; left >= AMX_STEPS; left -= AMX_STEPS) {
        for (int line = 0; line < AMX_BYTES; line += 64) {
            _mm_prefetch(w + AMX_AHEAD + line, _MM_HINT_T0);
            if (second_panel)
                _mm_prefetch(w2 + AMX_AHEAD + line, _MM_HINT_T0);
        }
        amx_product(x, ld, w, w2, second_rows, second_panel);
        x += 64;
        w += AMX_BYTES;
        w2 += AMX_BYTES;
    }
    if (left)
        amx_rest(rows, x, ld, w, w2, left, second_panel);
}

/* acc[rows][16*panels] += X W; like the tiles of tile.h, for rows <= 32 whose steps neighbour. */
static void amx_multiply(int rows, int panels, const char *x, ptrdiff_t ldx, const char *w,
                         ptrdiff_t second, int steps, float *acc, ptrdiff_t ldacc)
{
    const ptrdiff_t bytes = ldacc * (ptrdiff_t)sizeof(float);
    const bool second_rows = rows > AMX_ROWS, second_panel = panels > 1;

    amx_set_rows(rows);
    amx_take_sums(acc, bytes, second_rows, second_panel);
    if (second_rows && second_panel)
        amx_walk(rows, x, ldx, w, second, steps, true, true);
    else if (second_rows)
        amx_walk(rows, x, ldx, w, second, steps, true, false);
    else if (second_panel)
        amx_walk(rows, x, ldx, w, second, steps, false, true);
    else
        amx_walk(rows, x, ldx, w, second, steps, false, false);
    amx_give_sums(acc, bytes, second_rows, second_panel);
}

#endif
