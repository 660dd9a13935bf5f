/* Adapters as files: the export is a zip that storage has written, handed out from its descriptor;
 * an import is written to the staging folder as it arrives, then given to the trainer. Neither is
 * ever in memory whole. */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "claas/config.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "claas/random.h"
#include "errors.h"
#include "lora.h"
#include "request.h"
#include "schema.h"

#define EXPORT_MS 120000

/* --- export --- */

/* attachment; filename="user__name.zip": "/" as "__", then everything but word characters, dot and
 * dash as "_". */
static char *disposition(const char *lora_id)
{
    struct claas_buf text;

    claas_buf_init(&text, 4096);
    claas_buf_add_text(&text, "attachment; filename=\"");
    for (const char *c = lora_id; *c; c++) {
        bool plain = isalnum((unsigned char)*c) || strchr("_.-", *c);

        if (*c == '/')
            claas_buf_add_text(&text, "__");
        else
            claas_buf_add(&text, plain ? c : "_", 1);
    }
    claas_buf_add_text(&text, ".zip\"");
    return claas_buf_take(&text, NULL);
}

static int answer_file(struct request *request, const char *path, const char *lora_id)
{
    CLAAS_AUTO_FREE char *name = disposition(lora_id);
    struct MHD_Response *response;
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    unlink(path); /* nobody else needs it; the descriptor keeps the file */
    if (fd < 0)
        return claas_fail_errno("LoRA export failed");
    if (fstat(fd, &status) < 0) {
        close(fd);
        return claas_fail_errno("LoRA export failed");
    }
    response = MHD_create_response_from_fd64((uint64_t)status.st_size, fd);
    if (!response) {
        close(fd);
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, "application/zip");
    if (name)
        request_header(request, MHD_HTTP_HEADER_CONTENT_DISPOSITION, name);
    request_answer(request, MHD_HTTP_OK, response);
    return 0;
}

static int exported(struct request *request, claas_message_t *reply, void *arg)
{
    const char *lora_id = "", *path = "";
    int rc = request_query(request, "lora_id", &lora_id);

    (void)arg;
    if (rc < 0 || reply->kind == CLAAS_KIND_PROGRESS)
        return rc;
    if (reply->error && claas_err_http_status(reply->error) >= 500)
        return claas_fail(reply->error, "LoRA export failed: %s", reply->error_text);
    if (reply->error)
        return claas_fail(reply->error, "%s", reply->error_text);
    claas_json_get_string(reply->body, "path", &path);
    return answer_file(request, path, lora_id);
}

/* False when it is neither: the request is answered then. */
static bool read_optimizer(struct request *request, const char *text, bool *ret)
{
    static const struct schema_place query = {NULL, "query", 0};
    const struct schema_place place = {&query, "optimizer", 0};
    cJSON *faults;

    *ret = text && (strcmp(text, "true") == 0 || strcmp(text, "1") == 0);
    if (!text || *ret || strcmp(text, "false") == 0 || strcmp(text, "0") == 0)
        return true;
    faults = cJSON_CreateArray();
    schema_fault(faults, &place, "bool_parsing", "Input should be true or false");
    request_fail_schema(request, faults);
    return false;
}

int route_lora_export(struct request *request)
{
    const char *lora_id, *text;
    bool optimizer;
    cJSON *body;
    int rc = request_query(request, "optimizer", &text);

    if (rc < 0)
        return rc;
    if (lora_id_query(request, &lora_id) < 0 || !read_optimizer(request, text, &optimizer) ||
        request_take_share(request, lora_id) < 0)
        return 0;
    body = cJSON_CreateObject();
    claas_json_set_string(body, "lora_id", lora_id);
    if (optimizer)
        claas_json_set_bool(body, "optimizer", true);
    return request_ask(request, &(struct request_ask){
                                    .to = "storage",
                                    .type = CLAAS_MSG_ADAPTER_EXPORT,
                                    .body = body,
                                    .timeout_ms = EXPORT_MS,
                                    .reply = exported,
                                    .sees_errors = true,
                                });
}

