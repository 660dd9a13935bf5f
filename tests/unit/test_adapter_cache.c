/* The sampler's cache of adapters on a device of the test's own: what is loaded, and what goes when
 * there are too many, or when the device is full. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "adapter_cache.h"
#include "claas/err.h"
#include "claas/mem.h"

/* --- the device: adapters are counted, their names remembered --- */

struct claas_adapter {
    char directory[64];
    int references;
};

static struct {
    int capacity, held, loads;
    bool trains;
    uint64_t last_id;
    char asked[64]; /* directory of the load under way */
} device;

int claas_device_adapter_load(claas_device_client_t *client, const char *directory,
                              enum claas_adapter_use use, uint64_t *ret_id)
{
    (void)client;
    assert_int_equal(use, CLAAS_ADAPTER_SERVE);
    device.loads++;
    *ret_id = ++device.last_id;
    return claas_copy_text(device.asked, sizeof(device.asked), directory);
}

claas_adapter_t *claas_adapter_ref(claas_adapter_t *adapter)
{
    adapter->references++;
    return adapter;
}

void claas_adapter_unref(claas_adapter_t **ref)
{
    claas_adapter_t *adapter = CLAAS_TAKE(*ref);

    if (--adapter->references > 0)
        return;
    device.held--;
    free(adapter);
}

bool claas_adapter_is_shared(const claas_adapter_t *adapter)
{
    return adapter->references > 1;
}

bool claas_device_trains(const claas_device_client_t *client)
{
    (void)client;
    return device.trains;
}

/* The end of a load. */
static bool end_load(struct adapter_cache *cache, uint64_t id, const char *directory)
{
    struct claas_device_event event = {
        .kind = CLAAS_EVENT_FAILED, .id = id, .error = CLAAS_ERR_NO_MEMORY, .text = "full"};

    if (device.held < device.capacity) {
        event.kind = CLAAS_EVENT_ADAPTER;
        event.error = 0;
        event.adapter = CLAAS_NEW(claas_adapter_t);
        event.adapter->references = 1;
        claas_copy_text(event.adapter->directory, sizeof(event.adapter->directory), directory);
        device.held++;
    }
    return adapter_cache_event(cache, &event);
}

/* The end of the newest one. */
static bool finish_load(struct adapter_cache *cache)
{
    return end_load(cache, device.last_id, device.asked);
}

/* --- the asker --- */

struct asker {
    claas_adapter_t *adapter;
    int error, calls;
};

static void ready(void *arg, claas_adapter_t *adapter, int error, const char *text)
{
    struct asker *asker = arg;

    (void)text;
    *asker = (struct asker){adapter, error, asker->calls + 1};
}

/* Asks for version 1 of an adapter and lets loads end until there is an answer. */
static struct asker get(struct adapter_cache *cache, const char *uid)
{
    struct asker asker = {0};
    char directory[64];

    snprintf(directory, sizeof(directory), "adapters/%s", uid);
    assert_int_equal(adapter_cache_get(cache, uid, 1, directory, ready, &asker), 0);
    while (asker.calls == 0)
        assert_true(finish_load(cache));
    assert_int_equal(asker.calls, 1);
    if (asker.adapter)
        assert_string_equal(asker.adapter->directory, directory);
    return asker;
}

static void use(struct adapter_cache *cache, const char *uid)
{
    struct asker asker = get(cache, uid);

    assert_int_equal(asker.error, 0);
    claas_adapter_unref(&asker.adapter);
}

static struct adapter_cache *new_cache(size_t limit, int capacity)
{
    struct adapter_cache *cache = NULL;

    memset(&device, 0, sizeof(device));
    device.capacity = capacity;
    assert_int_equal(adapter_cache_new(NULL, limit, &cache), 0);
    return cache;
}

static void test_count(void **state)
{
    struct adapter_cache *cache = new_cache(2, 100);

    (void)state;
    use(cache, "a");
    use(cache, "b");
    use(cache, "a");
    assert_int_equal(device.loads, 2);
    use(cache, "c"); /* b goes: a was used after it */
    assert_int_equal(device.held, 2);
    use(cache, "a");
    assert_int_equal(device.loads, 3);
    use(cache, "b");
    assert_int_equal(device.loads, 4);
    adapter_cache_free(&cache);
    assert_int_equal(device.held, 0);
}

/* More are asked for at once than may be held, and more versions of one: the last stay. */
static void test_burst(void **state)
{
    struct adapter_cache *cache = new_cache(3, 100);
    static const char *const uids[] = {"a", "b", "b", "b", "c", "d"};
    struct asker askers[6] = {0};

    (void)state;
    for (int i = 0; i < 6; i++)
        assert_int_equal(adapter_cache_get(cache, uids[i], i, uids[i], ready, &askers[i]), 0);
    assert_int_equal(device.loads, 6);
    for (int i = 0; i < 6; i++) {
        assert_true(end_load(cache, (uint64_t)i + 1, uids[i]));
        assert_int_equal(askers[i].calls, 1);
        assert_int_equal(askers[i].error, 0);
        claas_adapter_unref(&askers[i].adapter);
        assert_int_equal(device.held, i < 3 ? i + 1 : 3); /* a, then of b the first */
    }
    for (int i = 3; i < 6; i++) {
        assert_int_equal(adapter_cache_get(cache, uids[i], i, uids[i], ready, &askers[i]), 0);
        assert_int_equal(askers[i].calls, 2); /* at once */
        claas_adapter_unref(&askers[i].adapter);
    }
    assert_int_equal(device.loads, 6);
    adapter_cache_free(&cache);
    assert_int_equal(device.held, 0);
}

