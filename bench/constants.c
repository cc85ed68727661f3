// SPDX-License-Identifier: Apache-2.0
//
// The limit of what a server with one thread on /dev/fuse can reach: a loop that answers every request with constants.
// It serves the tree of bench/trees.py (directories dNNNN with files fNNNNNNN, and one directory w) and answers with
// the flags and times that famfs-server answers with, so that the kernel sends both the same requests.
//
//   constants PLACE DIRECTORIES FILES_EACH WARM_FILES FILE_SIZE DIRECTORY_SECONDS LISTING_FLAGS [BYTES]
//
// DIRECTORY_SECONDS and LISTING_FLAGS are how long attributes of directories are cached, and the bits of INIT that
// decide between READDIR and READDIRPLUS. With BYTES, a file of FILE_SIZE bytes, a READ is answered out of a mapping of
// it, as a server does whose files are not all alike, and not with the same bytes each time. Prints "ready" once
// mounted; ends with the mount.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MAX_WRITE = 1 << 20, ROOM = MAX_WRITE + 8192, DAY = 86400 };
#define FILE_NODE (1ULL << 32)
#define ALLOW_MMAP (1U << 4) // FUSE_DIRECT_IO_ALLOW_MMAP, bit 36, which older headers lack
#ifndef FUSE_INIT_EXT
#define FUSE_INIT_EXT (1U << 30)
#endif
#define PARALLEL_WRITES (1U << 6) // FOPEN_PARALLEL_DIRECT_WRITES

static char request[ROOM], listing[ROOM], constant[MAX_WRITE], *bytes;
static int fuse;
static unsigned long directories, files_each, warm_files, file_size, directory_seconds, listing_flags;

static void reply(uint64_t unique, int error, const void *body, size_t length)
{
	struct fuse_out_header header = { .len = sizeof header + length, .error = -error, .unique = unique };
	struct iovec parts[] = { { &header, sizeof header }, { (void *)body, length } };

	if (writev(fuse, parts, length ? 2 : 1) < 0 && errno != ENOENT && errno != ENODEV)
		perror("constants: reply");
}

static struct fuse_attr attr_of(uint64_t node)
{
	int is_file = node >= FILE_NODE;
	return (struct fuse_attr){
		.ino = node,
		.size = is_file ? file_size : 0,
		.blocks = is_file ? file_size / 512 : 0,
		.mode = is_file ? S_IFREG | 0644 : S_IFDIR | 0755,
		.nlink = 1,
		.blksize = 4096,
	};
}

static struct fuse_entry_out entry_of(uint64_t node)
{
	return (struct fuse_entry_out){
		.nodeid = node,
		.entry_valid = DAY,
		.attr_valid = node >= FILE_NODE ? DAY : directory_seconds,
		.attr = attr_of(node),
	};
}

static uint64_t node_of(const char *name)
{
	switch (name[0]) {
	case 'f':
		return FILE_NODE + strtoul(name + 1, NULL, 10);
	case 'd':
		return 2 + strtoul(name + 1, NULL, 10);
	case 'w':
		return 2 + directories;
	}
	return 0;
}

static size_t list(uint64_t directory, uint64_t at, size_t room, int plus)
{
	size_t used = 0;
	uint64_t count = directory == FUSE_ROOT_ID ? directories : directory == 2 + directories ? warm_files : files_each;

	for (; at < count; at++) {
		char name[16];
		uint64_t number = directory == FUSE_ROOT_ID ? at : (directory - 2) * files_each + at;
		uint64_t node = directory == FUSE_ROOT_ID ? 2 + number : FILE_NODE + number;
		size_t length = sprintf(name, directory == FUSE_ROOT_ID ? "d%04lu" : "f%07lu", (unsigned long)number);
		size_t head = plus ? sizeof(struct fuse_entry_out) : 0;
		size_t need = FUSE_DIRENT_ALIGN(head + FUSE_NAME_OFFSET + length);

		if (used + need > room)
			break;
		memset(listing + used, 0, need);
		if (plus)
			*(struct fuse_entry_out *)(listing + used) = entry_of(node);
		struct fuse_dirent *entry = (struct fuse_dirent *)(listing + used + head);
		entry->ino = node;
		entry->off = at + 1;
		entry->namelen = length;
		entry->type = (node >= FILE_NODE ? S_IFREG : S_IFDIR) >> 12;
		memcpy(entry->name, name, length);
		used += need;
	}
	return used;
}

