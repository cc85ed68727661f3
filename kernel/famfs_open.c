// SPDX-License-Identifier: GPL-2.0
/*
 * The map of an inode: it is fetched at the first open, and stays until the inode is evicted.
 */

#include "famfs_internal.h"

#include <linux/dax.h>
#include <linux/pagemap.h>
#include <linux/slab.h>
#include <linux/unaligned.h>

/* The largest answer to GET_FMAP that a server may ask room for. */
#define LARGEST_MESSAGE		(16UL << 20)

/* Where the message says how long it is, if it has its whole header. */
#define MESSAGE_SIZE_OFFSET	12
#define MESSAGE_HEADER_SIZE	32

struct famfs_daxdev_out {
	u16 index;
	u16 reserved0;
	u32 reserved1;
	u64 reserved2;
	u64 reserved3;
	char name[256];
};

static_assert(sizeof(struct famfs_daxdev_out) == 280);

/* ---- Requests */

/* GET_FMAP. Dialects that push say how large the answer may be. Gives its size, or an error. */
static ssize_t request_map(struct inode *inode, void *buffer, size_t size)
{
	struct fuse_getxattr_in room = { .size = size };
	FUSE_ARGS(args);

	args.opcode = FAMFS_GET_FMAP;
	args.nodeid = get_node_id(inode);
	if (famfs_pushes(famfs_conn_of(inode)->dialect)) {
		args.in_numargs = 1;
		args.in_args[0].size = sizeof(room);
		args.in_args[0].value = &room;
	}
	args.out_numargs = 1;
	args.out_argvar = true;
	args.out_args[0].size = size;
	args.out_args[0].value = buffer;
	return fuse_simple_request(get_fuse_mount(inode), &args);
}

/* How large the server says that the map is: 0 in a dialect where it cannot. */
static u32 announced(enum famfs_dialect dialect, const void *message, ssize_t size)
{
	if (!famfs_pushes(dialect) || size < MESSAGE_HEADER_SIZE)
		return 0;
	return get_unaligned_le32(message + MESSAGE_SIZE_OFFSET);
}

/* Ask for the map, once more where it needs more room than a page. */
static struct famfs_map *fetch_map(struct inode *inode)
{
	enum famfs_dialect dialect = famfs_conn_of(inode)->dialect;
	struct famfs_map *map;
	size_t room = PAGE_SIZE;
	bool again = false;
	void *message;
	ssize_t size;
	u32 wanted;

	for (;;) {
		message = kvmalloc(room, GFP_KERNEL_ACCOUNT);
		if (!message)
			return ERR_PTR(-ENOMEM);
		size = request_map(inode, message, room);
		if (size < 0) {
			map = ERR_PTR(size);
			break;
		}
		wanted = announced(dialect, message, size);
		if (wanted <= room) {
			map = famfs_map_parse(dialect, message, size);
			break;
		}
		map = ERR_PTR(wanted > LARGEST_MESSAGE ? -EFBIG : -EINVAL);
		if (again || wanted > LARGEST_MESSAGE)
			break;
		kvfree(message);
		again = true;
		room = wanted;
	}
	kvfree(message);
	return map;
}

/* GET_DAXDEV: the number of the slot takes the nodeid's place. */
static int fetch_device(struct fuse_mount *fm, u32 slot)
{
	struct famfs_daxdev_out *answer;
	FUSE_ARGS(args);
	int err;

	answer = kzalloc(sizeof(*answer) + 1, GFP_KERNEL);
	if (!answer)
		return -ENOMEM;
	args.opcode = FAMFS_GET_DAXDEV;
	args.nodeid = slot;
	args.out_numargs = 1;
	args.out_args[0].size = sizeof(*answer);
	args.out_args[0].value = answer;
	err = fuse_simple_request(fm, &args);
	if (!err && strnlen(answer->name, sizeof(answer->name)) == sizeof(answer->name))
		err = -ENAMETOOLONG;
	if (!err)
		err = famfs_slot_pull(fm->fc, slot, answer->name);
	kfree(answer);
	return err;
}

