// Device and pinned memory: every allocation ends at a guard page, starts as NaN, and is never reused after
// its end.
#pragma once

#include <cstddef>
#include <cstdint>

#include "api.h"

namespace emu {

enum class Place { Device, Pinned };

// Null if the device has no room.
void* take(Place place, Context* context, size_t bytes);
// False if this is not the start of a live allocation of that kind.
bool give_back(Place place, void* start);
size_t used_bytes(Context* context);

// Wholly inside one live allocation of that kind?
RIG_ACROSS bool is_live(Place place, const void* address, size_t bytes);
// Device or pinned memory, or the end of one.
bool is_reachable(const void* address);
// What lies at an address, for a report; safe in a signal handler.
RIG_ACROSS void describe(uintptr_t address, char* text, size_t size);

// Bytes between the end of an allocation and its guard page that a kernel has written over; reports and
// returns false.
bool borders_whole(const char* after);

bool pin(void* start, size_t bytes);
bool unpin(void* start);

}  // namespace emu
