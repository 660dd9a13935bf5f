/* One fast operation table. Compiled once per variant (see meson.build) with the flags of its
 * instruction set and
 *
 *   CLAAS_OPS_F32 or CLAAS_OPS_BF16    the precision
 *   CLAAS_OPS_AMX                      with the matrix unit, in BF16 only
 *   CLAAS_OPS_TABLE, CLAAS_OPS_NAME    the exported table and its name
 *
 * so the files included here see one element type and one vector width, and everything but the
 * table is static. */
#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "cpu/ops_impl.h"
#if defined(__AVX512F__)
#include "cpu/lanes_avx512.h"
#else
#include "cpu/lanes_avx2.h"
#endif
#include "cpu/act.h"
#include "cpu/tile.h"
#if defined(CLAAS_OPS_AMX)
#include "cpu/amx.h"
#endif
#include "cpu/transpose.h"
#if defined(CLAAS_OPS_BF16) && defined(__AVX512BF16__)
#include "cpu/blocks_fast.h"
#endif
#include "cpu/gemm_fast.h"
#include "cpu/rows_fast.h"
#include "cpu/attn_fast.h"
#include "cpu/attn_bwd_fast.h"
#include "cpu/optim_fast.h"

const struct claas_ops CLAAS_OPS_TABLE = {
    .name = CLAAS_OPS_NAME,
#if defined(CLAAS_OPS_F32)
    .precision = CLAAS_PRECISION_F32,
#else
    .precision = CLAAS_PRECISION_BF16,
#endif
    .act_bytes = sizeof(act),
    .pack_panel = pack_panel,
    .unpack_row = unpack_row,
    .to_act = to_act,
    .to_float = to_float,
    .gemm = gemm,
    .gemm_dx = gemm_dx,
    .gemm_tn = gemm_tn,
    .rmsnorm = rmsnorm,
    .rmsnorm_bwd = rmsnorm_bwd,
    .norm_rope = norm_rope,
    .norm_rope_bwd = norm_rope_bwd,
    .kv_store = kv_store,
    .attention = attention,
    .attention_bwd = attention_bwd,
    .swiglu = swiglu,
    .swiglu_bwd = swiglu_bwd,
    .sum_squares = sum_squares,
    .adamw = adamw,
};