/* Ask for the devices that a map names and the connection has not. What fails is told by the first access. */
static void fetch_devices(struct inode *inode, const struct famfs_map *map)
{
	struct famfs_conn *famfs = famfs_conn_of(inode);
	u32 number, slot = U32_MAX;

	for (number = 0; number < map->runs; number++) {
		int err;

		if (map->run[number].slot == slot)
			continue;
		slot = map->run[number].slot;
		if (READ_ONCE(famfs->slots[slot].dax) || READ_ONCE(famfs->slots[slot].refused))
			continue;
		err = fetch_device(get_fuse_mount(inode), slot);
		if (err)
			pr_err("device of slot %u: error %d\n", slot, err);
	}
}

/* ---- Live ranges: where a page is mapped by way of two of them, evicting their inodes never ends */

static void track(struct famfs_conn *famfs, struct famfs_map *map)
{
	u32 number;

	mutex_lock(&famfs->lock);
	for (number = 0; number < map->runs; number++) {
		struct famfs_run *run = &map->run[number];
		struct rb_root_cached *live = &famfs->slots[run->slot].live;

		if (!run->length)
			continue;
		run->live.start = run->offset;
		run->live.last = run->offset + run->length - 1;
		if (interval_tree_iter_first(live, run->live.start, run->live.last)) {
			WARN(famfs->strict, "famfs: slot %u, %llu bytes at %llu: two maps of one page\n", run->slot,
			     run->length, run->offset);
			map->shared = famfs->guard;
		}
		interval_tree_insert(&run->live, live);
	}
	mutex_unlock(&famfs->lock);
}

static void untrack(struct famfs_conn *famfs, struct famfs_map *map)
{
	u32 number;

	mutex_lock(&famfs->lock);
	for (number = 0; number < map->runs; number++)
		if (map->run[number].length)
			interval_tree_remove(&map->run[number].live, &famfs->slots[map->run[number].slot].live);
	mutex_unlock(&famfs->lock);
}

/* ---- An inode's map */

/* What can still be done with an inode that has a map by way of the page cache: nothing. */
static int famfs_read_folio(struct file *file, struct folio *folio)
{
	folio_unlock(folio);
	return -EIO;
}

static const struct address_space_operations famfs_aops = {
	.read_folio = famfs_read_folio,
	.dirty_folio = noop_dirty_folio,
};

static void warn_of_install(struct inode *inode, const struct famfs_map *map)
{
	struct address_space *mapping = inode->i_mapping;

	WARN(mapping->nrpages, "famfs: nodeid %llu gets a map and has %lu pages in the cache\n", get_node_id(inode),
	     mapping->nrpages);
	WARN(mapping_mapped(mapping), "famfs: nodeid %llu gets a map and is mapped by a program\n", get_node_id(inode));
	WARN(i_size_read(inode) != map->file_size, "famfs: nodeid %llu had %lld bytes, by its map %llu\n",
	     get_node_id(inode), i_size_read(inode), map->file_size);
}

/*
 * From here on the kernel maps the file. With guard=1 it is -EBUSY as long as a program uses the page cache: a page beside
 * the dax core's entries makes page faults hang. Who wants to use the page cache later finds the map, under fi->lock.
 */
static int publish(struct inode *inode, struct famfs_map *map)
{
	struct fuse_inode *fi = get_fuse_inode(inode);
	int err = 0;

	spin_lock(&fi->lock);
	if (famfs_conn_of(inode)->guard && (fi->iocachectr > 0 || inode->i_mapping->nrpages)) {
		err = -EBUSY;
	} else {
		i_size_write(inode, map->file_size);
		inode->i_mapping->a_ops = &famfs_aops;
		inode->i_flags |= S_DAX;
		/* Pairs with famfs_map_of(). */
		smp_store_release(&fi->famfs_map, map);
	}
	spin_unlock(&fi->lock);
	return err;
}

