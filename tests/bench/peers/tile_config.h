/* Included in front of llama.cpp's sources (tools/deps --bench): GCC 12's _tile_loadconfig tells the compiler that it reads
 * one pointer of the 64 bytes, so the stores of the others are dropped as dead, and the first load of a tile is an illegal
 * instruction. Seen with llama-cpp-python 0.3.36 on a processor with AMX. */
#ifdef __AMX_TILE__
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#endif
