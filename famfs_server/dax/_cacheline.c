/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What Python cannot do with mapped device memory: write back and invalidate cache lines, order the
 * stores, and copy from memory that may fault without dying of it.
 *
 * Every access is guarded. Memory of a device can be poisoned, its file can be truncated and its driver
 * unbound under the mapping; each makes the kernel send SIGBUS to the thread that touches it, also when
 * it touches it with a cache-line instruction only. The handler jumps back into the access, which raises
 * OSError(EFAULT). A SIGBUS in any other place goes to whoever handled it before.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include <endian.h>
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

/* From this length on the interpreter lock is given up: below it, taking it back costs more. */
#define LONG_ACCESS ((size_t)65536)

#define COMPILER_BARRIER() __asm__ volatile("" ::: "memory")

/* ---- cache lines ------------------------------------------------------------------------------- */

typedef void (*line_loop)(uintptr_t start, uintptr_t end);

static const char *mechanism = "none";
static uintptr_t line_size = 64;

static void touch_nothing(uintptr_t start, uintptr_t end)
{
    (void)start;
    (void)end;
}

static line_loop write_back_lines = touch_nothing;
static line_loop invalidate_lines = touch_nothing;

#if defined(__x86_64__)

__attribute__((target("clwb"))) static void clwb_lines(uintptr_t start, uintptr_t end)
{
    for (uintptr_t line = start; line < end; line += 64)
        _mm_clwb((void *)line);
}

__attribute__((target("clflushopt"))) static void clflushopt_lines(uintptr_t start, uintptr_t end)
{
    for (uintptr_t line = start; line < end; line += 64)
        _mm_clflushopt((void *)line);
}

static void clflush_lines(uintptr_t start, uintptr_t end)
{
    for (uintptr_t line = start; line < end; line += 64)
        _mm_clflush((void *)line);
}

static void choose_mechanism(void)
{
    unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;

    /* False, and ebx stays 0, on a processor that has no leaf 7. */
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx))
        ebx = 0;
    mechanism = "clflush";
    write_back_lines = invalidate_lines = clflush_lines;
    if (ebx & bit_CLFLUSHOPT) {
        mechanism = "clflushopt";
        write_back_lines = invalidate_lines = clflushopt_lines;
    }
    if (ebx & bit_CLWB) {
        mechanism = "clwb";
        write_back_lines = clwb_lines;
    }
}

static void store_fence(void) { _mm_sfence(); }
/* An invalidation is ordered before later loads by MFENCE only; SFENCE lets them pass. */
static void memory_fence(void) { _mm_mfence(); }

#elif defined(__aarch64__)

static void clean_lines(uintptr_t start, uintptr_t end)
{
    for (uintptr_t line = start; line < end; line += line_size)
        __asm__ volatile("dc cvac, %0" ::"r"(line) : "memory");
}

static void clean_and_invalidate_lines(uintptr_t start, uintptr_t end)
{
    for (uintptr_t line = start; line < end; line += line_size)
        __asm__ volatile("dc civac, %0" ::"r"(line) : "memory");
}

static void choose_mechanism(void)
{
    uint64_t cache_type;

    __asm__("mrs %0, ctr_el0" : "=r"(cache_type));
    line_size = (uintptr_t)4 << ((cache_type >> 16) & 15); /* DminLine: log2 of 4-byte words */
    mechanism = "dc cvac";
    write_back_lines = clean_lines;
    invalidate_lines = clean_and_invalidate_lines;
}

static void memory_fence(void) { __asm__ volatile("dsb sy" ::: "memory"); }
static void store_fence(void) { memory_fence(); }

#else

static void choose_mechanism(void) {}
static void memory_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static void store_fence(void) { memory_fence(); }

#endif

/* ---- guarded access ------------------------------------------------------------------------------ */

#if defined(__GLIBC__)
/* Needs no call into the loader, which a signal handler must not make. */
#define THREAD_LOCAL static __thread __attribute__((tls_model("initial-exec")))
#else
#define THREAD_LOCAL static __thread
#endif

/* Where a SIGBUS of this thread has to go; NULL outside of a guarded access. */
THREAD_LOCAL sigjmp_buf *volatile landing;

static struct sigaction previous;

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    /* BUS_MCEERR_AO tells of a poisoned page that nobody has touched: not the access at hand. */
    if (landing != NULL && info->si_code != BUS_MCEERR_AO)
        siglongjmp(*landing, 1);

    if ((previous.sa_flags & SA_SIGINFO) && previous.sa_sigaction != NULL) {
        previous.sa_sigaction(number, info, context);
        return;
    }
    if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(number);
        return;
    }
    /* Sent by a process: SIG_IGN is obeyed. A fault cannot be ignored: the kernel would kill, too. */
    if (previous.sa_handler == SIG_IGN && info->si_code <= 0)
        return;
    signal(number, SIG_DFL);
    if (info->si_code <= 0 || info->si_code == BUS_MCEERR_AO)
        raise(number);
    /* A fault comes again when the instruction is repeated, and kills with its true address. */
}