static void answer(const struct fuse_in_header *in, const char *body)
{
	switch (in->opcode) {
	case FUSE_INIT: {
		const struct fuse_init_in *init = (const void *)body;
		uint32_t wanted = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_PARALLEL_DIROPS | listing_flags |
				  FUSE_MAX_PAGES | FUSE_EXPLICIT_INVAL_DATA | FUSE_INIT_EXT;
		char out[64] = { 0 };
		struct fuse_init_out *answer = (void *)out;
		answer->major = FUSE_KERNEL_VERSION;
		answer->minor = init->minor < FUSE_KERNEL_MINOR_VERSION ? init->minor : FUSE_KERNEL_MINOR_VERSION;
		answer->max_readahead = init->max_readahead;
		answer->flags = wanted & init->flags;
		answer->max_write = MAX_WRITE;
		answer->max_pages = MAX_WRITE / 4096;
		answer->time_gran = 1;
		uint32_t high = ALLOW_MMAP;
		memcpy(out + 32, &high, sizeof high);
		reply(in->unique, 0, out, sizeof out);
		break;
	}
	case FUSE_LOOKUP: {
		struct fuse_entry_out out = entry_of(node_of(body));
		if (out.nodeid)
			reply(in->unique, 0, &out, sizeof out);
		else
			reply(in->unique, ENOENT, NULL, 0);
		break;
	}
	case FUSE_GETATTR: {
		struct fuse_attr_out out = { .attr_valid = in->nodeid >= FILE_NODE ? DAY : directory_seconds };
		out.attr = attr_of(in->nodeid);
		reply(in->unique, 0, &out, sizeof out);
		break;
	}
	case FUSE_OPEN: {
		struct fuse_open_out out = { .open_flags = FOPEN_DIRECT_IO | PARALLEL_WRITES };
		reply(in->unique, 0, &out, sizeof out);
		break;
	}
	case FUSE_OPENDIR: {
		struct fuse_open_out out = { 0 };
		reply(in->unique, 0, &out, sizeof out);
		break;
	}
	case FUSE_READ: {
		const struct fuse_read_in *read = (const void *)body;
		uint64_t left = read->offset < file_size ? file_size - read->offset : 0;
		reply(in->unique, 0, bytes ? bytes + read->offset : constant, read->size < left ? read->size : left);
		break;
	}
	case FUSE_WRITE: {
		struct fuse_write_out out = { .size = ((const struct fuse_write_in *)body)->size };
		reply(in->unique, 0, &out, sizeof out);
		break;
	}
	case FUSE_READDIR:
	case FUSE_READDIRPLUS: {
		const struct fuse_read_in *read = (const void *)body;
		size_t length = list(in->nodeid, read->offset, read->size, in->opcode == FUSE_READDIRPLUS);
		reply(in->unique, 0, listing, length);
		break;
	}
	case FUSE_STATFS: {
		struct fuse_statfs_out out = { .st = { .bsize = 4096, .namelen = 79, .frsize = 4096 } };
		reply(in->unique, 0, &out, sizeof out);
		break;
	}
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
		reply(in->unique, 0, NULL, 0);
		break;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
		break;
	default:
		reply(in->unique, ENOSYS, NULL, 0);
	}
}

int main(int count, char **arguments)
{
	char options[128];

	if (count != 8 && count != 9)
		return 2;
	directories = strtoul(arguments[2], NULL, 10);
	files_each = strtoul(arguments[3], NULL, 10);
	warm_files = strtoul(arguments[4], NULL, 10);
	file_size = strtoul(arguments[5], NULL, 10);
	directory_seconds = strtoul(arguments[6], NULL, 10);
	listing_flags = strtoul(arguments[7], NULL, 10);
	memset(constant, 'x', sizeof constant);
	if (count == 9) {
		int file = open(arguments[8], O_RDONLY | O_CLOEXEC);
		bytes = mmap(NULL, file_size, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
		if (bytes == MAP_FAILED) {
			perror("constants: bytes of files");
			return 1;
		}
	}
	fuse = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", fuse);
	if (fuse < 0 || mount("constants", arguments[1], "fuse", MS_NOSUID | MS_NODEV, options)) {
		perror("constants: mount");
		return 1;
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		ssize_t length = read(fuse, request, sizeof request);
		if (length >= (ssize_t)sizeof(struct fuse_in_header))
			answer((void *)request, request + sizeof(struct fuse_in_header));
		else if (length < 0 && errno != EINTR && errno != ENOENT && errno != EAGAIN)
			return errno != ENODEV;
	}
}
