/* Putting a serving process together: see process.h. */
#include "process.h"

#include <stdio.h>
#include <string.h>

#include "claas/chat_template.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "load_progress.h"

static const struct claas_actor_class *const roles[] = {
    &claas_storage_class,   &claas_trainer_class, &claas_sampler_class,
    &claas_scheduler_class, &claas_bridge_class,
};

static bool is_role(const char *name)
{
    for (size_t i = 0; i < CLAAS_COUNT(roles); i++)
        if (strcmp(roles[i]->name, name) == 0)
            return true;
    return false;
}

int process_check_roles(const struct process *process)
{
    const char *name = claas_config_list_at(process->config, "roles", 0);

    if (!name)
        return claas_fail(CLAAS_ERR_INVALID, "roles: a process without any has nothing to do");
    for (size_t i = 0; (name = claas_config_list_at(process->config, "roles", i)); i++)
        if (!is_role(name))
            return claas_fail(CLAAS_ERR_INVALID,
                              "roles: '%s' is not bridge, storage, scheduler, trainer or sampler",
                              claas_quote(name).text);
    return 0;
}

bool process_has_role(const struct process *process, const char *role)
{
    return claas_config_list_has(process->config, "roles", role);
}

int process_open_device(struct process *process)
{
    const claas_config_t *config = process->config;
    const char *template_name = claas_config_string(config, "chat_template");
    struct claas_model_options model = {
        .path = claas_config_string(config, "model"),
        .chat_template = template_name[0] ? template_name : NULL,
    };
    struct claas_device_options device = {
        .device = claas_config_string(config, "device.name"),
        .precision = claas_config_string(config, "device.precision"),
        .threads = (int)claas_config_int(config, "device.threads"),
        .kv_tokens = (size_t)claas_config_int(config, "device.kv_tokens"),
        .warm = true,
        .prefill_chunk = (int)claas_config_int(config, "device.prefill_chunk"),
        .max_batch = (int)claas_config_int(config, "device.max_batch"),
        .slice_ms = (int)claas_config_int(config, "device.slice"),
    };
    int64_t host_cache_mb = claas_config_int(config, "device.host_cache_mb");
    const char *warning;
    int rc;

    device.host_cache = host_cache_mb > 0 ? host_cache_mb << 20 : host_cache_mb;
    rc = claas_model_open(&model, &process->model);
    if (rc < 0)
        return rc;
    warning = claas_chat_template_warning(claas_model_chat_template(process->model));
    if (warning)
        claas_warning("%s", warning);
    rc = load_progress_open(&device, process->model, &process->device);
    if (rc == 0)
        claas_model_release_weights(process->model);
    return rc;
}

static int start_actor(struct process *process, const struct claas_actor_class *actor_class,
                       const void *args)
{
    const char *role = actor_class->name;
    char name[64];
    bool numbered = strcmp(role, "trainer") == 0 || strcmp(role, "sampler") == 0;

    if (!process_has_role(process, role))
        return 0;
    snprintf(name, sizeof(name), numbered ? "%s.0" : "%s", role);
    return claas_runtime_start(process->runtime, actor_class, name, args);
}

int process_start_actors(struct process *process)
{
    const claas_config_t *config = process->config;
    int rc;

    process->storage = (struct claas_storage_args){.config = config};
    process->trainer = (struct claas_trainer_args){config, process->device};
    process->sampler = (struct claas_sampler_args){config, process->device};
    process->scheduler = (struct claas_scheduler_args){config};
    process->bridge = (struct claas_bridge_args){.config = config, .ret_port = &process->port};
    rc = start_actor(process, &claas_storage_class, &process->storage);
    if (rc == 0)
        rc = start_actor(process, &claas_trainer_class, &process->trainer);
    if (rc == 0)
        rc = start_actor(process, &claas_sampler_class, &process->sampler);
    if (rc == 0)
        rc = start_actor(process, &claas_scheduler_class, &process->scheduler);
    if (rc == 0)
        rc = start_actor(process, &claas_bridge_class, &process->bridge);
    return rc;
}

bool process_done(struct process *process)
{
    if (!claas_runtime_free(&process->runtime))
        return false;
    claas_device_free(&process->device);
    claas_model_free(&process->model);
    claas_config_free(&process->config);
    return true;
}
