/* Adapters between device and disk: the cache by itself (budget, order, reuse, marks), and the
 * engine's loads and saves over it, on the fake back-ends. */
#include "engine_fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "claas/file.h"
#include "engine/host_memory.h"

#define COUNT 1000 /* floats of an image's array */
#define BYTES (COUNT * sizeof(float))

/* --- the cache by itself --- */

static struct claas_adapter_mark mark_of(uint64_t number)
{
    struct claas_adapter_mark mark = {0};

    for (int i = 0; i < CLAAS_MARK_FILES; i++)
        mark.files[i].inode = 3 * number + (uint64_t)i + 1;
    return mark;
}

static struct claas_adapter_image image_of(claas_host_cache_t *cache, float value, bool moments)
{
    const struct claas_adapter_memory *memory = claas_host_cache_memory(cache);
    struct claas_adapter_image image = {.memory = memory};

    assert_non_null(image.parameters = memory->take(memory->arg, BYTES));
    image.parameters[COUNT - 1] = value;
    if (moments) {
        assert_non_null(image.exp_avg = memory->take(memory->arg, BYTES));
        assert_non_null(image.exp_avg_sq = memory->take(memory->arg, BYTES));
    }
    return image;
}

static void put(claas_host_cache_t *cache, uint64_t number, bool whole, bool moments)
{
    struct claas_adapter_image image = image_of(cache, (float)number, moments);
    struct claas_adapter_mark mark = mark_of(number);

    claas_host_cache_put(cache, &mark, whole, &image);
    assert_null(image.parameters); /* taken over, kept or not */
}

/* The value of the image with that number, -1 if it is not there. */
static float look(claas_host_cache_t *cache, uint64_t number, bool with_moments)
{
    struct claas_adapter_mark mark = mark_of(number);
    const struct claas_adapter_image *image = claas_host_cache_get(cache, &mark, with_moments);
    float value = image != NULL ? image->parameters[COUNT - 1] : -1;

    if (image != NULL)
        claas_host_cache_done(cache, image);
    return value;
}

static struct claas_host_cache_stats stats_of(const claas_host_cache_t *cache)
{
    struct claas_host_cache_stats stats;

    claas_host_cache_stats(cache, &stats);
    return stats;
}

static claas_host_cache_t *open_cache(uint64_t budget)
{
    claas_host_cache_t *cache = NULL;

    fake_reset();
    assert_int_equal(claas_host_cache_new(&fake_backend_with_memory, NULL, budget, &cache), 0);
    return cache;
}

static void test_budget_and_order(void **state)
{
    claas_host_cache_t *cache = open_cache(3 * BYTES);

    for (uint64_t n = 1; n <= 3; n++)
        put(cache, n, true, false);
    assert_int_equal(stats_of(cache).bytes, 3 * BYTES);
    assert_true(look(cache, 1, true) == 1); /* now 2 is the oldest */
    put(cache, 4, true, false);
    assert_int_equal(stats_of(cache).bytes, 3 * BYTES);
    assert_int_equal(stats_of(cache).images, 3);
    assert_true(look(cache, 2, true) == -1);
    assert_true(look(cache, 1, true) == 1 && look(cache, 3, true) == 3 &&
                look(cache, 4, true) == 4);
    put(cache, 5, true, true); /* with moments: as much as all the others */
    assert_int_equal(stats_of(cache).images, 1);
    assert_int_equal(stats_of(cache).bytes, 3 * BYTES);
    assert_true(look(cache, 5, true) == 5);
    assert_int_equal(atomic_load(&fake.host_blocks), 3);
    claas_host_cache_free(&cache);
    assert_int_equal(atomic_load(&fake.host_blocks), 0);
}

