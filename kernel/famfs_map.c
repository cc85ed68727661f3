// SPDX-License-Identifier: GPL-2.0
/*
 * Extent maps: the answer to GET_FMAP is checked and kept, and positions in a file are looked up in it.
 *
 * Each dialect has checks of its own, and errors of its own (docs/protocol.md, "kernel rules"). A sum that overflows is
 * refused in all of them.
 */

#include "famfs_internal.h"

#include <linux/bsearch.h>
#include <linux/overflow.h>
#include <linux/slab.h>

struct famfs_wire_header {
	u8 file_type;
	u8 reserved0;
	__le16 version;
	__le32 kind;
	__le32 count;
	__le32 message_size;
	__le64 file_size;
	__le64 reserved1;
};

struct famfs_wire_run {
	__le32 slot;
	__le32 reserved;
	__le64 offset;
	__le64 length;
};

struct famfs_wire_stripe {
	__le32 runs;
	__le32 chunk;
	__le64 bytes;
	__le64 reserved;
};

static_assert(sizeof(struct famfs_wire_header) == 32);
static_assert(sizeof(struct famfs_wire_run) == 24);
static_assert(sizeof(struct famfs_wire_stripe) == 24);

enum { KIND_SIMPLE, KIND_INTERLEAVED };

#define PULL_LIMIT	32
#define STRIPS_LIMIT	32

/* What is left of a message, and what has been read of it. */
struct parser {
	enum famfs_dialect dialect;
	const u8 *at;
	size_t left;
	struct famfs_map *map;
	/* Bytes of all runs together. */
	u64 covered;
	/* Something was wrong that is told after everything else has been looked at. */
	bool bad;
};

static const void *take(struct parser *parser, size_t size)
{
	const void *at = parser->at;

	if (parser->left < size)
		return NULL;
	parser->at += size;
	parser->left -= size;
	return at;
}

/* Add the run that comes next in the message. @start is where in the file it begins. */
static int take_run(struct parser *parser, u64 start)
{
	const struct famfs_wire_run *wire = take(parser, sizeof(*wire));
	u64 unit = parser->dialect == FAMFS_PUSH_INTERLEAVE ? PAGE_SIZE : FAMFS_UNIT;
	u32 slots = parser->dialect == FAMFS_PUSH_INTERLEAVE ? FAMFS_SLOTS : 1;
	struct famfs_run *run = &parser->map->run[parser->map->runs];
	u64 end;

	if (!wire)
		return -EINVAL;
	run->slot = le32_to_cpu(wire->slot);
	run->offset = le64_to_cpu(wire->offset);
	run->length = le64_to_cpu(wire->length);
	run->start = start;
	if (run->slot >= slots || !IS_ALIGNED(run->offset, unit) || !IS_ALIGNED(run->length, unit))
		parser->bad = true;
	if (check_add_overflow(run->offset, run->length, &end) ||
	    check_add_overflow(parser->covered, run->length, &parser->covered))
		return -EINVAL;
	parser->map->runs++;
	return 0;
}

static int parse_simple(struct parser *parser, u32 count)
{
	int err;

	if (count > parser->left / sizeof(struct famfs_wire_run))
		return -EINVAL;
	parser->map->run = kvcalloc(count, sizeof(struct famfs_run), GFP_KERNEL_ACCOUNT);
	if (!parser->map->run)
		return -ENOMEM;
	while (count--) {
		err = take_run(parser, parser->covered);
		if (err)
			return err;
	}
	return 0;
}

/* The last byte of each strip that is used must lie inside it. */
static bool strips_suffice(const struct famfs_map *map, const struct famfs_stripe *stripe)
{
	u64 chunks = DIV_ROUND_UP_ULL(stripe->bytes, stripe->chunk);
	u64 last = min_t(u64, chunks, stripe->runs);
	u64 number;

	for (number = chunks - last; number < chunks; number++) {
		u32 strip;
		u64 turn = div_u64_rem(number, stripe->runs, &strip);
		u64 within = min(stripe->chunk, stripe->bytes - number * stripe->chunk);

		if (turn * stripe->chunk + within > map->run[stripe->first_run + strip].length)
			return false;
	}
	return true;
}

static bool chunk_allowed(enum famfs_dialect dialect, u64 chunk)
{
	if (dialect == FAMFS_PUSH_INTERLEAVE)
		return chunk == PAGE_SIZE || chunk == FAMFS_UNIT;
	/* So 0 passes; famfs_map_resolve() makes an error of it. */
	return IS_ALIGNED(chunk, FAMFS_UNIT);
}

static int take_stripe(struct parser *parser, u64 *described)
{
	const struct famfs_wire_stripe *wire = take(parser, sizeof(*wire));
	struct famfs_map *map = parser->map;
	struct famfs_stripe *stripe = &map->stripe[map->stripes];
	u32 strips;

	if (!wire)
		return -EINVAL;
	strips = le32_to_cpu(wire->runs);
	stripe->chunk = le32_to_cpu(wire->chunk);
	stripe->bytes = le64_to_cpu(wire->bytes);
	stripe->first_run = map->runs;
	stripe->runs = strips;
	if (!chunk_allowed(parser->dialect, stripe->chunk))
		return -EINVAL;
	if (!stripe->bytes || stripe->bytes > MAX_LFS_FILESIZE)
		return -EINVAL;
	if (strips > parser->left / sizeof(struct famfs_wire_run))
		return -EINVAL;
	if (!strips || strips > STRIPS_LIMIT)
		parser->bad = true;
	if (check_add_overflow(*described, stripe->bytes, described))
		return -EINVAL;
	while (strips--) {
		int err = take_run(parser, 0);

		if (err)
			return err;
	}
	if (parser->dialect == FAMFS_PUSH_INTERLEAVE && !parser->bad && !strips_suffice(map, stripe))
		return -EINVAL;
	map->stripes++;
	return 0;
}

