/* For tests of what is left in a folder. */
#ifndef CLAAS_TESTS_COUNT_ENTRIES_H
#define CLAAS_TESTS_COUNT_ENTRIES_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>

/* Hidden ones do not count. */
static inline int count_entries(const char *folder)
{
    DIR *dir = opendir(folder);
    int count = 0;

    assert_non_null(dir);
    for (struct dirent *entry; (entry = readdir(dir));)
        count += entry->d_name[0] != '.';
    closedir(dir);
    return count;
}

#endif