/* Give an inode its map, or free the map. Of two maps that were fetched at once the first counts. */
static int install(struct inode *inode, struct famfs_map *map)
{
	struct famfs_conn *famfs = famfs_conn_of(inode);
	int err = 0;

	filemap_invalidate_lock(inode->i_mapping);
	if (famfs_map_of(inode))
		goto out_free;
	if (famfs->strict)
		warn_of_install(inode, map);
	if (famfs->guard)
		err = invalidate_inode_pages2(inode->i_mapping);
	if (err)
		goto out_free;
	track(famfs, map);
	err = publish(inode, map);
	if (!err)
		goto out;
	untrack(famfs, map);
out_free:
	famfs_map_free(map);
out:
	filemap_invalidate_unlock(inode->i_mapping);
	return err;
}

/* A regular file is opened: an inode without a map gets one. The error is that of open(2). */
int famfs_open(struct inode *inode)
{
	struct famfs_conn *famfs = famfs_conn_of(inode);
	struct famfs_map *map;

	if (!READ_ONCE(famfs->active) || !S_ISREG(inode->i_mode) || famfs_map_of(inode))
		return 0;
	map = fetch_map(inode);
	if (IS_ERR(map)) {
		pr_debug("nodeid %llu gets no map: error %ld\n", get_node_id(inode), PTR_ERR(map));
		return PTR_ERR(map);
	}
	if (famfs->dialect == FAMFS_PULL)
		fetch_devices(inode, map);
	else
		map->failed = !famfs_slots_ready(famfs, map);
	return install(inode, map);
}

/*
 * Whether NOTIFY_STORE must not put pages into the cache of an inode: the dax core does not survive it. With guard=1 it
 * is refused also for an inode that may be given a map at the same time.
 */
bool famfs_refuses_store(struct inode *inode)
{
	struct famfs_conn *famfs = famfs_conn_of(inode);

	bool mapped = famfs_map_of(inode);

	WARN(famfs->strict && mapped, "famfs: nodeid %llu has a map, and gets pages by NOTIFY_STORE\n",
	     get_node_id(inode));
	return famfs->guard || mapped;
}

static bool guarded(struct inode *inode)
{
	return famfs_conn_of(inode)->guard && famfs_map_of(inode);
}

/* Programs shall see a new size at their next access; the pages stay, and are the same. */
void famfs_truncate_pagecache(struct inode *inode, loff_t size)
{
	if (guarded(inode))
		unmap_mapping_range(inode->i_mapping, 0, 0, 0);
	else
		(truncate_pagecache)(inode, size);
}

void famfs_truncate_pagecache_range(struct inode *inode, loff_t start, loff_t end)
{
	if (!guarded(inode))
		(truncate_pagecache_range)(inode, start, end);
}

void famfs_truncate_inode_pages_range(struct address_space *mapping, loff_t start, loff_t end)
{
	if (!guarded(mapping->host))
		(truncate_inode_pages_range)(mapping, start, end);
}

/* NOTIFY_INVAL_INODE; it is harmless on kernels with the patches, too. */
int famfs_invalidate_inode_pages2_range(struct address_space *mapping, pgoff_t start, pgoff_t end)
{
	if (famfs_map_of(mapping->host))
		return 0;
	return (invalidate_inode_pages2_range)(mapping, start, end);
}

/* The server says another mtime. */
int famfs_invalidate_inode_pages2(struct address_space *mapping)
{
	if (guarded(mapping->host))
		return 0;
	return (invalidate_inode_pages2)(mapping);
}

/* The inode goes: wait until nobody uses its pages, before the page cache is looked through. */
void famfs_evict_begin(struct inode *inode)
{
	if (famfs_map_of(inode))
		dax_break_layout_final(inode);
}

/* The inode is gone, and FORGET has not been sent. */
void famfs_evict_end(struct inode *inode)
{
	struct fuse_inode *fi = get_fuse_inode(inode);
	struct famfs_map *map = fi->famfs_map;

	if (!map)
		return;
	fi->famfs_map = NULL;
	untrack(famfs_conn_of(inode), map);
	famfs_map_free(map);
}