/* What one image gave back the next one takes, also when it was of another kind. */
static void test_blocks_are_reused(void **state)
{
    claas_host_cache_t *cache = open_cache(3 * BYTES);
    struct claas_adapter_image first = image_of(cache, 1, true), second;
    float *arrays[3] = {first.parameters, first.exp_avg, first.exp_avg_sq};
    int same = 0;

    claas_adapter_image_done(&first);
    assert_int_equal(stats_of(cache).bytes, 3 * BYTES);
    second = image_of(cache, 2, true);
    for (int i = 0; i < 3; i++)
        same += arrays[i] == second.parameters || arrays[i] == second.exp_avg ||
                arrays[i] == second.exp_avg_sq;
    assert_int_equal(same, 3);
    claas_adapter_image_done(&second);
    claas_host_cache_free(&cache);
}

/* What the next image will want is at hand, within the budget, at the cost of no image. */
static void test_prepared(void **state)
{
    claas_host_cache_t *cache = open_cache(4 * BYTES + BYTES / 2);
    struct claas_adapter_image image;

    put(cache, 1, true, false);
    claas_host_cache_prepare(cache, BYTES, 2);
    assert_int_equal(stats_of(cache).bytes, 3 * BYTES);
    claas_host_cache_prepare(cache, BYTES, 2);
    assert_int_equal(stats_of(cache).bytes, 3 * BYTES);
    image = image_of(cache, 2, false);
    assert_int_equal(stats_of(cache).bytes, 3 * BYTES);
    claas_host_cache_prepare(cache, BYTES, 9);
    assert_int_equal(stats_of(cache).bytes, 4 * BYTES);
    assert_int_equal(atomic_load(&fake.host_blocks), 4);
    assert_true(look(cache, 1, true) == 1);
    claas_adapter_image_done(&image);
    claas_host_cache_free(&cache);
}

/* More than the budget may be in use; what is over it goes as soon as nobody uses it. */
static void test_more_in_use_than_budget(void **state)
{
    claas_host_cache_t *cache = open_cache(2 * BYTES);
    struct claas_adapter_mark mark = mark_of(1);
    struct claas_adapter_image image;
    const struct claas_adapter_image *held;

    put(cache, 1, true, false);
    held = claas_host_cache_get(cache, &mark, true);
    assert_non_null(held);
    image = image_of(cache, 2, true);
    assert_int_equal(stats_of(cache).bytes, 4 * BYTES);
    assert_true(held->parameters[COUNT - 1] == 1); /* in use: not dropped for it */
    mark = mark_of(2);
    claas_host_cache_put(cache, &mark, true, &image); /* larger than all there may be */
    assert_true(look(cache, 2, true) == -1);
    assert_true(held->parameters[COUNT - 1] == 1);
    assert_true(stats_of(cache).bytes <= 2 * BYTES);
    claas_host_cache_done(cache, held);
    assert_true(look(cache, 1, true) == 1);
    claas_host_cache_free(&cache);
}

/* What is dropped while somebody reads it is found by nobody from then on, wherever in the list it
 * is, and goes with its last reader. */
static void test_dropped_in_use(void **state)
{
    claas_host_cache_t *cache = open_cache(10 * BYTES);
    struct claas_adapter_mark mark = mark_of(1);
    const struct claas_adapter_image *held[2];

    for (int is_first = 0; is_first < 2; is_first++) {
        put(cache, 1, false, false);
        held[0] = claas_host_cache_get(cache, &mark, false);
        put(cache, 1, true, true); /* leaves the weights alone that are in use */
        assert_int_equal(stats_of(cache).images, 2);
        held[1] = is_first ? claas_host_cache_get(cache, &mark, true) : NULL;
        claas_host_cache_drop(cache, &mark);
        assert_true(look(cache, 1, false) == -1 && look(cache, 1, true) == -1);
        assert_int_equal(stats_of(cache).images, 1 + is_first);
        assert_true(held[0]->parameters[COUNT - 1] == 1);
        put(cache, 1, true, true); /* read anew */
        assert_true(look(cache, 1, false) == 1 && look(cache, 1, true) == 1);
        for (int i = 0; i <= is_first; i++)
            claas_host_cache_done(cache, held[i]);
        assert_int_equal(stats_of(cache).images, 1);
        claas_host_cache_drop(cache, &mark);
        assert_int_equal(stats_of(cache).images, 0);
    }
    claas_host_cache_free(&cache);
}

