/* `claas chat`: the loop for a person in a terminal. What begins with a slash is a command; "/bad"
 * and a few words teach the adapter, and the question is asked again. Works on a pipe as well, a
 * line a turn. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "adapter_calls.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "cli.h"
#include "conversation.h"
#include "teach.h"
#include "verbs.h"

struct chat {
    struct http http;
    struct conversation conversation;
    const char *who;     /* "claas chat" */
    const char *adapter; /* or "base" */
    const char *system, *once, *save_id;
    struct sampling sampling;
    bool interactive; /* stdin is a terminal */
    bool failed, quit;
};

/* --- command line ----------------------------------------------------------------------------- */

enum {
    OPTION_ADAPTER = 'a',
    OPTION_ONCE = 'o',
    OPTION_SYSTEM = 's',
    OPTION_TEMPERATURE = 't',
    OPTION_TOP_P = 256,
    OPTION_MAX_TOKENS,
    OPTION_SEED,
    OPTION_SAVE_ID,
};

static const struct argp_option options[] = {
    {"adapter", OPTION_ADAPTER, "NAME", 0,
     "user/name, made if there is none (default: local/chat); base = no adapter", 0},
    {"once", OPTION_ONCE, "QUESTION", 0, "ask one question, print the answer and end", 0},
    {"system", OPTION_SYSTEM, "TEXT", 0, "system message", 0},
    {"temperature", OPTION_TEMPERATURE, "T", 0, "0 to 2 (default: 0.7)", 0},
    {"top-p", OPTION_TOP_P, "P", 0, "0 to 1", 0},
    {"max-tokens", OPTION_MAX_TOKENS, "N", 0, "longest answer (default: 512)", 0},
    {"seed", OPTION_SEED, "N", 0, "seed of the first answer; each later one adds 1", 0},
    {"save-id", OPTION_SAVE_ID, "FILE", 0, "with --once: the answer's id, for `claas feedback`", 0},
    {0},
};

