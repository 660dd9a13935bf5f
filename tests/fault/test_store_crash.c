/* kill -9 at random instants of the store: nothing acknowledged is lost, nothing is half there.
 *
 * Each round a child opens the store and does random changes; for each it writes what it is about
 * to do into a pipe, and, after the commit, that it was done. The parent kills it at a random
 * moment, reads the pipe, opens the directory itself and compares: every acknowledged change must
 * be there; an announced one may be; nothing else. The model is a list of jobs and, per adapter,
 * its current version; unacknowledged changes leave a choice, settled by what is found. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

#include "../unit/storage_fixture.h"
#include "adapter_files.h"
#include "claas/random.h"

/* On until enough was acknowledged: a busy machine does less in a round. */
#define ROUNDS_MIN  60
#define ROUNDS_MAX  600
#define KEYS_WANTED 200
#define ENDS_WANTED 15
#define ADAPTERS    3
#define JOBS_MAX    200000
#define RUN_US      60000 /* longest life of a child */

enum action { FEEDBACK, PUBLISH, ROLLBACK, RECORD, DELETE, ROLLOUT, START };

/* One line of the pipe; fixed size below PIPE_BUF, so it is whole or not there. */
struct note {
    int acknowledged;
    enum action action;
    int adapter;
    int64_t version; /* current afterwards; -1 = deleted */
    char key[24];    /* FEEDBACK, ROLLOUT: its idempotency key / response id */
    char job[65];    /* PUBLISH, RECORD: the job that ends */
};

/* What the parent knows. */
struct model {
    int64_t current[ADAPTERS]; /* -1 = none */
    char (*keys)[24];          /* acknowledged feedback */
    char (*ended)[65];         /* acknowledged ends */
    char (*rollouts)[24];
    size_t key_count, ended_count, rollout_count;
};

static uint64_t seed, counter;

static unsigned pick(unsigned n)
{
    uint32_t words[4];

    claas_philox(seed, 1, counter++, words);
    return words[0] % n;
}

/* --- the child ------------------------------------------------------------------------- */

struct child {
    const char *data;
    claas_store_t *store;
    int pipe;
    int64_t current[ADAPTERS];
    char jobs[ADAPTERS][16][65]; /* unfinished */
    int job_count[ADAPTERS];
    int number, serial;
};

static void tell(const struct child *child, struct note *note, int acknowledged)
{
    note->acknowledged = acknowledged;
    if (write(child->pipe, note, sizeof(*note)) != sizeof(*note))
        _exit(3);
}

static void die(const char *what)
{
    fprintf(stderr, "child: %s: %s\n", what, claas_error_text());
    _exit(4);
}

/* A group: several feedbacks and answers under one commit, acknowledged together after it. */
static void do_group(struct child *child)
{
    struct note notes[8];
    int count = 1 + (int)pick(8);

    for (int i = 0; i < count; i++) {
        struct note *note = &notes[i];
        struct claas_store_answer answer;
        const char *job = "";
        int adapter = (int)pick(ADAPTERS);

        memset(note, 0, sizeof(*note));
        note->adapter = adapter;
        note->action = child->current[adapter] < 0 || pick(3) == 0 ? ROLLOUT : FEEDBACK;
        snprintf(note->key, sizeof(note->key), "%d-%d", child->number, child->serial++);
        tell(child, note, 0);
        if (note->action == ROLLOUT) {
            if (fixture_rollout(child->store, note->key, NULL, note->key, "text", 1) < 0)
                die("rollout");
            continue;
        }
        if (fixture_call(child->store, CLAAS_STORE_FEEDBACK_PUT, &answer,
                         "{\"requests\":[{\"lora_id\":\"u/%d\",\"response_id\":\"first\","
                         "\"feedback\":\"%s\"}],\"idempotency_key\":\"%s\"}",
                         adapter, note->key, note->key) < 0)
            die("feedback");
        claas_json_get_string(answer.body, "job_id", &job);
        if (child->job_count[adapter] < 16)
            snprintf(child->jobs[adapter][child->job_count[adapter]++], 65, "%s", job);
        claas_store_answer_done(&answer);
    }
    if (child->store->ops->commit(child->store) < 0)
        die("commit");
    for (int i = 0; i < count; i++)
        tell(child, &notes[i], 1);
}