/* Weights alone serve; to train, all of the directory is needed, just as it is on disk. */
static void test_marks(void **state)
{
    claas_host_cache_t *cache = open_cache(10 * BYTES);
    struct claas_adapter_mark mark;

    put(cache, 1, false, false);
    assert_true(look(cache, 1, false) == 1 && look(cache, 1, true) == -1);
    put(cache, 1, true, true);
    assert_true(look(cache, 1, false) == 1 && look(cache, 1, true) == 1);
    assert_int_equal(stats_of(cache).images, 1); /* the whole one took the place */
    put(cache, 1, false, false);
    assert_int_equal(stats_of(cache).images, 1);
    mark = mark_of(1);
    mark.files[2].inode = 0; /* its moments were dropped */
    assert_null(claas_host_cache_get(cache, &mark, true));
    mark = mark_of(1);
    mark.files[1].modified_ns++; /* its weights were replaced */
    assert_null(claas_host_cache_get(cache, &mark, true));
    assert_null(claas_host_cache_get(cache, &mark, false));
    claas_host_cache_free(&cache);
}

static void test_none_and_unpinned(void **state)
{
    claas_host_cache_t *cache = open_cache(0);
    struct claas_adapter_mark mark = mark_of(1);
    struct claas_adapter_image image = {.parameters = CLAAS_NEW_ARRAY(float, COUNT)};

    assert_null(claas_host_cache_memory(cache));
    claas_host_cache_put(cache, &mark, true, &image);
    assert_null(image.parameters);
    assert_true(look(cache, 1, true) == -1);
    claas_host_cache_free(&cache);
    cache = open_cache(BYTES);
    fake.fail_host_new = true;
    put(cache, 1, true, false);
    assert_true(look(cache, 1, true) == 1);
    assert_int_equal(atomic_load(&fake.host_blocks), 0);
    claas_host_cache_free(&cache);
}

/* --- the host's memory --- */

struct place {
    char directory[32], paths[3][64];
};

static struct place make_place(void)
{
    struct place place = {.directory = "/tmp/claas-cache-XXXXXX"};

    assert_non_null(mkdtemp(place.directory));
    for (int i = 0; i < 3; i++)
        snprintf(place.paths[i], sizeof(place.paths[i]), "%s/%d", place.directory, i);
    return place;
}

static void write_at(const struct place *place, const char *name, const char *text)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", place->directory, name);
    char *slash = strrchr(path, '/');

    *slash = '\0';
    assert_int_equal(claas_mkdir_all(path), 0);
    *slash = '/';
    assert_int_equal(claas_file_write(path, text, strlen(text)), 0);
}

/* With these lines as /proc/self/cgroup. */
static uint64_t limit_of(const struct place *place, const char *membership)
{
    write_at(place, "0", membership);
    return claas_cgroup_limit(place->directory, place->paths[0]);
}

