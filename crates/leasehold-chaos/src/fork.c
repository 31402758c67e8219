/* Preloaded into a program: its call of sched_yield forks it, as a server that forks its workers does.
 * (Rust code cannot call fork without unsafe.) The child goes on in the copy of the calling thread. */
#include <unistd.h>

int sched_yield(void) { return fork() < 0 ? -1 : 0; }
