/* A parent for a server that a crash or a lost device may end. It has no thread, no socket and no
 * device, so that whatever ends the child leaves the parent whole. */
#ifndef CLAAS_TOOLS_SUPERVISE_H
#define CLAAS_TOOLS_SUPERVISE_H

/* What the child runs; it returns the exit code. Called in a fork of this process, which must have
 * only one thread. */
typedef int supervised_fn(void *arg);

/* Runs `child` in a process of its own, and again whenever it ends by a signal or with
 * EXIT_CODE_AGAIN: after 1 s, doubling to 30 s, and 1 s again after a life of 60 s. SIGTERM and
 * SIGINT are passed on to the child, which is then not started again. Returns in the parent only:
 * the exit code of the last child, 128 + the signal that ended it, or EXIT_CODE_OK when the end was
 * asked for between two lives. A parent that dies takes the child with it. */
int supervise(supervised_fn *child, void *arg);

#endif