static void test_cgroup_limit(void **state)
{
    struct place place = make_place();

    /* none: no group, no file, "max", a line that is none */
    assert_true(limit_of(&place, "") == UINT64_MAX);
    assert_true(limit_of(&place, "0::/a/b\n4:memory:/c\n") == UINT64_MAX);
    write_at(&place, "a/b/memory.max", "max\n");
    assert_true(limit_of(&place, "0::/a/b\n") == UINT64_MAX);
    assert_true(limit_of(&place, "memory\n0:\n0::a\n") == UINT64_MAX);
    /* version 2: the group's own, a group's around it, whichever is less */
    write_at(&place, "a/b/memory.max", "3000\n");
    assert_int_equal(limit_of(&place, "0::/a/b\n"), 3000);
    write_at(&place, "a/memory.max", "4000\n");
    assert_int_equal(limit_of(&place, "0::/a/b\n"), 3000);
    assert_int_equal(limit_of(&place, "0::/a\n"), 4000);
    write_at(&place, "a/memory.max", "2000\n");
    assert_int_equal(limit_of(&place, "0::/a/b\n"), 2000);
    assert_true(limit_of(&place, "0::/\n") == UINT64_MAX);
    /* a container's own is the top, whatever it is called outside */
    write_at(&place, "memory.max", "1000\n");
    assert_int_equal(limit_of(&place, "0::/\n"), 1000);
    assert_int_equal(limit_of(&place, "0::/elsewhere/x\n"), 1000);
    /* version 1: the controller of that very name, among others too */
    write_at(&place, "memory/c/memory.limit_in_bytes", "700\n");
    write_at(&place, "memory/memory.limit_in_bytes", "9223372036854771712\n");
    assert_int_equal(limit_of(&place, "5:cpu,memory:/c/d\n3:cpuset:/\n"), 700);
    assert_int_equal(limit_of(&place, "4:memory:/\n"), INT64_C(9223372036854771712));
    assert_true(limit_of(&place, "4:name=memory:/c\n5:memory2:/c\n") == UINT64_MAX);
    assert_int_equal(limit_of(&place, "4:memory:/c\n0::/\n"), 700);
    assert_int_equal(limit_of(&place, "0::/\n4:memory:/\n"), 1000);
    assert_int_equal(claas_remove_all(place.directory), 0);
    assert_true(claas_cgroup_limit("/none", "/none/self") == UINT64_MAX);
    assert_true(claas_host_memory() > 0 && claas_host_memory() < UINT64_MAX);
}

/* --- in the engine --- */

static void train(struct rig *rig, claas_adapter_t *adapter)
{
    uint64_t id;

    assert_int_equal(train_submit(rig, adapter, true, &id), 0);
    claas_device_event_done(
        &(struct claas_device_event){.trained = wait_for(rig, CLAAS_EVENT_TRAINED, id).trained});
}

static claas_adapter_t *load(struct rig *rig, const char *path, enum claas_adapter_use use)
{
    uint64_t id;

    assert_int_equal(claas_device_adapter_load(rig->client, path, use, &id), 0);
    return wait_for(rig, CLAAS_EVENT_ADAPTER, id).adapter;
}

static void expect_stamp(struct rig *rig, const char *path, enum claas_adapter_use use,
                         uint64_t stamp)
{
    claas_adapter_t *loaded = load(rig, path, use);

    assert_true(fake_stamp(loaded) == stamp);
    claas_adapter_unref(&loaded);
}