static void do_publish(struct child *child, int adapter, bool overwrite)
{
    struct note note = {.action = PUBLISH, .adapter = adapter};
    bool new = child->current[adapter] < 0 || overwrite;
    char jobs[80] = "[]", name[16];
    int64_t version;

    if (!new && child->job_count[adapter] > 0) {
        snprintf(note.job, sizeof(note.job), "%s",
                 child->jobs[adapter][--child->job_count[adapter]]);
        snprintf(jobs, sizeof(jobs), "[\"%s\"]", note.job);
    }
    snprintf(name, sizeof(name), "u/%d", adapter);
    note.version = -2; /* not known before */
    tell(child, &note, 0);
    version = fixture_publish(child->store, child->data, name, new ? -1 : child->current[adapter],
                              jobs, overwrite);
    if (version < 0)
        die("publish");
    if (new)
        child->job_count[adapter] = 0;
    child->current[adapter] = note.version = version;
    tell(child, &note, 1);
}

static void do_rollback(struct child *child, int adapter)
{
    struct note note = {.action = ROLLBACK, .adapter = adapter};
    struct claas_store_answer answer;

    if (child->current[adapter] < 1)
        return;
    note.version = 0;
    tell(child, &note, 0);
    if (fixture_call(child->store, CLAAS_STORE_ADAPTER_ROLLBACK, &answer,
                     "{\"lora_id\":\"u/%d\",\"version\":0}", adapter) < 0 ||
        child->store->ops->commit(child->store) < 0)
        die("rollback");
    claas_store_answer_done(&answer);
    child->current[adapter] = 0;
    tell(child, &note, 1);
}

static void do_record(struct child *child, int adapter)
{
    struct note note = {.action = RECORD, .adapter = adapter, .version = -2};
    struct claas_store_answer answer;

    if (child->job_count[adapter] == 0)
        return;
    snprintf(note.job, sizeof(note.job), "%s", child->jobs[adapter][--child->job_count[adapter]]);
    tell(child, &note, 0);
    if (fixture_call(child->store, CLAAS_STORE_JOB_RECORD, &answer,
                     "{\"job_ids\":[\"%s\"],\"state\":\"rejected\",\"event\":{\"reason\":\"x\"}}",
                     note.job) < 0 ||
        child->store->ops->commit(child->store) < 0)
        die("record");
    claas_store_answer_done(&answer);
    tell(child, &note, 1);
}

static void do_delete(struct child *child, int adapter)
{
    struct note note = {.action = DELETE, .adapter = adapter, .version = -1};
    struct claas_store_answer answer;

    tell(child, &note, 0);
    if (fixture_call(child->store, CLAAS_STORE_ADAPTER_DELETE, &answer, "{\"lora_id\":\"u/%d\"}",
                     adapter) < 0 ||
        child->store->ops->commit(child->store) < 0)
        die("delete");
    claas_store_answer_done(&answer);
    child->current[adapter] = -1;
    child->job_count[adapter] = 0;
    tell(child, &note, 1);
}

static void open_child(struct child *child)
{
    struct claas_store_options options = fixture_options(child->data);
    struct note note = {.action = START};

    options.keep_versions = 4;
    options.keep_moments = 1;
    if (claas_store_open_sqlite(&options, &child->store) < 0)
        die("start");
    if (child->number == 0 && (fixture_rollout(child->store, "first", NULL, "q", "text", 1) < 0 ||
                               child->store->ops->commit(child->store) < 0))
        die("first rollout");
    tell(child, &note, 1);
}

static void live(struct child *child)
{
    open_child(child);
    for (;;) {
        int adapter = (int)pick(ADAPTERS);

        switch (pick(12)) {
        case 0:
        case 1:
        case 2:
            do_publish(child, adapter, false);
            break;
        case 3:
            do_rollback(child, adapter);
            break;
        case 4:
            do_record(child, adapter);
            break;
        case 5:
            if (pick(4) == 0)
                do_delete(child, adapter);
            break;
        case 6:
            if (pick(4) == 0)
                do_publish(child, adapter, true);
            break;
        case 7:
            if (child->store->ops->tend(child->store) < 0)
                die("tend");
            break;
        default:
            do_group(child);
        }
    }
}

/* --- the parent ------------------------------------------------------------------------ */

static int64_t current_of(claas_store_t *store, int adapter)
{
    struct claas_store_answer answer;
    int64_t version = -1;
    int rc =
        fixture_call(store, CLAAS_STORE_ADAPTER_RESOLVE, &answer, "{\"name\":\"u/%d\"}", adapter);

    if (rc == 0) {
        struct adapter_facts facts;
        const char *directory = "";

        claas_json_get_int(answer.body, "version", 0, 1000000, &version);
        claas_json_get_string(answer.body, "directory", &directory);
        assert_int_equal(adapter_check(directory, false, &facts), 0);
    } else {
        assert_int_equal(rc, CLAAS_ERR_NOT_FOUND);
    }
    claas_store_answer_done(&answer);
    return version;
}

