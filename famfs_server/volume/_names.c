/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The index of names: an open-addressed table of nodeids over the namespace's columns (volume/namespace.py).
 *
 * Looking a name up is in every request, and linking one in every entry of a log that is replayed.
 *
 * The hash is SipHash-1-3 (Aumasson and Bernstein), with a key of 128 bits.
 *
 * Python's own hash of bytes is the same function with a key that no other process has. The index lies in memory that
 * outlives processes and is handed to a newly started program, so its key lies there too. A key there must be: names
 * come from another host, and one that could choose names which collide would make every lookup slow.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#define KEY_SIZE 16
#define ROTATE(value, bits) (((value) << (bits)) | ((value) >> (64 - (bits))))
#define ROUND(a, b, c, d) \
    do { \
        a += b; c += d; b = ROTATE(b, 13) ^ a; d = ROTATE(d, 16) ^ c; a = ROTATE(a, 32); \
        c += b; a += d; b = ROTATE(b, 17) ^ c; d = ROTATE(d, 21) ^ a; c = ROTATE(c, 32); \
    } while (0)

static uint64_t load(const unsigned char *bytes, size_t count)
{
    uint64_t word = 0;

    for (size_t at = 0; at < count; at++)
        word |= (uint64_t)bytes[at] << (8 * at);
    return word;
}

static uint64_t siphash(uint64_t key0, uint64_t key1, const unsigned char *data, size_t length)
{
    uint64_t a = key0 ^ 0x736f6d6570736575, b = key1 ^ 0x646f72616e646f6d;
    uint64_t c = key0 ^ 0x6c7967656e657261, d = key1 ^ 0x7465646279746573;
    const unsigned char *end = data + length / 8 * 8;
    uint64_t word;

    for (; data < end; data += 8) {
        word = load(data, 8);
        d ^= word;
        ROUND(a, b, c, d);
        a ^= word;
    }
    word = (uint64_t)length << 56 | load(data, length % 8);
    d ^= word;
    ROUND(a, b, c, d);
    a ^= word;
    c ^= 0xff;
    ROUND(a, b, c, d);
    ROUND(a, b, c, d);
    ROUND(a, b, c, d);
    return a ^ b ^ c ^ d;
}

