/* A parent for a process that may be lost through no fault of its own: it has no thread, no socket
 * and no device, so that whatever ends the child leaves it whole. */
#ifndef CLAAS_TOOLS_SUPERVISE_H
#define CLAAS_TOOLS_SUPERVISE_H

/* What the child does with its life; its return is the exit code. Called in a fork of this process,
 * which must have one thread. */
typedef int supervised_fn(void *arg);

/* Runs `child` in a process of its own, and again, after 1 s doubling to 30 s (from 1 s anew after
 * a life of 60 s), whenever it ends by a signal or with EXIT_CODE_AGAIN. SIGTERM and SIGINT go on
 * to the child, and are its last. Returns in the parent alone: the exit code of the last child, 128
 * + the signal that ended it, or EXIT_CODE_OK when the end was asked for between two lives. A
 * parent that dies takes the child with it. */
int supervise(supervised_fn *child, void *arg);

#endif
