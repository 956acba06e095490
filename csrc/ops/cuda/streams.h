/// Streams beside the one that a call runs on, and what waits for what, free of torch. Each answers null, or what the
/// driver says.
#pragma once

namespace cellstep {
namespace cuda {

/// Stream `number` beside `stream` of the current device, made at its first use and kept. Each stream has its own ones,
/// so that a graph which one thread captures never comes to hold what another thread puts to its streams. What runs
/// there goes before what waits for a multiprocessor elsewhere: a recurrence is what all others wait for.
const char* stream_beside(int device, void* stream, int number, void** found);

/// What has been put to `stream` so far.
const char* mark(void* stream, void** event);

/// What is put to `stream` from here on comes behind what was marked.
const char* wait_for(void* stream, void* event);

/// May be called before what was marked is over.
void forget(void* event);

}  // namespace cuda
}  // namespace cellstep