static PyObject *name_hash(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    const unsigned char *key;
    unsigned long long parent;

    (void)module;
    if (count != 3 || !PyBytes_Check(arguments[0]) || !PyBytes_Check(arguments[2])) {
        PyErr_SetString(PyExc_TypeError, "name_hash takes a key, a number and a name");
        return NULL;
    }
    if (PyBytes_GET_SIZE(arguments[0]) != KEY_SIZE) {
        PyErr_Format(PyExc_ValueError, "a key has %d bytes", KEY_SIZE);
        return NULL;
    }
    parent = PyLong_AsUnsignedLongLong(arguments[1]);
    if (parent == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    key = (const unsigned char *)PyBytes_AS_STRING(arguments[0]);
    return PyLong_FromUnsignedLongLong(siphash(load(key, 8) ^ parent, load(key + 8, 8),
                                               (const unsigned char *)PyBytes_AS_STRING(arguments[2]),
                                               (size_t)PyBytes_GET_SIZE(arguments[2])));
}

enum { SLOTS, PARENTS, OFFSETS, LENGTHS, NEXT, FIRST, LAST, MODES, TEXT, COLUMNS };

/* Bytes of one item of each column. */
static const Py_ssize_t item_sizes[COLUMNS] = {4, 4, 8, 1, 4, 4, 4, 4, 1};

typedef struct {
    PyObject_HEAD
    Py_buffer columns[COLUMNS];
    uint64_t key[2];
    uint64_t mask, rows;
} Index;

#define COLUMN(index, which, type) ((type *)(index)->columns[which].buf)

static void index_free(Index *self)
{
    PyTypeObject *type = Py_TYPE(self);

    for (int which = 0; which < COLUMNS; which++)
        if (self->columns[which].obj)
            PyBuffer_Release(&self->columns[which]);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *index_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    PyObject *key, *buffers[COLUMNS];
    Index *self;

    if (keywords && PyDict_GET_SIZE(keywords)) {
        PyErr_SetString(PyExc_TypeError, "Index takes no keywords");
        return NULL;
    }
    if (!PyArg_ParseTuple(arguments, "SOOOOOOOOO", &key, &buffers[SLOTS], &buffers[PARENTS], &buffers[OFFSETS],
                          &buffers[LENGTHS], &buffers[NEXT], &buffers[FIRST], &buffers[LAST], &buffers[MODES],
                          &buffers[TEXT]))
        return NULL;
    if (PyBytes_GET_SIZE(key) != KEY_SIZE)
        return PyErr_Format(PyExc_ValueError, "a key has %d bytes", KEY_SIZE);
    self = (Index *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    for (int which = 0; which < COLUMNS; which++)
        if (PyObject_GetBuffer(buffers[which], &self->columns[which], PyBUF_WRITABLE) < 0)
            goto fail;
    self->key[0] = load((const unsigned char *)PyBytes_AS_STRING(key), 8);
    self->key[1] = load((const unsigned char *)PyBytes_AS_STRING(key) + 8, 8);
    self->mask = (uint64_t)self->columns[SLOTS].len / 4 - 1;
    self->rows = (uint64_t)self->columns[PARENTS].len / 4;
    for (int which = PARENTS; which < TEXT; which++)
        if ((uint64_t)self->columns[which].len != self->rows * (uint64_t)item_sizes[which])
            goto uneven;
    /* A free slot must remain, or a search for what is not there would not end. */
    if (self->mask & (self->mask + 1) || self->mask < self->rows)
        goto uneven;
    return (PyObject *)self;

uneven:
    PyErr_SetString(PyExc_ValueError, "the columns do not fit together");
fail:
    Py_DECREF(self);
    return NULL;
}

/* The slot that holds a name, or the free one that it would go to. */
static uint64_t search(const Index *self, uint64_t parent, const char *name, size_t length)
{
    const uint32_t *slots = COLUMN(self, SLOTS, uint32_t), *parents = COLUMN(self, PARENTS, uint32_t);
    const uint64_t *offsets = COLUMN(self, OFFSETS, uint64_t);
    const uint8_t *lengths = COLUMN(self, LENGTHS, uint8_t);
    uint64_t text = (uint64_t)self->columns[TEXT].len;
    uint64_t slot = siphash(self->key[0] ^ parent, self->key[1], (const unsigned char *)name, length);
    uint32_t node;

    /* Other processes read while one inserts: what a slot leads to was stored before the slot. */
    for (slot &= self->mask; (node = __atomic_load_n(&slots[slot], __ATOMIC_ACQUIRE)); slot = (slot + 1) & self->mask)
        if (node < self->rows && parents[node] == parent && lengths[node] == length && offsets[node] <= text
            && length <= text - offsets[node]
            && !memcmp(COLUMN(self, TEXT, char) + offsets[node], name, length))
            break;
    return slot;
}

static int arguments_of(PyObject *const *arguments, unsigned long long *number, const char **name, size_t *length)
{
    *number = PyLong_AsUnsignedLongLong(arguments[0]);
    if (*number == (unsigned long long)-1 && PyErr_Occurred())
        return -1;
    if (!PyBytes_Check(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "a name is bytes");
        return -1;
    }
    *name = PyBytes_AS_STRING(arguments[1]);
    *length = (size_t)PyBytes_GET_SIZE(arguments[1]);
    return 0;
}

static PyObject *index_find(Index *self, PyObject *const *arguments, Py_ssize_t count)
{
    unsigned long long parent;
    const char *name;
    size_t length;

    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "find takes a directory and a name");
    if (arguments_of(arguments, &parent, &name, &length))
        return NULL;
    return PyLong_FromUnsignedLong(COLUMN(self, SLOTS, uint32_t)[search(self, parent, name, length)]);
}

static PyObject *index_link(Index *self, PyObject *const *arguments, Py_ssize_t count)
{
    uint32_t *slots = COLUMN(self, SLOTS, uint32_t), *last, *next = COLUMN(self, NEXT, uint32_t), found;
    unsigned long long nodeid, parent;
    const char *name;
    size_t length;
    uint64_t slot;

    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "link takes a nodeid, a directory and a name");
    nodeid = PyLong_AsUnsignedLongLong(arguments[0]);
    if (nodeid == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    if (arguments_of(arguments + 1, &parent, &name, &length))
        return NULL;
    if (nodeid >= self->rows || parent >= self->rows)
        return PyErr_Format(PyExc_IndexError, "there are %llu rows", (unsigned long long)self->rows);
    slot = search(self, parent, name, length);
    found = slots[slot];
    /* Found itself: a process that died here had linked it but not said so. */
    if (found)
        return PyBool_FromLong(found == nodeid);
    COLUMN(self, PARENTS, uint32_t)[nodeid] = (uint32_t)parent;
    last = &COLUMN(self, LAST, uint32_t)[parent];
    if (!*last)
        COLUMN(self, FIRST, uint32_t)[parent] = (uint32_t)nodeid;
    else if (*last != nodeid && *last < self->rows)
        next[*last] = (uint32_t)nodeid;
    *last = (uint32_t)nodeid;
    __atomic_store_n(&slots[slot], (uint32_t)nodeid, __ATOMIC_RELEASE);
    Py_RETURN_TRUE;
}

/* The kernel's struct fuse_dirent (protocol 6.2), without its name. */
typedef struct {
    uint64_t ino, offset;
    uint32_t namelen, type;
} Dirent;

static PyObject *index_dirents(Index *self, PyObject *const *arguments, Py_ssize_t count)
{
    const uint32_t *next = COLUMN(self, NEXT, uint32_t), *modes = COLUMN(self, MODES, uint32_t);
    const uint64_t *offsets = COLUMN(self, OFFSETS, uint64_t);
    const uint8_t *lengths = COLUMN(self, LENGTHS, uint8_t);
    uint64_t text = (uint64_t)self->columns[TEXT].len, node;
    Py_ssize_t size, lead, used = 0;
    PyObject *records;
    char *at;

    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "dirents takes a nodeid, a size and the length of a lead");
    node = PyLong_AsUnsignedLongLong(arguments[0]);
    size = PyLong_AsSsize_t(arguments[1]);
    lead = PyLong_AsSsize_t(arguments[2]);
    if (PyErr_Occurred())
        return NULL;
    if (lead < 0 || lead > 4096 || lead % 8)
        return PyErr_Format(PyExc_ValueError, "a lead has at most 4096 bytes, in steps of 8");
    records = PyBytes_FromStringAndSize(NULL, size < 0 ? 0 : size);
    if (!records)
        return NULL;
    at = PyBytes_AS_STRING(records);
    for (; node && node < self->rows && offsets[node] <= text && lengths[node] <= text - offsets[node];
         node = next[node]) {
        Dirent record = {node, node, lengths[node], modes[node] >> 12};
        Py_ssize_t need = lead + (Py_ssize_t)((sizeof record + record.namelen + 7) & ~(size_t)7);

        if (need > size - used)
            break;
        memset(at + used, 0, lead);
        memset(at + used + need - 8, 0, 8);
        memcpy(at + used + lead, &record, sizeof record);
        memcpy(at + used + lead + sizeof record, COLUMN(self, TEXT, char) + offsets[node], record.namelen);
        used += need;
    }
    _PyBytes_Resize(&records, used);
    return records;
}

