/* SQLite, thin. The settings are the durability of the house: WAL with synchronous=FULL means that
 * a COMMIT that came back is on disk (fsync of the log), whatever happens next; everything above
 * relies on just that.
 *
 * Two connections are used by one thread: the writer, and a reader that sees only what is
 * committed. So an answer to a question never shows what a crash could still take back. */
#include "db.h"

#include <errno.h>
#include <stdarg.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"

#define BUSY_MS 5000 /* a backup tool may hold the file for a moment */

static int code_of(sqlite3 *handle)
{
    int code = sqlite3_extended_errcode(handle);

    switch (code & 0xff) {
    case SQLITE_FULL:
        return CLAAS_ERR_NO_SPACE;
    case SQLITE_IOERR:
    case SQLITE_CANTOPEN:
        if (sqlite3_system_errno(handle) == ENOSPC || sqlite3_system_errno(handle) == EDQUOT)
            return CLAAS_ERR_NO_SPACE;
        return CLAAS_ERR_IO;
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
        return CLAAS_ERR_CORRUPT;
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
        return CLAAS_ERR_BUSY;
    case SQLITE_NOMEM:
        return CLAAS_ERR_NO_MEMORY;
    case SQLITE_TOOBIG:
        return CLAAS_ERR_TOO_LARGE;
    case SQLITE_READONLY:
    case SQLITE_PERM:
        return CLAAS_ERR_IO;
    default:
        return CLAAS_ERR_INTERNAL;
    }
}

int db_fail(struct db *db, const char *doing)
{
    int code = db->handle ? code_of(db->handle) : CLAAS_ERR_NO_MEMORY;
    const char *text = db->handle ? sqlite3_errmsg(db->handle) : "out of memory";

    if (code == CLAAS_ERR_NO_SPACE)
        return claas_fail(code, "%s: no space left for the database; nothing was changed", doing);
    /* SQLite says so of a read that failed, too. Either way the disk is to blame, not the asker. */
    if (code == CLAAS_ERR_CORRUPT)
        return claas_fail(CLAAS_ERR_IO, "%s: database: %s, or cannot be read", doing, text);
    return claas_fail(code, "%s: database: %s", doing, text);
}

int db_exec(struct db *db, const char *sql)
{
    if (sqlite3_exec(db->handle, sql, NULL, NULL, NULL) != SQLITE_OK)
        return db_fail(db, "storage");
    return 0;
}

/* What SQLite could not open for writing it opened for reading, and every change would fail for as
 * long as it is open. The transaction finds that out about log and index. */
static const char writer_settings[] = "PRAGMA journal_mode=WAL;"
                                      "PRAGMA synchronous=FULL;"
                                      "PRAGMA foreign_keys=ON;"
                                      "PRAGMA trusted_schema=OFF;"
                                      "PRAGMA temp_store=MEMORY;"
                                      "PRAGMA journal_size_limit=67108864;"
                                      "BEGIN IMMEDIATE;"
                                      "ROLLBACK;";
static const char reader_settings[] = "PRAGMA trusted_schema=OFF;"
                                      "PRAGMA temp_store=MEMORY;"
                                      "PRAGMA query_only=ON;";

static int fail_open(struct db *db, const char *path)
{
    int code = db->handle ? code_of(db->handle) : CLAAS_ERR_NO_MEMORY;
    const char *text = db->handle ? sqlite3_errmsg(db->handle) : "out of memory";

    if (code == CLAAS_ERR_CORRUPT)
        return claas_fail(code,
                          "%s is damaged (%s): restore it from a backup, or move it away together "
                          "with its -wal file",
                          path, text);
    if (code == CLAAS_ERR_NO_SPACE)
        return claas_fail(code, "%s: no space left for the database", path);
    if (code == CLAAS_ERR_IO)
        return claas_fail(code, "%s cannot be opened for writing: %s", path, text);
    return claas_fail(code, "%s: %s", path, text);
}

int db_open(struct db *db, const char *path, bool writer)
{
    int flags = SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_READWRITE | (writer ? SQLITE_OPEN_CREATE : 0);

    memset(db, 0, sizeof(*db));
    if (sqlite3_open_v2(path, &db->handle, flags, NULL) != SQLITE_OK)
        return fail_open(db, path);
    sqlite3_extended_result_codes(db->handle, 1);
    sqlite3_busy_timeout(db->handle, BUSY_MS);
    if (sqlite3_exec(db->handle, writer ? writer_settings : reader_settings, NULL, NULL, NULL) !=
        SQLITE_OK)
        return fail_open(db, path);
    if (writer && sqlite3_db_readonly(db->handle, "main"))
        return claas_fail(CLAAS_ERR_IO, "%s cannot be opened for writing", path);
    return 0;
}

