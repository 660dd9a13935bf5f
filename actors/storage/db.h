/* SQLite, thin: one connection with its prepared statements, errors as ours. */
#ifndef CLAAS_STORAGE_DB_H
#define CLAAS_STORAGE_DB_H

#include <sqlite3.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DB_STATEMENTS 128

struct db {
    sqlite3 *handle;
    /* Keyed by the address of the SQL literal: every statement of the code is prepared once. */
    struct db_statement {
        const char *sql;
        sqlite3_stmt *statement;
    } statements[DB_STATEMENTS];
};

/* A writing connection (creates the file; WAL, FULL) or a reading one. The file's own problems are
 * told in a sentence that names it: not writable, damaged, no database. */
int db_open(struct db *db, const char *path, bool writer);
void db_close(struct db *db);

/* Maps the connection's last failure: NO_SPACE, BUSY, NO_MEMORY, IO (also where SQLite calls the
 * file malformed), …; records the sentence. */
int db_fail(struct db *db, const char *doing);
/* Several statements without results. */
int db_exec(struct db *db, const char *sql);

/* A statement with its values bound: types is one letter per value:
 *   t  const char * (NULL binds NULL)     i  int64_t     d  double     b  const void *, size_t
 * `sql` must be a literal. Values are borrowed until the statement is done. Declare it with
 * DB_STATEMENT. */
int db_query(struct db *db, sqlite3_stmt **ret, const char *sql, const char *types, ...);
/* 1 a row, 0 the end, < 0 an error. */
int db_step(struct db *db, sqlite3_stmt *statement);
/* db_query and one step, for statements without rows; the number of rows changed. */
int db_run(struct db *db, const char *sql, const char *types, ...);
/* The first column of the first row into *ret: 1, or 0 if there is no row (*ret is left alone).
 * NULL counts as 0. */
int db_get_int(struct db *db, int64_t *ret, const char *sql, const char *types, ...);

/* Cleanup handler: resets for the next use. */
void db_statement_done(sqlite3_stmt **statement);
#define DB_STATEMENT CLAAS_AUTO(db_statement_done) sqlite3_stmt

/* Column as text, NULL for NULL; valid until the next step. */
const char *db_text(sqlite3_stmt *statement, int column);
int64_t db_int(sqlite3_stmt *statement, int column);
bool db_is_null(sqlite3_stmt *statement, int column);

#endif