static void save_copy(struct rig *rig, claas_adapter_t *adapter, const char *path)
{
    claas_adapter_t *kept;
    uint64_t id;

    assert_int_equal(claas_device_adapter_copy(rig->client, adapter, &id), 0);
    kept = wait_for(rig, CLAAS_EVENT_ADAPTER, id).adapter;
    train(rig, adapter); /* the copy stays what it was */
    assert_int_equal(claas_device_adapter_save(rig->client, kept, path, &id), 0);
    wait_for(rig, CLAAS_EVENT_SAVED, id);
    claas_adapter_unref(&kept);
    /* The thread's own reference goes after the event; when it fails the next one, it is gone. */
    assert_int_equal(claas_device_adapter_save(rig->client, adapter, path, &id), 0);
    assert_int_equal(wait_for(rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_EXISTS);
}

static uint64_t read_ns(const struct rig *rig)
{
    struct claas_device_stats stats;

    claas_device_stats(rig->device, &stats);
    return stats.read_ns;
}

/* A version that was trained here becomes the served one on the device; evicted from there it comes
 * back from the host's memory; no file is read. Where it lies does not matter. */
static void test_trained_is_served(void **state)
{
    struct rig rig = rig_open_on(&fake_backend_with_memory,
                                 (struct claas_device_options){.host_cache = 1 << 20});
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    struct place place = make_place();
    uint64_t stamps[3];
    int uploads;

    for (int i = 0; i < 3; i++) {
        train(&rig, adapter);
        stamps[i] = fake_stamp(adapter);
        save_copy(&rig, adapter, place.paths[i]);
    }
    assert_int_equal(claas_remove_all(place.paths[0]), 0);
    assert_int_equal(rename(place.paths[1], place.paths[0]), 0); /* as publication does */
    uploads = atomic_load(&fake.uploads);
    expect_stamp(&rig, place.paths[0], CLAAS_ADAPTER_SERVE, stamps[1]);
    expect_stamp(&rig, place.paths[2], CLAAS_ADAPTER_TRAIN, stamps[2]);
    assert_int_equal(atomic_load(&fake.uploads), uploads); /* clones of what is on the device */
    claas_adapters_drop_hot(rig.device);
    expect_stamp(&rig, place.paths[0], CLAAS_ADAPTER_SERVE, stamps[1]);
    expect_stamp(&rig, place.paths[2], CLAAS_ADAPTER_TRAIN, stamps[2]);
    assert_int_equal(atomic_load(&fake.uploads), uploads + 2);
    assert_int_equal(read_ns(&rig), 0);
    claas_adapter_unref(&adapter);
    assert_int_equal(claas_remove_all(place.directory), 0);
    rig_close(&rig);
}

/* As many cycles as the device runs may end before somebody chats; what is loaded again stays. */
static void test_saved_copies_stay(void **state)
{
    struct rig rig = rig_open_on(&fake_backend_with_memory,
                                 (struct claas_device_options){.host_cache = 1 << 20});
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    struct place place = make_place();
    CLAAS_AUTO_FREE char *fourth = claas_format("%s/3", place.directory);
    uint64_t stamps[3];
    int uploads;

    for (int i = 0; i < 3; i++) {
        stamps[i] = fake_stamp(adapter);
        save_copy(&rig, adapter, place.paths[i]);
    }
    uploads = atomic_load(&fake.uploads);
    expect_stamp(&rig, place.paths[0], CLAAS_ADAPTER_SERVE, stamps[0]);
    assert_int_equal(atomic_load(&fake.uploads), uploads);
    save_copy(&rig, adapter, fourth);
    expect_stamp(&rig, place.paths[0], CLAAS_ADAPTER_SERVE, stamps[0]);
    expect_stamp(&rig, place.paths[2], CLAAS_ADAPTER_SERVE, stamps[2]);
    assert_int_equal(atomic_load(&fake.uploads), uploads);
    expect_stamp(&rig, place.paths[1], CLAAS_ADAPTER_SERVE, stamps[1]); /* the one that went */
    assert_int_equal(atomic_load(&fake.uploads), uploads + 1);
    claas_adapter_unref(&adapter);
    assert_int_equal(claas_remove_all(place.directory), 0);
    rig_close(&rig);
}

/* A candidate that was written and then replaced by a better one leaves nothing behind. */
static void forgotten_is_read(const struct claas_backend_ops *ops)
{
    struct rig rig = rig_open_on(ops, (struct claas_device_options){.host_cache = 1 << 20});
    claas_adapter_t *adapter = adapter_new(&rig, 1), *kept;
    struct place place = make_place();
    uint64_t stamp = fake_stamp(adapter), id;

    assert_int_equal(claas_device_adapter_copy(rig.client, adapter, &id), 0);
    kept = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    assert_int_equal(claas_device_adapter_save(rig.client, kept, place.paths[0], &id), 0);
    wait_for(&rig, CLAAS_EVENT_SAVED, id);
    claas_device_adapter_forget(rig.device, place.paths[1]); /* there is none: no harm */
    claas_device_adapter_forget(rig.device, place.paths[0]);
    claas_adapter_unref(&kept);
    expect_stamp(&rig, place.paths[0], CLAAS_ADAPTER_SERVE, stamp);
    assert_true(read_ns(&rig) > 0);
    train(&rig, adapter); /* by now the compute thread has let go of the handle */
    assert_int_equal(stats_of(rig.device->host_cache).images, 1); /* what was read is all */
    claas_adapter_unref(&adapter);
    assert_int_equal(claas_remove_all(place.directory), 0);
    rig_close(&rig);
}

static void test_forgotten_is_read(void **state)
{
    forgotten_is_read(&fake_backend);
    forgotten_is_read(&fake_backend_with_memory);
}

/* A directory that was written anew is read anew, also where it has the name of a cached one. */
static void test_replaced_is_read(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.host_cache = 1 << 20});
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    struct place place = make_place();
    struct claas_adapter_image image;
    uint64_t first, second, read;

    first = fake_stamp(adapter);
    save_copy(&rig, adapter, place.paths[0]);
    second = fake_stamp(adapter);
    expect_stamp(&rig, place.paths[0], CLAAS_ADAPTER_SERVE, first);
    expect_stamp(&rig, place.paths[0], CLAAS_ADAPTER_TRAIN, first);
    assert_int_equal(claas_remove_all(place.paths[0]), 0);
    save_copy(&rig, adapter, place.paths[0]);
    expect_stamp(&rig, place.paths[0], CLAAS_ADAPTER_TRAIN, second);
    expect_stamp(&rig, place.paths[0], CLAAS_ADAPTER_SERVE, second);
    /* written by nobody of this process */
    assert_int_equal(claas_adapter_read(place.paths[0], &rig.device->config, true, &image), 0);
    image.parameters[0] += 1;
    assert_int_equal(claas_remove_all(place.paths[0]), 0);
    assert_int_equal(claas_adapter_write(place.paths[0], &rig.device->config, "", &image), 0);
    read = read_ns(&rig);
    for (int i = 0; i < 2; i++) {
        claas_adapter_t *loaded = load(&rig, place.paths[0], CLAAS_ADAPTER_TRAIN);

        assert_true(fake_stamp(loaded) != second);
        assert_true(loaded->backend->parameters[0] == image.parameters[0]);
        claas_adapter_unref(&loaded);
        assert_true(i == 0 ? read_ns(&rig) > read : read_ns(&rig) == read);
        read = read_ns(&rig);
    }
    claas_adapter_image_done(&image);
    claas_adapter_unref(&adapter);
    assert_int_equal(claas_remove_all(place.directory), 0);
    rig_close(&rig);
}

