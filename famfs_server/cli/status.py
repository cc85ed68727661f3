# SPDX-License-Identifier: Apache-2.0
"""`famfs status`: what a mount tells about itself."""

import json

import click

from famfs_server.cli import program
from famfs_server.daemon.control_client import ControlClient


@program.tool("status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("mount")
def command(*, mount: str, as_json: bool) -> None:
    """Show the state of the file system mounted at MOUNT."""
    found = ControlClient.of_mount(mount).status()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"{found['device']} on {found['mount_point']}: role {found['role']}, data path {found['data_path']}")
    click.echo(f"  because {found['reason']}")
    click.echo(f"  kernel {found['kernel']}, server {found['version']}, uuid {found['uuid']}")
    entries, space = found["log"], found["space"]
    click.echo(f"  log {entries['entries']} of {entries['capacity']} entries, {found['files']} files")
    click.echo(f"  space {space['free']} of {space['capacity']} bytes free")
    for fault, count in found["skipped"].items():
        click.echo(f"  {count} entries not shown: {fault.replace('_', ' ')}")
    if found["damage"]:
        click.echo(f"  DAMAGED at log entry {found['damage']['index']}: {found['damage']['what']}")
    if found["lagging"]:
        click.echo(f"  lagging: log entry {entries['entries']} of another host is not whole yet")
    if found["foreign_writer"]:
        click.echo("  TWO MASTERS: somebody else has written to the log; nothing is created until the next mount")
    if found["takeovers"]:
        click.echo(f"  {found['takeovers']} takeovers")