static error_t take_option(int key, char *value, struct argp_state *state, void *input)
{
    struct chat *chat = input;

    switch (key) {
    case OPTION_ADAPTER:
        chat->adapter = value;
        return 0;
    case OPTION_ONCE:
        chat->once = value;
        return 0;
    case OPTION_SYSTEM:
        chat->system = value;
        return 0;
    case OPTION_TEMPERATURE:
        chat->sampling.temperature = cli_number(state, "--temperature", value, 0, 2);
        return 0;
    case OPTION_TOP_P:
        chat->sampling.top_p = cli_number(state, "--top-p", value, 0, 1);
        return 0;
    case OPTION_MAX_TOKENS:
        chat->sampling.max_tokens = cli_int(state, NULL, "--max-tokens", value, 1, 1000000);
        return 0;
    case OPTION_SEED:
        chat->sampling.seed = cli_int(state, NULL, "--seed", value, 0, 9000000000000000);
        return 0;
    case OPTION_SAVE_ID:
        chat->save_id = value;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* --- commands --------------------------------------------------------------------------------- */

static int complain(struct chat *chat)
{
    chat->failed = true;
    fprintf(stderr, "%s\n", claas_error_text());
    return -1;
}

static bool is_adapter(const struct chat *chat)
{
    return strchr(chat->adapter, '/') != NULL;
}

static int ask(struct chat *chat, const char *text)
{
    int rc = conversation_ask(&chat->conversation, text);

    if (rc == CLAAS_ERR_CANCELLED) {
        fputs("(stopped; the question is taken back)\n", stderr);
        return 0;
    }
    if (rc < 0)
        complain(chat);
    if (rc == CLAAS_ERR_INVALID && chat->interactive)
        fputs("(/new begins a new conversation)\n", stderr);
    return rc;
}

static void ask_again(struct chat *chat)
{
    CLAAS_AUTO_FREE char *question = conversation_take_back(&chat->conversation);

    if (!question) {
        claas_fail(CLAAS_ERR_INVALID, "there is no question yet");
        complain(chat);
        return;
    }
    ask(chat, question);
}

/* Feedback on the last answer; when the new version is served, the question is asked again, without
 * the answer that was not liked in front of it. */
static void do_bad(struct chat *chat, const char *words)
{
    CLAAS_AUTO(claas_json_free) cJSON *job = NULL;
    CLAAS_AUTO_FREE char *outcome = NULL;
    char job_id[65];
    bool published;
    int rc = 0;

    if (!is_adapter(chat))
        rc = claas_fail(CLAAS_ERR_INVALID,
                        "the base model learns nothing: start with --adapter user/name");
    else if (!words[0])
        rc = claas_fail(CLAAS_ERR_INVALID, "say what was bad: /bad Answer in one sentence.");
    else if (!chat->conversation.id[0])
        rc = claas_fail(CLAAS_ERR_INVALID, "there is no answer yet");
    if (rc == 0)
        rc = teach_send(&chat->http, chat->adapter, chat->conversation.id, 0, words, job_id);
    if (rc == 0)
        rc = teach_watch(&chat->http, job_id, &job);
    if (rc == CLAAS_ERR_CANCELLED) {
        fprintf(stderr, "(it goes on: claas jobs watch %s)\n", job_id);
        return;
    }
    if (rc < 0) {
        complain(chat);
        return;
    }
    published = teach_outcome(job, &outcome);
    printf("(%s)\n", outcome ? outcome : "");
    if (published)
        ask_again(chat);
    else
        chat->failed = true;
}

static void do_undo(struct chat *chat, const char *words)
{
    int64_t parent = 0;
    int rc = adapter_parent(&chat->http, chat->adapter, &parent);

    (void)words;
    if (rc == 0)
        rc = adapter_rollback(&chat->http, chat->adapter, parent);
    if (rc < 0)
        complain(chat);
    else
        printf("(%s is at version %" PRId64
               " again; what was said stays in this conversation, /new "
               "begins a new one)\n",
               chat->adapter, parent);
}

/* The entry that `words` names: its id, its number in the list, or nothing = the last one. */
static const cJSON *find_standing(const cJSON *list, const char *words)
{
    int count = cJSON_GetArraySize(list);
    const cJSON *entry;
    char *end;
    long number;

    if (!words[0])
        return cJSON_GetArrayItem(list, count - 1);
    cJSON_ArrayForEach(entry, list)
    {
        const char *id = "";

        claas_json_get_string(entry, "id", &id);
        if (strcmp(id, words) == 0)
            return entry;
    }
    number = strtol(words, &end, 10);
    return !*end && number >= 1 && number <= count ? cJSON_GetArrayItem(list, (int)number - 1)
                                                   : NULL;
}

static void do_withdraw(struct chat *chat, const char *words)
{
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    const cJSON *entry = NULL;
    const char *id = "", *text = "";
    int rc = adapter_standing(&chat->http, chat->adapter, &reply);

    if (rc == 0) {
        entry = find_standing(claas_json_get(reply, "feedback"), words);
        if (!entry)
            rc = claas_fail(CLAAS_ERR_NOT_FOUND,
                            words[0] ? "there is no feedback '%s'" : "there is no feedback%s",
                            words);
    }
    if (rc == 0) {
        claas_json_get_string(entry, "id", &id);
        claas_json_get_string(entry, "text", &text);
        rc = adapter_withdraw(&chat->http, chat->adapter, id);
    }
    if (rc < 0)
        complain(chat);
    else
        printf("(withdrawn, no teacher is shown it any more: %s)\n"
               "(what was learnt from it stays until /undo)\n",
               text);
}

static void do_versions(struct chat *chat, const char *words)
{
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;

    (void)words;
    if (adapter_versions(&chat->http, chat->adapter, &reply) < 0 ||
        adapter_print_versions(reply, false) < 0)
        complain(chat);
}

static void do_feedback(struct chat *chat, const char *words)
{
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;

    (void)words;
    if (adapter_standing(&chat->http, chat->adapter, &reply) < 0 ||
        adapter_print_standing(reply, false) < 0)
        complain(chat);
}

static void do_again(struct chat *chat, const char *words)
{
    (void)words;
    ask_again(chat);
}

static void do_new(struct chat *chat, const char *words)
{
    (void)words;
    conversation_clear(&chat->conversation);
    printf("(a new conversation)\n");
}

static void do_quit(struct chat *chat, const char *words)
{
    (void)words;
    chat->quit = true;
}

static void do_help(struct chat *chat, const char *words);

static const struct command {
    const char *name;
    void (*run)(struct chat *chat, const char *words);
    const char *help;
} commands[] = {
    {"/bad", do_bad,
     "/bad WORDS        what was wrong with the last answer: the adapter learns from it"},
    {"/again", do_again, "/again            ask the last question again"},
    {"/new", do_new, "/new              begin a new conversation"},
    {"/undo", do_undo, "/undo             go back to the version before"},
    {"/versions", do_versions, "/versions         list the versions of the adapter"},
    {"/feedback", do_feedback, "/feedback         list the standing feedback"},
    {"/withdraw", do_withdraw, "/withdraw [N|ID]  withdraw feedback, by default the last"},
    {"/help", do_help,
     "/help             this list; a line that begins with // is sent with one /"},
    {"/quit", do_quit, "/quit             end (also Ctrl-D)"},
};

static void do_help(struct chat *chat, const char *words)
{
    (void)chat, (void)words;
    for (size_t i = 0; i < CLAAS_COUNT(commands); i++)
        printf("  %s\n", commands[i].help);
}

static void run_command(struct chat *chat, char *line)
{
    size_t length = strcspn(line, " \t");
    const char *words = line + length + strspn(line + length, " \t");

    for (size_t i = 0; i < CLAAS_COUNT(commands); i++) {
        if (strlen(commands[i].name) == length && strncmp(commands[i].name, line, length) == 0) {
            commands[i].run(chat, words);
            return;
        }
    }
    claas_fail(CLAAS_ERR_INVALID, "'%.*s' is no command (/help lists them)", (int)length, line);
    complain(chat);
}

/* --- the loop --------------------------------------------------------------------------------- */

/* Without its line end and blanks around it. */
static char *trim(char *line)
{
    size_t length;

    line += strspn(line, " \t");
    length = strlen(line);
    while (length > 0 && strchr(" \t\r\n", line[length - 1]))
        line[--length] = '\0';
    return line;
}

static void take_line(struct chat *chat, char *line)
{
    line = trim(line);
    if (!line[0])
        return;
    if (line[0] == '/' && line[1] != '/')
        run_command(chat, line);
    else
        ask(chat, line + (line[0] == '/'));
}

static void loop(struct chat *chat)
{
    CLAAS_AUTO_FREE char *line = NULL;
    size_t capacity = 0;

    while (!chat->quit) {
        ssize_t length;

        if (chat->interactive) {
            fputs("> ", stdout);
            fflush(stdout);
        }
        length = getline(&line, &capacity, stdin);
        if (length < 0) { /* the end, or Ctrl-C */
            if (chat->interactive)
                putchar('\n');
            return;
        }
        if (strlen(line) != (size_t)length) {
            claas_fail(CLAAS_ERR_INVALID, "a line with a NUL in it");
            complain(chat);
            continue;
        }
        take_line(chat, line);
        http_take_interrupt();
    }
}

static int ask_once(struct chat *chat)
{
    int rc = conversation_ask(&chat->conversation, chat->once);

    if (rc == 0 && chat->save_id)
        rc = claas_file_write(chat->save_id, chat->conversation.id, strlen(chat->conversation.id));
    return rc;
}

static int run(struct chat *chat, const struct cli *cli)
{
    bool made = false;
    int rc = http_open(cli->url, &chat->http);

    if (rc == 0 && is_adapter(chat))
        rc = adapter_ensure(&chat->http, chat->adapter, &made);
    if (rc == 0)
        rc = conversation_begin(&chat->conversation, &chat->http, chat->adapter, chat->system,
                                &chat->sampling);
    if (rc < 0)
        return rc;
    if (chat->once)
        return ask_once(chat);
    http_interruptible();
    if (chat->interactive)
        printf("%s %s on %s. /bad and a few words teach it, /help lists the rest.\n",
               made ? "New adapter" : "Talking to", chat->adapter, chat->http.url);
    loop(chat);
    return 0;
}

int verb_chat(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL,
        .doc = "Talks to a model in the terminal; answers appear as they are made. /bad and a few "
               "words teach the adapter.\vCommands: /bad WORDS, /again, /new, /undo, /versions, "
               "/feedback, /withdraw [N|ID], /help, /quit. Ctrl-C stops an answer.",
        .options = options,
        .take = take_option,
    };
    struct chat chat = {
        .who = argv[0],
        .adapter = "local/chat",
        .sampling = {.temperature = 0.7, .top_p = -1, .max_tokens = 512, .seed = -1},
        .interactive = isatty(STDIN_FILENO),
    };
    struct cli cli;
    int rc;

    cli_parse(&spec, argc, argv, &cli, &chat);
    rc = run(&chat, &cli);
    conversation_done(&chat.conversation);
    http_close(&chat.http);
    if (rc < 0)
        return cli_fail(chat.who);
    return chat.failed && !chat.interactive ? EXIT_CODE_FAILED : EXIT_CODE_OK;
}
