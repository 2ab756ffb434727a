"""The manual page has all that help has, as roff."""

import re

import click

from mgpu.launch.cli import COMMANDS, cli
from mgpu.launch.pages.manual import manual
from mgpu.launch.settings.config import declared_options


def test_every_command_and_every_option_of_serve_is_on_the_page() -> None:
    page = manual(cli, "mgpu-launch")
    plain = page.replace("\\-", "-")
    for name in COMMANDS:
        assert f".SS mgpu-launch {name}\n" in plain
    assert ".SS mgpu-launch bench decode\n" in plain
    for option in declared_options():
        assert option.flag in plain
    assert "mgpu-launch \\- " not in plain.split(".SH NAME")[0]
    assert re.search(r"^\.EX\nmgpu-launch serve demo", plain, re.MULTILINE)


def test_no_text_is_taken_for_a_request_of_roff() -> None:
    odd = click.Group("x", help=".SH a \\fB b", commands={"y": click.Command("y", help="'quoted' -m")})
    lines = manual(odd, "x").splitlines()
    assert "x \\- \\&.SH a \\efB b" in lines
    assert "\\&'quoted' \\-m" in lines