/* "" when there is none. */
static void job_state(claas_store_t *store, const char *job, char state[17])
{
    struct claas_store_answer answer;
    const char *text = "";
    int rc = fixture_call(store, CLAAS_STORE_JOB_GET, &answer, "{\"job_id\":\"%s\"}", job);

    assert_true(rc == 0 || rc == CLAAS_ERR_NOT_FOUND);
    if (rc == 0)
        claas_json_get_string(claas_json_get(answer.body, "job"), "state", &text);
    snprintf(state, 17, "%s", text);
    claas_store_answer_done(&answer);
}

/* Acknowledged feedback: its key is known, that is, sending it again gives the old job. */
static void check_key(claas_store_t *store, const char *key)
{
    struct claas_store_answer answer;
    bool duplicate = false;

    /* The adapter may be gone and the body differs: a known key is a conflict then, an unknown one
     * anything else. */
    int rc = fixture_call(store, CLAAS_STORE_FEEDBACK_PUT, &answer,
                          "{\"requests\":[{\"lora_id\":\"u/none\",\"response_id\":\"first\","
                          "\"feedback\":\"?\"}],\"idempotency_key\":\"%s\"}",
                          key);

    if (rc == 0)
        claas_json_get_bool(answer.body, "duplicate", &duplicate);
    claas_store_answer_done(&answer);
    store->ops->abort(store);
    if (rc != CLAAS_ERR_CONFLICT)
        fail_msg("acknowledged feedback %s is lost (%d)", key, rc);
}

/* An answer is there when it cannot be stored again. */
static void check_rollout(claas_store_t *store, const char *id)
{
    int rc = fixture_rollout(store, id, NULL, "q", "text", 1);

    store->ops->abort(store);
    if (rc != CLAAS_ERR_EXISTS)
        fail_msg("acknowledged answer %s is lost (%d)", id, rc);
}

static bool is_version_directory(const struct dirent *entry)
{
    return entry->d_name[0] == 'v';
}

/* Every directory that has a version's name is a whole version. */
static void check_directories(const char *data)
{
    CLAAS_AUTO_FREE char *user = claas_format("%s/adapters/u", data);
    DIR *names = opendir(user);
    struct dirent *name, *version;

    while (names && (name = readdir(names)) != NULL) {
        CLAAS_AUTO_FREE char *path = claas_format("%s/%s", user, name->d_name);
        DIR *versions = name->d_name[0] == '.' ? NULL : opendir(path);

        while (versions && (version = readdir(versions)) != NULL) {
            CLAAS_AUTO_FREE char *directory = claas_format("%s/%s", path, version->d_name);
            struct adapter_facts facts;

            if (is_version_directory(version) && adapter_check(directory, false, &facts) < 0)
                fail_msg("%s", claas_error_text());
        }
        if (versions)
            closedir(versions);
    }
    if (names)
        closedir(names);
}

/* Takes the notes into the model; `open` gets the one change that was announced and not
 * acknowledged, per kind. */
static void read_notes(struct model *model, int fd, struct note *last, size_t *first_key,
                       size_t *first_end, size_t *first_rollout)
{
    struct note note;
    ssize_t n;

    *first_key = model->key_count;
    *first_end = model->ended_count;
    *first_rollout = model->rollout_count;
    memset(last, 0, sizeof(*last));
    last->acknowledged = 1;
    while ((n = read(fd, &note, sizeof(note))) == sizeof(note)) {
        if (note.action == START)
            continue;
        if (note.action != FEEDBACK && note.action != ROLLOUT)
            *last = note;
        if (!note.acknowledged)
            continue;
        assert_true(model->key_count < JOBS_MAX && model->ended_count < JOBS_MAX &&
                    model->rollout_count < JOBS_MAX);
        if (note.action == FEEDBACK)
            memcpy(model->keys[model->key_count++], note.key, sizeof(note.key));
        else if (note.action == ROLLOUT)
            memcpy(model->rollouts[model->rollout_count++], note.key, sizeof(note.key));
        else if (note.action != RECORD)
            model->current[note.adapter] = note.version;
        if (note.job[0])
            memcpy(model->ended[model->ended_count++], note.job, sizeof(note.job));
    }
    assert_true(n == 0);
}