void db_close(struct db *db)
{
    for (size_t i = 0; i < DB_STATEMENTS; i++)
        sqlite3_finalize(db->statements[i].statement);
    sqlite3_close(db->handle);
    memset(db, 0, sizeof(*db));
}

static int find_statement(struct db *db, const char *sql, sqlite3_stmt **ret)
{
    size_t slot = ((uintptr_t)sql >> 3) % DB_STATEMENTS;

    for (size_t tried = 0; tried < DB_STATEMENTS; tried++) {
        struct db_statement *entry = &db->statements[(slot + tried) % DB_STATEMENTS];

        if (entry->sql == sql) {
            *ret = entry->statement;
            return 0;
        }
        if (entry->sql)
            continue;
        if (sqlite3_prepare_v3(db->handle, sql, -1, SQLITE_PREPARE_PERSISTENT, &entry->statement,
                               NULL) != SQLITE_OK)
            return db_fail(db, "storage");
        entry->sql = sql;
        *ret = entry->statement;
        return 0;
    }
    return claas_fail(CLAAS_ERR_INTERNAL, "more than %d statements", DB_STATEMENTS);
}

static int bind_one(sqlite3_stmt *statement, int at, char type, va_list *args)
{
    const void *bytes;
    size_t length;

    switch (type) {
    case 't':
        return sqlite3_bind_text(statement, at, va_arg(*args, const char *), -1, SQLITE_STATIC);
    case 'i':
        return sqlite3_bind_int64(statement, at, va_arg(*args, int64_t));
    case 'd':
        return sqlite3_bind_double(statement, at, va_arg(*args, double));
    case 'b':
        bytes = va_arg(*args, const void *);
        length = va_arg(*args, size_t);
        /* A NULL pointer would bind NULL; an empty array is an empty blob. */
        return sqlite3_bind_blob64(statement, at, bytes ? bytes : "", length, SQLITE_STATIC);
    default:
        return SQLITE_MISUSE;
    }
}

static int query(struct db *db, sqlite3_stmt **ret, const char *sql, const char *types,
                 va_list args)
{
    sqlite3_stmt *statement = NULL;
    int rc = find_statement(db, sql, &statement);
    va_list values;

    if (rc < 0)
        return rc;
    va_copy(values, args);
    for (int i = 0; types[i] && rc == SQLITE_OK; i++)
        rc = bind_one(statement, i + 1, types[i], &values);
    va_end(values);
    /* SQLite takes a value that was not bound as NULL: refuse that here. */
    if (rc == SQLITE_OK && (size_t)sqlite3_bind_parameter_count(statement) != strlen(types)) {
        db_statement_done(&statement);
        return claas_fail(CLAAS_ERR_INTERNAL, "'%.80s': %zu values", sql, strlen(types));
    }
    if (rc != SQLITE_OK) {
        rc = db_fail(db, "storage");
        db_statement_done(&statement);
        return rc;
    }
    *ret = statement;
    return 0;
}

int db_query(struct db *db, sqlite3_stmt **ret, const char *sql, const char *types, ...)
{
    va_list args;
    int rc;

    va_start(args, types);
    rc = query(db, ret, sql, types, args);
    va_end(args);
    return rc;
}

int db_step(struct db *db, sqlite3_stmt *statement)
{
    int rc = sqlite3_step(statement);

    if (rc == SQLITE_ROW)
        return 1;
    if (rc == SQLITE_DONE)
        return 0;
    return db_fail(db, "storage");
}

int db_run(struct db *db, const char *sql, const char *types, ...)
{
    DB_STATEMENT *statement = NULL;
    va_list args;
    int rc;

    va_start(args, types);
    rc = query(db, &statement, sql, types, args);
    va_end(args);
    if (rc == 0)
        rc = db_step(db, statement);
    return rc < 0 ? rc : sqlite3_changes(db->handle);
}

int db_get_int(struct db *db, int64_t *ret, const char *sql, const char *types, ...)
{
    DB_STATEMENT *statement = NULL;
    va_list args;
    int rc;

    va_start(args, types);
    rc = query(db, &statement, sql, types, args);
    va_end(args);
    if (rc == 0)
        rc = db_step(db, statement);
    if (rc == 1)
        *ret = db_int(statement, 0);
    return rc;
}

void db_statement_done(sqlite3_stmt **statement)
{
    if (!*statement)
        return;
    sqlite3_reset(*statement);
    sqlite3_clear_bindings(*statement);
    *statement = NULL;
}

const char *db_text(sqlite3_stmt *statement, int column)
{
    return (const char *)sqlite3_column_text(statement, column);
}

int64_t db_int(sqlite3_stmt *statement, int column)
{
    return sqlite3_column_int64(statement, column);
}

bool db_is_null(sqlite3_stmt *statement, int column)
{
    return sqlite3_column_type(statement, column) == SQLITE_NULL;
}
