/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The hash of names in the namespace's index: SipHash-1-3 (Aumasson and Bernstein), with a key of 128 bits.
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

static PyMethodDef methods[] = {
    {"name_hash", (PyCFunction)(void (*)(void))name_hash, METH_FASTCALL,
     "name_hash(key, parent, name)\n--\n\nThe keyed hash of a name in a directory, 64 bits without sign."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_names",
    .m_doc = "The hash of names in the namespace's index.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__names(void)
{
    return PyModule_Create(&definition);
}
