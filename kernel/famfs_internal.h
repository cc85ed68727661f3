/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the files of the famfs side share with each other.
 */
#ifndef FAMFS_INTERNAL_H
#define FAMFS_INTERNAL_H

#include <linux/interval_tree.h>

#include "fuse_i.h"

/* Alignment of extents, and the only chunk size beside the page, where a dialect says 2 MiB. */
#define FAMFS_UNIT		(2ULL << 20)

/* A run of bytes of one device: an extent of a simple file, or a strip of a striped one. */
struct famfs_run {
	u32 slot;
	/* Where in the file it begins; of strips 0. */
	u64 start;
	u64 offset;
	u64 length;
	/* Where it is among the live ranges of its slot. */
	struct interval_tree_node live;
};

/* A part of a striped file: its bytes go round the strips, chunk by chunk. */
struct famfs_stripe {
	u64 bytes;
	u64 chunk;
	u32 first_run;
	u32 runs;
};

/* The bytes of a file, as the server has described them. Does not change once an inode has it. */
struct famfs_map {
	u64 file_size;
	/* The file is of no use until its inode is evicted. */
	bool failed;
	/* With guard=1: another live map, or another run of this one, shows the same page, and the file cannot be mapped. */
	bool shared;
	u32 runs;
	u32 stripes;
	struct famfs_run *run;
	struct famfs_stripe *stripe;
};

static inline struct famfs_map *famfs_map_of(struct inode *inode)
{
	/* Pairs with the release in famfs_install(). */
	return smp_load_acquire(&get_fuse_inode(inode)->famfs_map);
}

static inline struct famfs_conn *famfs_conn_of(struct inode *inode)
{
	return &get_fuse_conn(inode)->famfs;
}

static inline bool famfs_pushes(enum famfs_dialect dialect)
{
	return dialect == FAMFS_PUSH || dialect == FAMFS_PUSH_INTERLEAVE;
}

/* famfs_map.c */
struct famfs_map *famfs_map_parse(enum famfs_dialect dialect, const void *message, size_t size);
void famfs_map_free(struct famfs_map *map);

/*
 * Find the run that has the byte at @pos of the file: the slot, and in @piece where the piece around it begins in the
 * file, where on the device, and how long it is. -EIO if no run has it.
 */
struct famfs_piece {
	u32 slot;
	u64 start;
	u64 offset;
	u64 length;
};
int famfs_map_resolve(const struct famfs_map *map, u64 pos, struct famfs_piece *piece);

/* famfs_slots.c */
int famfs_slot_pull(struct fuse_conn *fc, u32 number, const char *path);
bool famfs_slots_ready(struct famfs_conn *famfs, const struct famfs_map *map);

/* famfs_params.c */
enum famfs_dialect famfs_parameter_dialect(void);

#endif