/* What a chat uses stays; the rest comes back when it is asked for. */
static void test_drop_idle(void **state)
{
    struct adapter_cache *cache = new_cache(8, 100);
    struct asker asker;

    (void)state;
    use(cache, "a");
    asker = get(cache, "b");
    use(cache, "c");
    assert_int_equal(adapter_cache_drop_idle(cache), 2);
    assert_int_equal(device.held, 1);
    assert_int_equal(adapter_cache_drop_idle(cache), 0);
    use(cache, "b");
    assert_int_equal(device.loads, 3);
    use(cache, "a");
    assert_int_equal(device.loads, 4);
    claas_adapter_unref(&asker.adapter);
    assert_int_equal(adapter_cache_drop_idle(cache), 2);
    assert_int_equal(device.held, 0);
    adapter_cache_free(&cache);
}

static void test_full_device(void **state)
{
    struct adapter_cache *cache = new_cache(100, 2);

    (void)state;
    use(cache, "a");
    use(cache, "b");
    use(cache, "a");
    use(cache, "c"); /* the first try fails, b goes, the second one succeeds */
    assert_int_equal(device.loads, 4);
    assert_int_equal(device.held, 2);
    use(cache, "a");
    assert_int_equal(device.loads, 4);
    adapter_cache_free(&cache);
    assert_int_equal(device.held, 0);
}

/* Those in use stay, for nothing is gained without them: the asker is told; later there is room. */
static void test_all_in_use(void **state)
{
    struct adapter_cache *cache = new_cache(100, 2);
    struct asker a = get(cache, "a"), b = get(cache, "b"), c = get(cache, "c");

    (void)state;
    assert_null(c.adapter);
    assert_int_equal(c.error, CLAAS_ERR_OVERLOADED);
    assert_int_equal(device.loads, 3);
    use(cache, "a"); /* both are still there */
    use(cache, "b");
    assert_int_equal(device.loads, 3);
    claas_adapter_unref(&a.adapter);
    claas_adapter_unref(&b.adapter);
    assert_int_equal(device.held, 2);
    use(cache, "c"); /* a goes */
    assert_int_equal(device.loads, 5);
    use(cache, "b");
    assert_int_equal(device.loads, 5);
    adapter_cache_free(&cache);
    assert_int_equal(device.held, 0);
}

/* The oldest is in use: the next one goes in its place. */
static void test_idle_goes_first(void **state)
{
    struct adapter_cache *cache = new_cache(100, 3);
    struct asker a = get(cache, "a");

    (void)state;
    use(cache, "b");
    use(cache, "c");
    use(cache, "d");
    assert_int_equal(device.held, 3);
    assert_int_equal(device.loads, 5);
    use(cache, "a");
    use(cache, "c");
    assert_int_equal(device.loads, 5);
    use(cache, "b");
    assert_int_equal(device.loads, 7);
    claas_adapter_unref(&a.adapter);
    adapter_cache_free(&cache);
    assert_int_equal(device.held, 0);
}

/* No room even alone: another error than that of a device that others use. */
static void test_never_fits(void **state)
{
    struct adapter_cache *cache = new_cache(100, 1);
    struct asker b;

    (void)state;
    use(cache, "a");
    device.capacity = 0;
    b = get(cache, "b");
    assert_null(b.adapter);
    assert_int_equal(b.error, CLAAS_ERR_NO_MEMORY);
    assert_int_equal(device.loads, 1 + 2);
    assert_int_equal(device.held, 0);
    device.capacity = 1;
    use(cache, "b");
    adapter_cache_free(&cache);
    assert_int_equal(device.held, 0);
}

/* The same while an adapter learns, whose memory is free again soon. */
static void test_beside_learning(void **state)
{
    struct adapter_cache *cache = new_cache(100, 0);
    struct asker a;

    (void)state;
    device.trains = true;
    a = get(cache, "a");
    assert_null(a.adapter);
    assert_int_equal(a.error, CLAAS_ERR_OVERLOADED);
    device.trains = false;
    assert_int_equal(get(cache, "a").error, CLAAS_ERR_NO_MEMORY);
    device.capacity = 1;
    use(cache, "a");
    adapter_cache_free(&cache);
    assert_int_equal(device.held, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_count),      cmocka_unit_test(test_burst),
        cmocka_unit_test(test_drop_idle),  cmocka_unit_test(test_full_device),
        cmocka_unit_test(test_all_in_use), cmocka_unit_test(test_idle_goes_first),
        cmocka_unit_test(test_never_fits), cmocka_unit_test(test_beside_learning),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
