// Whether this process is a child that lacks its parent's threads.
#pragma once

#include <pthread.h>

namespace fastflow {

// True in a process that was forked without exec. An OpenMP runtime that has worked in the parent
// has no threads left in the child and would wait for them forever (a data loader's workers are
// such children), so kernels run serially there, and take no lock that another thread may have
// held.
inline bool in_forked_child = false;
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

}  // namespace fastflow
