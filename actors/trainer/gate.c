/* The gate's figures: of the base once, of a candidate after each step. Two parts run side by side
 * on the device: an evaluation of fixed texts (neutral sentences, the base's own answers, the
 * teacher's held-out answers) and fresh answers of the candidate. */
#include <math.h>
#include <stdlib.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "cycle.h"

#define GATE_ROWS_MAX (PROBE_SENTENCES + PROBE_QUESTIONS + 2 * CYCLE_HELD_OUT)

static int evaluate(struct trainer *trainer, const struct claas_train_row *rows, size_t count,
                    device_call_fn *fn, void *arg)
{
    struct claas_train_request request = {
        .rows = rows,
        .row_count = count,
        .loss = {.variant = CLAAS_LOSS_FULL},
        .update = false,
    };
    uint64_t id;
    int rc = claas_device_train(trainer->client, &request, &id);

    return rc < 0 ? rc : device_call_add(trainer, id, fn, arg);
}

/* --- the base --------------------------------------------------------------------------------- */

struct probe_waiter {
    struct probe_waiter *next;
    base_measured_fn *done;
    void *arg;
};

static void base_done(struct trainer *trainer, int error, const char *text)
{
    struct probe_waiter *waiter = trainer->probes->waiters;

    trainer->probes->waiters = NULL;
    trainer->probes->measuring = false;
    trainer->probes->measured = error == 0;
    while (waiter) {
        struct probe_waiter *next = waiter->next;

        waiter->done(trainer, waiter->arg, error, text);
        free(waiter);
        waiter = next;
    }
}

static void base_evaluated(struct trainer *trainer, void *arg, struct claas_device_event *event)
{
    struct probes *probes = arg;

    if (event->kind != CLAAS_EVENT_TRAINED) {
        base_done(trainer, event->error, event->text);
        return;
    }
    probes_read_rows(event->trained.rows, event->trained.row_count, &probes->base);
    probes->base.kl = 0;
    probes_read_answers(probes, probes->base_answers, &probes->base);
    base_done(trainer, 0, NULL);
}

static void base_answered(struct trainer *trainer, void *arg, int error, const char *text)
{
    struct probes *probes = arg;
    struct claas_train_row rows[GATE_ROWS_MAX];
    size_t count;
    int rc;

    if (error) {
        base_done(trainer, error, text);
        return;
    }
    count = probes_rows(probes, NULL, rows);
    rc = evaluate(trainer, rows, count, base_evaluated, probes);
    if (rc < 0)
        base_done(trainer, rc, claas_error_text());
}

int base_figures_measure(struct trainer *trainer, base_measured_fn *done, void *arg)
{
    struct probes *probes = trainer->probes;
    struct probe_waiter *waiter;
    int rc = 0;

    if (probes->measured) {
        done(trainer, arg, 0, NULL);
        return 0;
    }
    waiter = CLAAS_NEW(struct probe_waiter);
    if (!waiter)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (!probes->measuring) { /* a measurement goes on even if all its waiters went away */
        generations_free(&probes->base_answers);
        rc = probes_generations(probes, NULL, base_answered, probes, &probes->base_answers);
        if (rc == 0)
            rc = generations_start(probes->base_answers);
    }
    if (rc < 0) {
        free(waiter);
        return rc;
    }
    probes->measuring = true;
    *waiter = (struct probe_waiter){probes->waiters, done, arg};
    probes->waiters = waiter;
    return 0;
}

void base_figures_forget(struct trainer *trainer, void *arg)
{
    struct probe_waiter **link = trainer->probes ? &trainer->probes->waiters : NULL;

    while (link && *link) {
        struct probe_waiter *waiter = *link;

        if (waiter->arg == arg) {
            *link = waiter->next;
            free(waiter);
        } else {
            link = &waiter->next;
        }
    }
}

/* --- a candidate ------------------------------------------------------------------------------ */

static void part_done(struct cycle *cycle)
{
    struct cycle_step *step = cycle->step;

    if (--step->gate_parts > 0)
        return;
    claas_json_set(step->reply, "gate", gate_figures_json(&step->figures));
    claas_json_set_number(cJSON_GetObjectItemCaseSensitive(step->reply, "metadata"), "gate_ms",
                          cycle_step_lap(step));
    cycle_step_reply(cycle);
}

/* KL(teacher || candidate) on the held-out answers: the mean over the tokens of the new feedback's,
 * and over those of the earlier feedback's, both counting the same, so that what was learnt before
 * is not traded for the new. */
static void set_score(struct cycle *cycle, const struct claas_train_row_result *rows, size_t count)
{
    double sum[2] = {0, 0}, score = 0;
    int tokens[2] = {0, 0}, groups = 0;

    for (size_t i = 0; i < count; i++) {
        int group = cycle->held_out[i].replay;

        sum[group] += (double)rows[i].forward_kl * rows[i].tokens;
        tokens[group] += rows[i].tokens;
    }
    for (int group = 0; group < 2; group++) {
        if (tokens[group] > 0) {
            score += sum[group] / tokens[group];
            groups++;
        }
    }
    if (groups > 0 && isfinite(score))
        claas_json_set_number(cycle->step->reply, "score", score / groups);
}

static void evaluated(struct trainer *trainer, void *arg, struct claas_device_event *event)
{
    struct cycle *cycle = arg;
    size_t fixed = PROBE_SENTENCES + PROBE_QUESTIONS;

    (void)trainer;
    if (event->kind != CLAAS_EVENT_TRAINED) {
        cycle_step_fail(cycle, event->error, event->text);
        return;
    }
    probes_read_rows(event->trained.rows, fixed, &cycle->step->figures);
    set_score(cycle, event->trained.rows + fixed, event->trained.row_count - fixed);
    part_done(cycle);
}

static void answered(struct trainer *trainer, void *arg, int error, const char *text)
{
    struct cycle *cycle = arg;

    if (error) {
        cycle_step_fail(cycle, error, text);
        return;
    }
    probes_read_answers(trainer->probes, cycle->step->answers, &cycle->step->figures);
    part_done(cycle);
}

int cycle_gate_start(struct cycle *cycle)
{
    struct trainer *trainer = cycle->trainer;
    struct cycle_step *step = cycle->step;
    struct claas_train_row rows[GATE_ROWS_MAX];
    size_t count = probes_rows(trainer->probes, cycle->adapter, rows);
    int rc;

    for (size_t i = 0; i < cycle->held_out_count; i++)
        rows[count++] = (struct claas_train_row){
            .student_prompt = cycle->held_out[i].student_prompt,
            .student_count = cycle->held_out[i].student_count,
            .teacher_prompt = cycle->held_out[i].teacher_prompt,
            .teacher_count = cycle->held_out[i].teacher_count,
            .response = cycle->held_out[i].tokens,
            .response_count = cycle->held_out[i].count,
            .student = cycle->adapter,
        };
    step->gate_parts = 2;
    rc = probes_generations(trainer->probes, cycle->adapter, answered, cycle, &step->answers);
    if (rc == 0)
        rc = generations_start(step->answers);
    if (rc == 0)
        rc = evaluate(trainer, rows, count, evaluated, cycle);
    return rc;
}
