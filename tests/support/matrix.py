# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/compatibility.md that say what each kernel, dialect and format lead to, made from the code's own
tables. `python tests/support/matrix.py` prints them, to be put into the document."""

from collections.abc import Iterator

from famfs_server.fuse.abi import InitFlag
from famfs_server.fuse.dialects import (
    EVIDENCE_SYMBOL,
    GENERATIONS,
    Dialect,
    Evidence,
    ExtentKind,
    InitRequest,
    Registration,
    decide,
)
from famfs_server.omf import layout

_ANY = "every file"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _bit(dialect: Dialect) -> int:
    return dialect.capability.bit_length() - 1


def _recognised(dialect: Dialect) -> str:
    first, last = dialect.minors[0], dialect.minors[-1]
    minors = f"minor {last}" if first == last else f"minor up to {last}"
    if dialect.refusal is not None:
        return f"bit {_bit(dialect)}, {minors}"
    option = f"`-o dialect={dialect.name}`"
    if dialect.name not in _settled_by_looking(last):
        return f"bit {_bit(dialect)} and {option}: it looks like another one"
    return f"bit {_bit(dialect)}, {minors}; later minors with the symbol `{EVIDENCE_SYMBOL}`, or by {option}"


def _settled_by_looking(minor: int) -> set[str]:
    """The dialects that are found without an option, whether the kernel knows the ioctl for devices or not."""
    request = InitRequest(1, 7, minor, 0, InitFlag.DAX_FMAP | InitFlag.INIT_EXT)
    looks = [decide(request, policy="auto", evidence=Evidence(push_ioctl=known)) for known in (True, False)]
    return {found.dialect.name for found in looks if found.dialect is not None}


def _devices(dialect: Dialect) -> str:
    how = "asks for them" if dialect.registration is Registration.PULL else "is given them"
    number = dialect.max_devindex + 1
    return f"{how}; {'the first one' if number == 1 else f'up to {number}'}"


def kernels() -> Iterator[str]:
    """From kernel to dialect and data path."""
    yield _row("kernel", "known by", "dialect", "data path", "devices")
    yield "|---|---|---|---|---|"
    yield _row("5.2 and later, without famfs", "no such bit", "none", "server", "all that the host has")
    for dialect in GENERATIONS:
        refused = dialect.refusal is not None
        path = "server; `fmap=require` fails" if refused else "fmap"
        devices = "all that the host has" if refused else _devices(dialect)
        yield _row(dialect.title, _recognised(dialect), f"`{dialect.name}`", path, devices)


def _mapped(dialect: Dialect, omf: tuple[int, int]) -> str:
    if dialect.refusal is not None:
        return f"{_ANY}, read and written by the server"
    simple = "contiguous files"
    if dialect.max_extents < layout.MAX_SIMPLE_EXTENTS:
        simple += f" of at most {dialect.max_extents} extents"
    unrolled = f"as simple extents, up to {dialect.max_extents} chunks"
    if ExtentKind.INTERLEAVED not in dialect.extent_kinds or dialect.max_strips < layout.MAX_STRIPS:
        striped = f"striped files {unrolled}"
    elif dialect.chunk_sizes is None:
        striped = "striped files"
    else:
        sizes = [f"{size >> 20} MiB" for size in sorted(dialect.chunk_sizes) if not size % layout.ALLOC_UNIT]
        striped = f"striped files in chunks of {' or '.join(sizes)}, others {unrolled}"
    further = ""
    if omf >= (2, 2):
        last = dialect.max_devindex
        further = "; nothing on further devices" if not last else f"; on devices 0 to {last}"
    return f"{simple}; {striped}{further}"


def formats() -> Iterator[str]:
    """What can be mapped, for each dialect and format."""
    versions = sorted(layout.READABLE_VERSIONS.items(), reverse=True)
    written = (layout.VERSION, layout.OMF_VERSION)
    heads = []
    for version, omf in versions:
        made = ", what mkfs makes" if (version, omf) == written else ""
        heads.append(f"format {omf[0]}.{omf[1]} (superblock {version}){made}")
    yield _row("dialect", *heads, "any other format")
    yield "|---" * (len(heads) + 2) + "|"
    yield _row("none: server path", *(_ANY for _ in heads), "refused")
    for dialect in GENERATIONS:
        yield _row(f"`{dialect.name}`", *(_mapped(dialect, omf) for _, omf in versions), "refused")


if __name__ == "__main__":
    print("\n".join((*kernels(), "", *formats())))
