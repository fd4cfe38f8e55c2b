"""What this library asks of the process that it runs in, beyond its own objects: all of it, in this one folder.

An engine that embeds the library may notice these settings, because they act on the whole process or on all work of a
thread. `settings.allow_process_settings(False)` (public as `tensorfork.allow_process_settings`) forbids every one of
them. docs/process_settings.md lists them, with the reason for each, and what was measured without it.

| module | setting | how long |
|---|---|---|
| `garbage_collection` | no cyclic garbage collection | while thousands of objects are made; at most 2 s of a fork |
| `switch_interval` | threads get the interpreter within 20 µs, not 5 ms | while CUDA IPC handles are opened |
| `openmp` | torch operations of one thread use that thread alone | while digests are computed on a CPU |
| `c_allocator` | glibc keeps up to 8 MiB of freed memory | from a process's first fork over ZeroMQ on |
| `environment` | variables that torch and Mooncake read | while an object of theirs is constructed |

`process` changes nothing: it says which process and host this is. Nor does `ending`, which stops our threads when the
process ends.
"""