static int install_handler(void)
{
    static int installed;
    struct sigaction action;

    if (installed)
        return 0;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_bus_error;
    sigemptyset(&action.sa_mask);
    /* NODEFER: the jump out of the handler must not leave SIGBUS blocked, and saving the signal mask
     * before each access instead would cost a system call. */
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    if (sigaction(SIGBUS, &action, &previous) != 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    installed = 1;
    return 0;
}

enum access_kind { COPY, STORE_U64, WRITE_BACK, INVALIDATE, TOUCH };

struct access {
    enum access_kind kind;
    char *destination;
    const char *source;
    size_t length;
    uint64_t value;
};

/* Not inlined: nothing that the jump skips may live in registers of the caller. */
__attribute__((noinline)) static int perform(const struct access *access)
{
    sigjmp_buf here;
    uintptr_t start = (uintptr_t)access->source & ~(line_size - 1);
    uintptr_t end = (uintptr_t)access->source + access->length;

    if (sigsetjmp(here, 0) != 0) {
        landing = NULL;
        return -1;
    }
    landing = &here;
    COMPILER_BARRIER();
    switch (access->kind) {
    case COPY:
        memmove(access->destination, access->source, access->length);
        break;
    case STORE_U64:
        __atomic_store_n((uint64_t *)(void *)access->destination, access->value, __ATOMIC_RELEASE);
        break;
    case WRITE_BACK:
        write_back_lines(start, end);
        break;
    case INVALIDATE:
        memory_fence();
        invalidate_lines(start, end);
        memory_fence();
        break;
    case TOUCH:
        /* No page is smaller than this. */
        for (uintptr_t at = start; at < end; at = (at & ~(uintptr_t)4095) + 4096)
            (void)*(const volatile char *)at;
        break;
    }
    COMPILER_BARRIER();
    landing = NULL;
    return 0;
}

/* Performs `access`; -1 with OSError(EFAULT) set when the memory faulted. */
static int guarded(const struct access *access)
{
    int result;

    if (access->length >= LONG_ACCESS) {
        Py_BEGIN_ALLOW_THREADS
        result = perform(access);
        Py_END_ALLOW_THREADS
    } else {
        result = perform(access);
    }
    if (result != 0) {
        errno = EFAULT;
        PyErr_SetFromErrno(PyExc_OSError);
    }
    return result;
}

/* ---- arguments ----------------------------------------------------------------------------------- */

static int count_is(const char *name, Py_ssize_t count, Py_ssize_t wanted)
{
    if (count == wanted)
        return 1;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments (%zd given)", name, wanted, count);
    return 0;
}

/* A number that cannot be a position in memory is a ValueError, however large it is. */
static int to_size(PyObject *object, const char *name, size_t *result)
{
    Py_ssize_t number = PyNumber_AsSsize_t(object, PyExc_ValueError);

    if (number == -1 && PyErr_Occurred())
        return 0;
    if (number < 0) {
        PyErr_Format(PyExc_ValueError, "%s %zd is negative", name, number);
        return 0;
    }
    *result = (size_t)number;
    return 1;
}

static int in_bounds(const Py_buffer *buffer, size_t offset, size_t length)
{
    size_t size = (size_t)buffer->len;

    if (offset <= size && length <= size - offset)
        return 1;
    PyErr_Format(PyExc_ValueError, "%zu bytes at offset %zu are outside of a buffer of %zu bytes", length,
                 offset, size);
    return 0;
}

/* ---- functions ------------------------------------------------------------------------------------ */

static PyObject *flush(const char *name, enum access_kind kind, PyObject *const *arguments, Py_ssize_t count)
{
    struct access access = {.kind = kind};
    Py_buffer buffer;
    size_t offset;
    int done = -1;

    if (!count_is(name, count, 3) || !to_size(arguments[1], "offset", &offset) ||
        !to_size(arguments[2], "length", &access.length))
        return NULL;
    if (PyObject_GetBuffer(arguments[0], &buffer, PyBUF_SIMPLE) != 0)
        return NULL;
    if (in_bounds(&buffer, offset, access.length)) {
        access.source = (const char *)buffer.buf + offset;
        done = access.length == 0 ? 0 : guarded(&access);
    }
    PyBuffer_Release(&buffer);
    if (done != 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *write_back(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    return flush("write_back", WRITE_BACK, arguments, count);
}

static PyObject *invalidate(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    return flush("invalidate", INVALIDATE, arguments, count);
}

static PyObject *touch(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    return flush("touch", TOUCH, arguments, count);
}

static PyObject *fence(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    store_fence();
    Py_RETURN_NONE;
}

static PyObject *full_fence(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    memory_fence();
    Py_RETURN_NONE;
}

static PyObject *copy_from(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    struct access access = {.kind = COPY};
    Py_buffer buffer;
    size_t offset;
    PyObject *result = NULL;

    (void)module;
    if (!count_is("copy_from", count, 3) || !to_size(arguments[1], "offset", &offset) ||
        !to_size(arguments[2], "length", &access.length))
        return NULL;
    if (PyObject_GetBuffer(arguments[0], &buffer, PyBUF_SIMPLE) != 0)
        return NULL;
    if (in_bounds(&buffer, offset, access.length))
        result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)access.length);
    /* Nothing is written for length 0: the empty bytes object is shared by everybody. */
    if (result != NULL && access.length != 0) {
        access.destination = PyBytes_AS_STRING(result);
        access.source = (const char *)buffer.buf + offset;
        if (guarded(&access) != 0)
            Py_CLEAR(result);
    }
    PyBuffer_Release(&buffer);
    return result;
}

static PyObject *copy_into(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    struct access access = {.kind = COPY};
    Py_buffer destination, source;
    size_t destination_offset, source_offset;
    int done = -1;

    (void)module;
    if (!count_is("copy_into", count, 5) || !to_size(arguments[1], "destination offset", &destination_offset) ||
        !to_size(arguments[3], "source offset", &source_offset) ||
        !to_size(arguments[4], "length", &access.length))
        return NULL;
    if (PyObject_GetBuffer(arguments[0], &destination, PyBUF_WRITABLE) != 0)
        return NULL;
    if (PyObject_GetBuffer(arguments[2], &source, PyBUF_SIMPLE) != 0) {
        PyBuffer_Release(&destination);
        return NULL;
    }
    if (in_bounds(&destination, destination_offset, access.length) &&
        in_bounds(&source, source_offset, access.length)) {
        access.destination = (char *)destination.buf + destination_offset;
        access.source = (const char *)source.buf + source_offset;
        done = access.length == 0 ? 0 : guarded(&access);
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&destination);
    if (done != 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *store_u64(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    struct access access = {.kind = STORE_U64, .length = sizeof(uint64_t)};
    Py_buffer buffer;
    size_t offset;
    int done = -1;

    (void)module;
    if (!count_is("store_u64", count, 3) || !to_size(arguments[1], "offset", &offset))
        return NULL;
    if (!PyLong_Check(arguments[2])) {
        PyErr_SetString(PyExc_TypeError, "value must be an int");
        return NULL;
    }
    access.value = PyLong_AsUnsignedLongLong(arguments[2]);
    if (access.value == (uint64_t)-1 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError))
            PyErr_SetString(PyExc_ValueError, "value does not fit in 64 bits without sign");
        return NULL;
    }
    access.value = htole64(access.value);
    if (PyObject_GetBuffer(arguments[0], &buffer, PyBUF_WRITABLE) != 0)
        return NULL;
    if (in_bounds(&buffer, offset, access.length)) {
        access.destination = (char *)buffer.buf + offset;
        if ((uintptr_t)access.destination % sizeof(uint64_t) != 0)
            PyErr_Format(PyExc_ValueError, "offset %zu is not aligned to 8 bytes", offset);
        else
            done = guarded(&access);
    }
    PyBuffer_Release(&buffer);
    if (done != 0)
        return NULL;
    Py_RETURN_NONE;
}

#define FAST(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL

static PyMethodDef methods[] = {
    {"write_back", FAST(write_back),
     "write_back(buffer, offset, length)\n--\n\nBegin to write the cache lines of a range to memory; "
     "done after fence()."},
    {"invalidate", FAST(invalidate),
     "invalidate(buffer, offset, length)\n--\n\nDrop the cache lines of a range, so that later loads read memory."},
    {"touch", FAST(touch),
     "touch(buffer, offset, length)\n--\n\nHave every page of a range mapped; OSError(EFAULT) if one cannot be."},
    {"fence", fence, METH_NOARGS, "fence()\n--\n\nEarlier stores and write-backs are done before later ones."},
    {"full_fence", full_fence, METH_NOARGS,
     "full_fence()\n--\n\nEarlier loads, stores and write-backs are done before later ones."},
    {"copy_from", FAST(copy_from),
     "copy_from(buffer, offset, length)\n--\n\nA copy of a range; OSError(EFAULT) if it cannot be read."},
    {"copy_into", FAST(copy_into),
     "copy_into(destination, destination_offset, source, source_offset, length)\n--\n\n"
     "Copy between buffers; OSError(EFAULT) if either side faults, and part may have been copied."},
    {"store_u64", FAST(store_u64),
     "store_u64(buffer, offset, value)\n--\n\nStore 8 aligned bytes, little-endian, in one piece."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_cacheline",
    .m_doc = "Cache maintenance and guarded copies for mapped device memory.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__cacheline(void)
{
    PyObject *module = PyModule_Create(&definition);

    if (module == NULL)
        return NULL;
    choose_mechanism();
    if (install_handler() != 0 || PyModule_AddStringConstant(module, "MECHANISM", mechanism) != 0)
        Py_CLEAR(module);
    return module;
}
