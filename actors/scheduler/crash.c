/* A trainer that crashes in another process than storage's leaves a marker (claas serve writes it),
 * which counts against the jobs that ran there. If the scheduler lived on, it looks for the marker
 * when the trainer does not answer; if it crashed with the trainer, at its next start, before any
 * cycle begins. kill -9 leaves no marker and counts for nothing. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "scheduler_internal.h"

#define AT_ONCE 64 /* jobs of one JOB_RECORD */
/* A marker from the future says nothing (the clock was set back), and storage may record what was
 * on its way at the crash a moment after it: within this slack both count. */
#define SLACK_MS 1000
#define TICK_MS  10 /* a file's time is that of the kernel's last tick */

struct marker {
    int64_t unix_ms;
    char text[128]; /* "the trainer crashed while it worked (signal 11)" */
};

static char *marker_path(const struct scheduler *scheduler)
{
    return claas_format("%s/" CLAAS_CRASH_MARKER_TRAINER,
                        claas_config_string(scheduler->config, "data"));
}

static bool read_marker(const struct scheduler *scheduler, struct marker *ret)
{
    CLAAS_AUTO_FREE char *path = marker_path(scheduler);
    CLAAS_AUTO_FREE char *how = NULL;
    struct stat status;

    if (!path || stat(path, &status) < 0 ||
        claas_file_read(path, CLAAS_CRASH_MARKER_MAX, &how, NULL) < 0)
        return false;
    ret->unix_ms = (int64_t)status.st_mtim.tv_sec * 1000 + status.st_mtim.tv_nsec / 1000000;
    if (ret->unix_ms > claas_clock_unix_ms() + SLACK_MS)
        return false;
    how[strcspn(how, "\r\n")] = '\0';
    snprintf(ret->text, sizeof(ret->text), "the trainer crashed while it worked (%s)",
             claas_utf8_valid(how, strlen(how)) ? how : "unknown");
    return true;
}

bool crash_since(const struct scheduler *scheduler, int64_t unix_ms, char *ret_text, size_t size)
{
    struct marker marker;

    if (!read_marker(scheduler, &marker) || marker.unix_ms + TICK_MS < unix_ms)
        return false;
    snprintf(ret_text, size, "%s", marker.text);
    return true;
}

/* --- at the start ----------------------------------------------------------------------------- */

static bool has_run(const cJSON *json, int64_t until_ms)
{
    const char *state = "";
    int64_t updated = INT64_MAX;

    claas_json_get_string(json, "state", &state);
    claas_json_get_int(json, "updated", 0, (int64_t)1 << 53, &updated);
    return updated <= until_ms &&
           (strcmp(state, "batched") == 0 || strcmp(state, "training") == 0 ||
            strcmp(state, "gating") == 0 || strcmp(state, "publishing") == 0);
}

void crash_note(struct scheduler *scheduler, const cJSON *page)
{
    const cJSON *json;

    if (!scheduler->crash_jobs)
        scheduler->crash_jobs = cJSON_CreateArray();
    cJSON_ArrayForEach(json, page)
    {
        if (has_run(json, INT64_MAX - 1))
            cJSON_AddItemToArray(scheduler->crash_jobs, cJSON_Duplicate(json, true));
    }
}

static int find_jobs(struct scheduler *scheduler, int64_t until_ms, struct job **ret,
                     int64_t *ret_strikes)
{
    const cJSON *json;
    int count = 0;

    cJSON_ArrayForEach(json, scheduler->crash_jobs)
    {
        const char *id = "";
        struct job *job;

        if (count == AT_ONCE || !has_run(json, until_ms))
            continue;
        claas_json_get_string(json, "job_id", &id);
        claas_json_get_int(json, "strikes", 0, 1000, ret_strikes); /* of one, where it matters */
        job = job_find(scheduler, id);
        if (job)
            ret[count++] = job;
    }
    return count;
}

/* The list is read again, whatever came of it: it says what was recorded. */
static void counted(struct scheduler *scheduler, void *arg, int error, const char *text,
                    const cJSON *reply)
{
    (void)arg;
    (void)text;
    (void)reply;
    if (error && !scheduler->loading) {
        jobs_load_later(scheduler);
        return;
    }
    scheduler->crash_many = scheduler->crash_many || !error;
    jobs_load(scheduler);
}

/* The strikes of all, or the end of one that ran alone and has too many: no later crash would
 * say more. */
static int record_crash(struct scheduler *scheduler, struct job *const *jobs, int count, bool park,
                        const char *text)
{
    cJSON *event = cJSON_CreateObject();
    cJSON *result = park ? cJSON_CreateObject() : NULL;

    claas_json_set_string(event, "kind", park ? "state" : "error");
    claas_json_set_string(event, "error", text);
    if (park) {
        claas_json_set_string(event, "code", claas_err_name(CLAAS_ERR_INTERNAL));
        claas_json_set_string(result, "error", text);
    }
    return record_jobs(scheduler, jobs, count,
                       &(struct record){.state = park ? "failed" : "queued",
                                        .event = event,
                                        .result = result,
                                        .failure = true,
                                        .done = counted});
}

/* Jobs that a kill, or a crash already counted, left recorded as being in a cycle: they wait, and
 * must not get a strike for the next crash. Where that cannot be recorded, they wait all the
 * same. */
static void requeue(struct scheduler *scheduler)
{
    const cJSON *json;

    cJSON_ArrayForEach(json, scheduler->crash_jobs)
    {
        const char *id = "";
        struct job *job;

        claas_json_get_string(json, "job_id", &id);
        job = job_find(scheduler, id);
        if (job && !job->run)
            record_waits(scheduler, job, "");
    }
}

bool crash_count(struct scheduler *scheduler)
{
    CLAAS_AUTO_FREE char *path = marker_path(scheduler);
    int64_t retries = claas_config_int(scheduler->config, "cycle.retries"), strikes = 0;
    struct job *jobs[AT_ONCE];
    struct marker marker;
    int count = 0;

    if (read_marker(scheduler, &marker))
        count = find_jobs(scheduler, marker.unix_ms + SLACK_MS, jobs, &strikes);
    if (count == 0) {
        if (path && unlink(path) < 0 && errno != ENOENT)
            claas_warning("%s: %s", path, strerror(errno));
        requeue(scheduler);
        return false;
    }
    claas_warning("%s: a strike for %d jobs", marker.text, count);
    if (record_crash(scheduler, jobs, count,
                     count == 1 && !scheduler->crash_many && strikes + 1 >= retries,
                     marker.text) < 0)
        jobs_load_later(scheduler);
    return true;
}