/* An untrained adapter has no moments in memory, and zero ones on disk: the same. */
static void test_untrained(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.host_cache = 1 << 20});
    struct claas_lora_config lora = {.rank = 2, .alpha = 4, .modules = CLAAS_MODULE_ALL};
    struct place place = make_place();
    claas_adapter_t *kept, *loaded;
    struct claas_adapter_image image;
    struct claas_device_stats stats;
    uint64_t id;

    assert_int_equal(claas_device_adapter_init(rig.client, &lora, 7, CLAAS_ADAPTER_KEEP, &id), 0);
    kept = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    assert_int_equal(claas_device_adapter_save(rig.client, kept, place.paths[0], &id), 0);
    wait_for(&rig, CLAAS_EVENT_SAVED, id);
    claas_adapter_unref(&kept);
    do /* its image is the cache's once the compute thread has let go of it */
        claas_device_stats(rig.device, &stats);
    while (stats.host_cache_images == 0);
    loaded = load(&rig, place.paths[0], CLAAS_ADAPTER_TRAIN);
    assert_int_equal(read_ns(&rig), 0);
    assert_int_equal(claas_adapter_read(place.paths[0], &rig.device->config, true, &image), 0);
    assert_memory_equal(loaded->backend->parameters, image.parameters,
                        loaded->backend->count * sizeof(float));
    for (size_t i = 0; i < loaded->backend->count; i++)
        assert_true(image.exp_avg[i] == 0 && image.exp_avg_sq[i] == 0);
    claas_adapter_image_done(&image);
    claas_adapter_unref(&loaded);
    assert_int_equal(claas_remove_all(place.directory), 0);
    rig_close(&rig);
}

