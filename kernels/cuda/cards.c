/* The cards of this machine: names, sizes, versions. Leaves nothing open but the driver's own
 * contexts, which asking for free memory creates (0.2 s each, and some hundred MB while this
 * process lives). */
#include "cuda/context.h"
#include "cuda/cuda_backend.h"

#include <stdio.h>

/* This needs a context. A full card has no room for one, and another process may have the card for
 * itself: such a card is listed all the same. */
static void read_free(int number, struct claas_card *card)
{
    size_t available = 0, total = 0;
    cudaError_t code = cudaSetDevice(number);

    if (code == cudaSuccess)
        code = cudaMemGetInfo(&available, &total);
    if (code == cudaSuccess) {
        card->bytes = total;
        card->bytes_free = available;
        return;
    }
    (void)cudaGetLastError();
    (void)snprintf(card->unknown, sizeof(card->unknown), "%.63s", cudaGetErrorString(code));
}

static int read_card(int number, struct claas_card *ret)
{
    struct cudaDeviceProp properties;
    cudaError_t code = cudaGetDeviceProperties(&properties, number);

    if (code != cudaSuccess) {
        (void)cudaGetLastError();
        return claas_fail(CLAAS_ERR_DEVICE, "card %d: %s", number, cudaGetErrorString(code));
    }
    *ret = (struct claas_card){
        .major = properties.major,
        .minor = properties.minor,
        .bytes = properties.totalGlobalMem,
    };
    (void)snprintf(ret->name, sizeof(ret->name), "%.63s", properties.name);
    read_free(number, ret);
    return 0;
}

int claas_cuda_cards(struct claas_cards *ret)
{
    int count = 0, rc = cuda_find_device();

    if (rc < 0)
        return rc;
    (void)cudaDriverGetVersion(&ret->driver);
    (void)cudaRuntimeGetVersion(&ret->runtime);
    (void)cudaGetDeviceCount(&count);
    while (rc == 0 && ret->count < count && ret->count < CLAAS_CARDS_MAX) {
        rc = read_card(ret->count, &ret->cards[ret->count]);
        ret->count += rc == 0;
    }
    return rc;
}