/* An unacknowledged change of the pointer may have happened or not. */
static void settle(struct model *model, claas_store_t *store, const struct note *last)
{
    for (int i = 0; i < ADAPTERS; i++) {
        int64_t found = current_of(store, i);

        if (found == model->current[i])
            continue;
        if (last->acknowledged || last->adapter != i)
            fail_msg("adapter %d: version %d instead of %d", i, (int)found, (int)model->current[i]);
        if (last->action == PUBLISH)
            assert_true(found == 0 || found > model->current[i]);
        else
            assert_int_equal(found, last->version);
        model->current[i] = found;
    }
}

/* Old entries are looked at by chance, those of this round all. */
static void verify(struct model *model, const char *data, const struct note *last, size_t first_key,
                   size_t first_end, size_t first_rollout)
{
    struct claas_store_options options = fixture_options(data);
    claas_store_t *store = NULL;
    char state[17];

    options.keep_versions = 4;
    options.keep_moments = 1;
    if (claas_store_open_sqlite(&options, &store) < 0)
        fail_msg("start after kill: %s", claas_error_text());
    settle(model, store, last);
    for (size_t i = 0; i < model->key_count; i++)
        if (i >= first_key || pick(16) == 0)
            check_key(store, model->keys[i]);
    for (size_t i = 0; i < model->rollout_count; i++)
        if (i >= first_rollout || pick(16) == 0)
            check_rollout(store, model->rollouts[i]);
    for (size_t i = 0; i < model->ended_count; i++) {
        if (i < first_end && pick(16) != 0)
            continue;
        job_state(store, model->ended[i], state);
        if (strcmp(state, "done") != 0 && strcmp(state, "rejected") != 0)
            fail_msg("job %s should have ended, it is '%s'", model->ended[i], state);
    }
    check_directories(data);
    store->ops->close(&store);
}

static void run_round(struct model *model, const char *data, int round)
{
    struct timespec life = {0, (long)(1 + pick(RUN_US)) * 1000};
    size_t first_key, first_end, first_rollout;
    struct note last;
    int ends[2], status;
    pid_t pid;

    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    fcntl(ends[1], F_SETPIPE_SZ, 1 << 20);
    pid = fork();
    if (pid == 0) {
        struct child child = {.data = data, .pipe = ends[1], .number = round};

        close(ends[0]);
        memcpy(child.current, model->current, sizeof(child.current));
        counter += (uint64_t)round << 32; /* other numbers than the parent's */
        live(&child);
    }
    close(ends[1]);
    /* Most lives count from the end of the start; the others end in it. The first start may finish:
     * an empty directory has nothing to lose. */
    if (round == 0 || pick(4) != 0)
        assert_int_equal(read(ends[0], &last, sizeof(last)), sizeof(last));
    nanosleep(&life, NULL);
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (!WIFSIGNALED(status))
        fail_msg("the child ended by itself: %d", WEXITSTATUS(status));
    read_notes(model, ends[0], &last, &first_key, &first_end, &first_rollout);
    close(ends[0]);
    verify(model, data, &last, first_key, first_end, first_rollout);
}

static void test_kill(void **ret)
{
    CLAAS_AUTO(fixture_remove) char *data = fixture_directory();
    struct model model = {
        .keys = claas_alloc(JOBS_MAX, sizeof(*model.keys)),
        .ended = claas_alloc(JOBS_MAX, sizeof(*model.ended)),
        .rollouts = claas_alloc(JOBS_MAX, sizeof(*model.rollouts)),
    };
    const char *text = getenv("CLAAS_TEST_SEED");
    int round = 0;

    (void)ret;
    seed = text ? strtoull(text, NULL, 10) : 20260101;
    for (int i = 0; i < ADAPTERS; i++)
        model.current[i] = -1;
    while (round < ROUNDS_MIN || (round < ROUNDS_MAX && (model.key_count < KEYS_WANTED ||
                                                         model.ended_count < ENDS_WANTED)))
        run_round(&model, data, round++);
    print_message("%d kills: %zu feedbacks, %zu answers, %zu ends acknowledged, all there\n", round,
                  model.key_count, model.rollout_count, model.ended_count);
    assert_true(model.key_count >= KEYS_WANTED && model.ended_count >= ENDS_WANTED);
    free(model.keys);
    free(model.ended);
    free(model.rollouts);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_kill)};

    /* What a killed process wrote is in the page cache, on whatever file system: take the one
     * without a disk's waits, for more changes per life. */
    if (access("/dev/shm", W_OK) == 0)
        setenv("TMPDIR", "/dev/shm", 0);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