/* A copy that finds no room on the device is made in the host's memory; hot ones go first. */
static void test_full_device(void **state)
{
    struct rig rig = rig_open_on(&fake_backend_with_memory,
                                 (struct claas_device_options){.host_cache = 1 << 20});
    claas_adapter_t *adapter = adapter_new(&rig, 1), *other;
    struct place place = make_place();
    uint64_t stamp = fake_stamp(adapter), id;
    struct claas_device_stats stats;
    struct claas_adapter_info infos[4];
    claas_adapter_t *kept;

    save_copy(&rig, adapter, place.paths[0]);
    fake.adapter_room = 2; /* the one in training and its saved copy */
    other = load(&rig, place.paths[0], CLAAS_ADAPTER_SERVE);
    assert_true(fake_stamp(other) == stamp);
    stamp = fake_stamp(adapter);
    assert_int_equal(claas_device_adapter_copy(rig.client, adapter, &id), 0);
    kept = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    claas_device_stats(rig.device, &stats);
    assert_int_equal(stats.clones, 1); /* the first copy alone */
    assert_int_equal(claas_device_adapters(rig.device, infos, 4), 3);
    assert_true(infos[0].use == CLAAS_ADAPTER_KEEP && infos[0].in_host);
    assert_int_equal(claas_device_adapter_save(rig.client, kept, place.paths[1], &id), 0);
    wait_for(&rig, CLAAS_EVENT_SAVED, id);
    claas_adapter_unref(&kept);
    claas_adapter_unref(&other);
    expect_stamp(&rig, place.paths[1], CLAAS_ADAPTER_SERVE, stamp);
    claas_adapter_unref(&adapter);
    assert_int_equal(claas_remove_all(place.directory), 0);
    rig_close(&rig);
}

/* A copy that nobody waits for takes no other's place, and is not read back where it finds none. */
static void test_copy_if_room(void **state)
{
    struct rig rig = rig_open_on(&fake_backend_with_memory,
                                 (struct claas_device_options){.host_cache = 1 << 20});
    claas_adapter_t *adapter = adapter_new(&rig, 1), *kept;
    struct place place = make_place();
    struct claas_adapter_info infos[4];
    uint64_t id;

    save_copy(&rig, adapter, place.paths[0]);
    fake.adapter_room = 2; /* the one in training and its saved copy */
    fake.download_operations = 1;
    fake.operations_done = 0;
    assert_int_equal(claas_device_adapter_copy_if_room(rig.client, adapter, &id), 0);
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_NO_MEMORY);
    assert_int_equal(fake.operations_done, 0);
    assert_int_equal(claas_device_adapters(rig.device, infos, 4), 2);
    fake.adapter_room = 3;
    assert_int_equal(claas_device_adapter_copy_if_room(rig.client, adapter, &id), 0);
    kept = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    assert_int_equal(claas_device_adapters(rig.device, infos, 4), 3);
    assert_true(infos[0].use == CLAAS_ADAPTER_KEEP && !infos[0].in_host);
    assert_int_equal(fake.operations_done, 0);
    claas_adapter_unref(&kept);
    claas_adapter_unref(&adapter);
    assert_int_equal(claas_remove_all(place.directory), 0);
    rig_close(&rig);
}

/* Where no copy is made on the device there is none. */
static void test_copy_if_room_in_host(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    uint64_t id;

    assert_false(claas_device_copies(rig.device));
    assert_int_equal(claas_device_adapter_copy_if_room(rig.client, adapter, &id), 0);
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_UNSUPPORTED);
    claas_adapter_unref(&adapter);
    rig_close(&rig);
}