/* --- import --- */

struct upload {
    int fd;
    char *path; /* NULL once the trainer has it */
};

static void upload_free(void *state)
{
    struct upload *upload = state;

    if (upload->fd >= 0)
        close(upload->fd);
    if (upload->path)
        unlink(upload->path);
    free(upload->path);
    free(upload);
}

static int check_type(struct request *request)
{
    static const char *const types[] = {"application/zip", "application/octet-stream",
                                        "application/x-zip-compressed"};
    const char *type = request_header_in(request, MHD_HTTP_HEADER_CONTENT_TYPE);
    size_t length = type ? strcspn(type, "; \t") : 0;

    if (!type)
        return 0;
    for (size_t i = 0; i < CLAAS_COUNT(types); i++) {
        if (strlen(types[i]) == length && strncasecmp(type, types[i], length) == 0)
            return 0;
    }
    request_fail_status(request, MHD_HTTP_UNSUPPORTED_MEDIA_TYPE,
                        "Content-Type must be application/zip or application/octet-stream", NULL,
                        NULL);
    return -1;
}

static int upload_open(struct request *request)
{
    CLAAS_AUTO_FREE char *staging =
        claas_format("%s/staging", claas_config_string(request->server->config, "data"));
    struct upload *upload = CLAAS_NEW(struct upload);
    char hex[17];
    int rc;

    if (!upload || !staging) {
        free(upload);
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    upload->fd = -1;
    request->state = upload;
    request->state_free = upload_free;
    rc = claas_mkdir_all(staging);
    if (rc < 0)
        return claas_fail(rc, "upload: there is no staging folder"); /* without its path */
    claas_random_hex(hex, 8);
    upload->path = claas_format("%s/upload-%s.zip", staging, hex);
    if (!upload->path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    upload->fd = open(upload->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (upload->fd < 0)
        return claas_fail_errno("upload");
    return 0;
}

int take_lora_import(struct request *request, const char *data, size_t length)
{
    struct upload *upload;
    const char *lora_id;
    int rc = 0;

    if (!request->state) {
        if (check_type(request) < 0 || lora_id_query(request, &lora_id) < 0 ||
            request_take_share(request, lora_id) < 0) {
            request->drop_body = true;
            return 0;
        }
        rc = upload_open(request);
    }
    if (rc < 0)
        return rc;
    upload = request->state;
    return claas_fd_write_all(upload->fd, data, length);
}

static int imported(struct request *request, claas_message_t *reply, void *arg)
{
    struct upload *upload = request->state;

    (void)arg;
    if (reply->kind == CLAAS_KIND_PROGRESS)
        return 0;
    /* The trainer has consumed the file by now, whatever came of it. */
    if (reply->error)
        return claas_fail(reply->error, "LoRA import failed: %s", reply->error_text);
    free(CLAAS_TAKE(upload->path));
    request_answer_json(request, MHD_HTTP_OK, cJSON_Duplicate(reply->body, true));
    return 0;
}

int route_lora_import(struct request *request)
{
    struct upload *upload = request->state;
    const char *lora_id;
    cJSON *body;

    if (check_type(request) < 0 || lora_id_query(request, &lora_id) < 0)
        return 0;
    if (!upload)
        return claas_fail(CLAAS_ERR_INVALID, "the body must be a zip of the adapter's files");
    if (close(upload->fd) < 0) {
        upload->fd = -1;
        return claas_fail_errno("upload");
    }
    upload->fd = -1;
    body = cJSON_CreateObject();
    claas_json_set_string(body, "lora_id", lora_id);
    claas_json_set_string(body, "path", upload->path);
    return request_ask(request, &(struct request_ask){
                                    .to = "trainer",
                                    .type = CLAAS_MSG_ADAPTER_IMPORT,
                                    .body = body,
                                    .timeout_ms = LORA_TRAINER_MS,
                                    .reply = imported,
                                    .sees_errors = true,
                                });
}
