/* Ranks that wait for others yield over and over, and where there are more of them than cores they take the time that the
   others need. For the tests a yield is a short sleep: the Makefile preloads this. */

#include <sched.h>
#include <time.h>

int sched_yield(void)
{
    const struct timespec pause = {0, 20000}; /* 20 us (our choice) */
    return nanosleep(&pause, NULL);
}
