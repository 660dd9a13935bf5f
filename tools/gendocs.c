/* Writes what in docs/ comes from the program's own tables, so that it cannot disagree with them:
 *
 *   gendocs DOCS          docs/configuration.md, docs/claas.sample.yaml, the marked part of
 *                         docs/protocol.md
 *   gendocs --check DOCS  writes nothing, ends with 1 if one of them is out of date */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/buf.h"
#include "claas/config.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "claas/message.h"

#define DOCUMENT_MAX (4 << 20)

static const char begin_mark[] = "<!-- generated: messages -->\n";
static const char end_mark[] = "<!-- end -->";

typedef void print_fn(FILE *file);

/* What a print function writes, as a string; NULL when out of memory. */
static char *print_to_text(print_fn *print)
{
    char *text = NULL;
    size_t length = 0;
    FILE *file = open_memstream(&text, &length);

    if (!file)
        return NULL;
    print(file);
    return fclose(file) == 0 ? text : NULL;
}

static void print_configuration(FILE *file)
{
    fputs("# Configuration\n\n"
          "Made from `include/claas/config.def` by `gendocs`; change it there.\n\n"
          "Settings come from the built-in defaults, the YAML file of `--config`, the environment "
          "and the command line; a later one of these wins. On the command line `--set key=value` "
          "is for all of them; `--listen`, `--data`, `--model`, `--device` (for `device.name`), "
          "`--chat-template`, `--roles` and `--connect` are short forms. `claas.sample.yaml` has "
          "all settings with their defaults.\n\n"
          "An error in a file is reported with file, line and column, and a misspelt key with the "
          "key that was probably meant; a wrong address (`listen`, `connect`), or a value that is "
          "wrong only together with another one, with the setting's name alone. The exit code is 2 "
          "either way, before a model is read.\n\n"
          "Sizes: `64MiB`, `1GiB`. Durations: `50ms`, `30s`, `5m`, `12h`, `30d`. Lists: separated "
          "by commas.\n\n",
          file);
    claas_config_print_markdown(file);
}

/* Writes `text` if the file has another; with `check` only tells. Returns 1 if they differ. */
static int put(const char *path, const char *text, bool check)
{
    CLAAS_AUTO_FREE char *old = NULL;
    size_t length = 0;
    int rc = claas_file_read(path, DOCUMENT_MAX, &old, &length);

    if (rc < 0 && rc != CLAAS_ERR_NOT_FOUND)
        return rc;
    if (rc == 0 && strcmp(old, text) == 0)
        return 0;
    if (check) {
        fprintf(stderr,
                "%s is out of date: run `ninja -C build gendocs && build/tools/gendocs "
                "docs`\n",
                path);
        return 1;
    }
    rc = claas_file_write(path, text, strlen(text));
    return rc < 0 ? rc : 1;
}

static int put_whole(const char *directory, const char *name, print_fn *print, bool check)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, name);
    CLAAS_AUTO_FREE char *text = print_to_text(print);

    if (!path || !text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return put(path, text, check);
}

/* Replaces what stands between the marks. */
static int put_section(const char *directory, const char *name, print_fn *print, bool check)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, name);
    CLAAS_AUTO_FREE char *text = print_to_text(print);
    CLAAS_AUTO_FREE char *old = NULL;
    CLAAS_AUTO_FREE char *whole = NULL;
    const char *begin, *end;
    size_t length = 0;
    int rc;

    if (!path || !text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = claas_file_read(path, DOCUMENT_MAX, &old, &length);
    if (rc < 0)
        return rc;
    begin = strstr(old, begin_mark);
    end = begin ? strstr(begin, end_mark) : NULL;
    if (!end)
        return claas_fail(CLAAS_ERR_FORMAT, "%s has no part marked '%.*s' … '%s'", path,
                          (int)strlen(begin_mark) - 1, begin_mark, end_mark);
    begin += strlen(begin_mark);
    whole = claas_format("%.*s%s%s", (int)(begin - old), old, text, end);
    return whole ? put(path, whole, check) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

int main(int argc, char **argv)
{
    bool check = argc == 3 && strcmp(argv[1], "--check") == 0;
    const char *directory = argv[argc - 1];
    int results[3];
    bool differs = false;

    if (argc != 2 && !check) {
        fprintf(stderr, "usage: gendocs [--check] DOCS\n");
        return 64;
    }
    results[0] = put_whole(directory, "configuration.md", print_configuration, check);
    results[1] = put_whole(directory, "claas.sample.yaml", claas_config_print_sample, check);
    results[2] = put_section(directory, "protocol.md", claas_catalogue_print_markdown, check);
    for (size_t i = 0; i < CLAAS_COUNT(results); i++) {
        if (results[i] < 0) {
            fprintf(stderr, "gendocs: %s\n", claas_error_text());
            return 1;
        }
        differs = differs || results[i] > 0;
    }
    return check && differs ? 1 : 0;
}