static int parse_interleaved(struct parser *parser, u32 count)
{
	size_t most = parser->left / sizeof(struct famfs_wire_run);
	struct famfs_map *map = parser->map;
	u64 described = 0;
	int err;

	if (count > most)
		return -EINVAL;
	map->run = kvcalloc(most, sizeof(struct famfs_run), GFP_KERNEL_ACCOUNT);
	map->stripe = kvcalloc(count, sizeof(struct famfs_stripe), GFP_KERNEL_ACCOUNT);
	if (!map->run || !map->stripe)
		return -ENOMEM;
	while (count--) {
		err = take_stripe(parser, &described);
		if (err)
			return err;
	}
	if (parser->dialect == FAMFS_PUSH_INTERLEAVE && described < map->file_size)
		return -EINVAL;
	return 0;
}

static int parse(struct parser *parser)
{
	const struct famfs_wire_header *header = take(parser, sizeof(*header));
	u32 count, kind;
	int err = -EINVAL;

	if (!header)
		return parser->dialect == FAMFS_PULL ? -EINVAL : -EIO;
	count = le32_to_cpu(header->count);
	kind = le32_to_cpu(header->kind);
	parser->map->file_size = le64_to_cpu(header->file_size);
	if (!count || (parser->dialect == FAMFS_PULL && count > PULL_LIMIT))
		return -ERANGE;
	if (parser->map->file_size > MAX_LFS_FILESIZE)
		return -EINVAL;
	if (kind == KIND_SIMPLE)
		err = parse_simple(parser, count);
	else if (kind == KIND_INTERLEAVED && parser->dialect != FAMFS_PUSH)
		err = parse_interleaved(parser, count);
	if (err)
		return err;
	if (parser->bad || parser->covered < parser->map->file_size)
		return -EINVAL;
	return 0;
}

/* Check and take apart the answer to GET_FMAP. Gives the map, or the error that open(2) is to fail with. */
struct famfs_map *famfs_map_parse(enum famfs_dialect dialect, const void *message, size_t size)
{
	struct parser parser = { .dialect = dialect, .at = message, .left = size };
	int err;

	parser.map = kzalloc(sizeof(*parser.map), GFP_KERNEL_ACCOUNT);
	if (!parser.map)
		return ERR_PTR(-ENOMEM);
	err = parse(&parser);
	if (err) {
		famfs_map_free(parser.map);
		return ERR_PTR(err);
	}
	return parser.map;
}

void famfs_map_free(struct famfs_map *map)
{
	if (!map)
		return;
	kvfree(map->run);
	kvfree(map->stripe);
	kfree(map);
}

static int compare(const void *key, const void *element)
{
	const u64 pos = *(const u64 *)key;
	const struct famfs_run *run = element;

	if (pos < run->start)
		return -1;
	return pos - run->start >= run->length;
}

static int resolve_simple(const struct famfs_map *map, u64 pos, struct famfs_piece *piece)
{
	const struct famfs_run *run = bsearch(&pos, map->run, map->runs, sizeof(*run), compare);

	if (!run)
		return -EIO;
	*piece = (struct famfs_piece){
		.slot = run->slot,
		.start = run->start,
		.offset = run->offset,
		.length = run->length,
	};
	return 0;
}

int famfs_map_resolve(const struct famfs_map *map, u64 pos, struct famfs_piece *piece)
{
	u64 begin = 0;
	u32 number;

	if (!map->stripes)
		return resolve_simple(map, pos, piece);
	for (number = 0; number < map->stripes; number++) {
		const struct famfs_stripe *stripe = &map->stripe[number];
		u64 bytes = min(stripe->bytes, map->file_size);
		const struct famfs_run *run;
		u64 chunk, turn, start, within;
		u32 strip;

		if (pos - begin >= bytes) {
			begin += bytes;
			continue;
		}
		/*
		 * Kernels with the patches divide by this zero, and show wrong bytes where a part begins inside a
		 * page.
		 */
		if (!stripe->chunk || !PAGE_ALIGNED(begin))
			return -EIO;
		chunk = div64_u64(pos - begin, stripe->chunk);
		turn = div_u64_rem(chunk, stripe->runs, &strip);
		run = &map->run[stripe->first_run + strip];
		start = begin + chunk * stripe->chunk;
		within = turn * stripe->chunk;
		/* Kernels with the patches go on behind the strip. */
		if (within + (pos - start) >= run->length)
			return -EIO;
		*piece = (struct famfs_piece){
			.slot = run->slot,
			.start = start,
			.offset = run->offset + within,
			/* A fault wants the whole page that the file ends in. */
			.length = min3(stripe->chunk, run->length - within,
				       PAGE_ALIGN(bytes) - chunk * stripe->chunk),
		};
		return 0;
	}
	return -EIO;
}