/* A step that finds no room gets that of the saved copies. */
static void test_step_takes_room(void **state)
{
    struct rig rig = rig_open_on(&fake_backend_with_memory,
                                 (struct claas_device_options){.host_cache = 1 << 20});
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    struct place place = make_place();
    struct claas_adapter_info infos[4];
    claas_adapter_t *kept;
    uint64_t id;

    save_copy(&rig, adapter, place.paths[0]);
    assert_int_equal(claas_device_adapters(rig.device, infos, 4), 2);
    fake.train_room = 1;
    train(&rig, adapter);
    assert_int_equal(claas_device_adapters(rig.device, infos, 4), 1);
    assert_int_equal(claas_device_adapter_copy(rig.client, adapter, &id), 0);
    kept = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    assert_int_equal(train_submit(&rig, adapter, true, &id), 0); /* what is in use stays */
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_NO_MEMORY);
    claas_adapter_unref(&kept);
    claas_adapter_unref(&adapter);
    assert_int_equal(claas_remove_all(place.directory), 0);
    rig_close(&rig);
}

/* A save that was given up leaves no directory, unless it had ended. */
static void test_cancelled_save(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    claas_adapter_t *adapter = adapter_new(&rig, 1), *kept;
    struct place place = make_place();
    struct claas_device_event event;
    struct stat info;
    uint64_t id;

    assert_int_equal(claas_device_adapter_copy(rig.client, adapter, &id), 0);
    kept = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    assert_int_equal(claas_device_adapter_save(rig.client, kept, place.paths[0], &id), 0);
    claas_device_cancel(rig.client, id);
    assert_int_equal(claas_device_client_wait(rig.client, WAIT_MS, &event), 1);
    if (event.kind == CLAAS_EVENT_FAILED) {
        assert_int_equal(event.error, CLAAS_ERR_CANCELLED);
        assert_true(stat(place.paths[0], &info) < 0);
    } else { /* it had ended */
        assert_int_equal(event.kind, CLAAS_EVENT_SAVED);
    }
    claas_adapter_unref(&kept);
    claas_adapter_unref(&adapter);
    assert_int_equal(claas_remove_all(place.directory), 0);
    rig_close(&rig);
}

static bool is_second_question(void *arg)
{
    return ++*(int *)arg == 2;
}

/* In the middle of a file. */
static void test_unwanted_directory(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    struct claas_lora_config lora = {.rank = 2, .alpha = 4, .modules = CLAAS_MODULE_ALL};
    struct claas_adapter_image image;
    struct place place = make_place();
    struct stat info;
    int asked = 0;

    assert_int_equal(claas_adapter_image_new(&rig.device->config, &lora, NULL, false, &image), 0);
    assert_int_equal(claas_adapter_write_unless(place.paths[0], &rig.device->config, "", &image,
                                                is_second_question, &asked),
                     CLAAS_ERR_CANCELLED);
    assert_int_equal(asked, 2);
    assert_true(stat(place.paths[0], &info) < 0);
    claas_adapter_image_done(&image);
    assert_int_equal(claas_remove_all(place.directory), 0);
    rig_close(&rig);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_budget_and_order),   cmocka_unit_test(test_blocks_are_reused),
        cmocka_unit_test(test_prepared),           cmocka_unit_test(test_more_in_use_than_budget),
        cmocka_unit_test(test_dropped_in_use),     cmocka_unit_test(test_marks),
        cmocka_unit_test(test_none_and_unpinned),  cmocka_unit_test(test_cgroup_limit),
        cmocka_unit_test(test_trained_is_served),  cmocka_unit_test(test_saved_copies_stay),
        cmocka_unit_test(test_forgotten_is_read),  cmocka_unit_test(test_replaced_is_read),
        cmocka_unit_test(test_untrained),          cmocka_unit_test(test_full_device),
        cmocka_unit_test(test_copy_if_room),       cmocka_unit_test(test_copy_if_room_in_host),
        cmocka_unit_test(test_step_takes_room),    cmocka_unit_test(test_cancelled_save),
        cmocka_unit_test(test_unwanted_directory),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