static PyMethodDef index_methods[] = {
    {"dirents", (PyCFunction)(void (*)(void))index_dirents, METH_FASTCALL,
     "dirents(nodeid, size, lead)\n--\n\nREADDIR records of a node and its later siblings, as many as fit into `size` "
     "bytes, each behind `lead` zero bytes."},
    {"find", (PyCFunction)(void (*)(void))index_find, METH_FASTCALL,
     "find(parent, name)\n--\n\nThe nodeid of a name in a directory, or 0."},
    {"link", (PyCFunction)(void (*)(void))index_link, METH_FASTCALL,
     "link(nodeid, parent, name)\n--\n\nMake a node, whose name is stored, the last one of a directory; False if the "
     "name is another node's."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot index_slots[] = {
    {Py_tp_new, index_new},
    {Py_tp_dealloc, index_free},
    {Py_tp_methods, index_methods},
    {Py_tp_doc, "Index(key, slots, parents, name_offsets, name_lengths, next_siblings, first_children, last_children, "
                "modes, text)\n--\n\nThe index of names over columns that lie elsewhere."},
    {0, NULL},
};

static PyType_Spec index_type = {
    .name = "famfs_server.volume._names.Index",
    .basicsize = sizeof(Index),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = index_slots,
};

static PyMethodDef methods[] = {
    {"name_hash", (PyCFunction)(void (*)(void))name_hash, METH_FASTCALL,
     "name_hash(key, parent, name)\n--\n\nThe keyed hash of a name in a directory, 64 bits without sign."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_names",
    .m_doc = "The index of names in a namespace.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__names(void)
{
    PyObject *module = PyModule_Create(&definition), *type;

    if (!module)
        return NULL;
    type = PyType_FromSpec(&index_type);
    if (!type || PyModule_AddObjectRef(module, "Index", type) < 0) {
        Py_XDECREF(type);
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(type);
    return module;
}
