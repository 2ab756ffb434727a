"""``mgpu-launch install-service``: put the systemd unit where systemd finds it, made for this installation."""

import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import click

from mgpu.launch.completion import complete_model
from mgpu.launch.pages.help import Command
from mgpu.launch.settings.config import ServeConfig, load_config
from mgpu.launch.settings.config_file import absolute, toml_value
from mgpu.orchestrator.errors import UserError

PACKAGED_LAUNCHER = "/usr/bin/mgpu-launch"
"""The launcher in the shipped units, to be replaced by that of this installation."""
HIDDEN = (Path("/home"), Path("/root"), Path("/run/user"))
"""Folders that ProtectHome=yes hides from the system service."""
REPLACED = (Path("/tmp"), Path("/var/tmp"))
"""Folders that PrivateTmp=yes replaces by empty ones."""
_MAX_LINKS = 40
"""As many as Linux follows."""
_EXAMPLE_MODEL = 'model = "/var/lib/mgpu/models/NAME-OF-THE-MODEL"'
_USERS_WORDS = (
    ("systemctl ", "systemctl --user "),
    ("that the service's user can read, not below /home or\n# /tmp. Or a hub id that is in its cache already: the "
     "service does not reach the network.", "that you can read. Or a hub id."),
    ("the service's own user, and root,", "you, and root,"),
    ("sudo mgpu-launch keygen --out /etc/mgpu/", "mgpu-launch keygen --out ~/.config/mgpu/"),
)  # fmt: skip
"""What the comments of the example say to a user with a service of their own."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_UNIT_PATH = re.compile(r"/[\w/.+@-]+")


class InstallError(UserError):
    """The service cannot be installed as asked."""


class NoPermission(InstallError):
    """A folder may not be written to by this user."""

    exit_code = 77


@dataclass(frozen=True, slots=True)
class ServiceFile:
    """One file to write. ``keep``: an existing one belongs to the user and stays."""

    path: Path
    text: str
    keep: bool = False


@click.command(
    "install-service",
    cls=Command,
    short_help="Install a systemd service.",
    examples=(
        "sudo mgpu-launch install-service qwen3-32b -m /srv/models/Qwen3-32B",
        "mgpu-launch install-service qwen3-32b --user",
    ),
)
@click.argument("name")
@click.option(
    "-m", "--model", default="", shell_complete=complete_model,
    help="The model that the new configuration names, as for serve.",
)  # fmt: skip
@click.option("--user", is_flag=True, help="Install a service of this user, without root, instead of a system service.")
@click.option("--root", type=click.Path(path_type=Path, file_okay=False), help="Write below this folder instead of /.")
@click.option("--dry-run", is_flag=True, help="Show what would be written, and write nothing.")
def install_service_command(name: str, model: str, user: bool, root: Path | None, dry_run: bool) -> None:
    """Install the systemd unit mgpu@.service and a configuration for mgpu@NAME, and say what to type next.

    An existing configuration is kept. Nothing is started.
    """
    launcher = find_launcher()
    if not user and root is None:  # below another root, it is for another machine
        _require(dry_run, lambda: check_reachable([launcher, *installation_paths()]))
    config = config_dir(user, os.environ) / f"{checked_name(name)}.toml"
    model = absolute(model)
    files = [at_root(file, root) for file in service_files(config, user, launcher, model)]
    kept = [file for file in files if file.keep and is_there(file.path)]
    for file in kept:
        found, _ = load_config({}, {}, file.path)  # a ConfigError now is better than a service that does not start
        if model and found.model != model:
            raise InstallError(f"{file.path} is kept and has model = {found.model!r}; change it there, or remove it")
        if not user and root is None:
            _require(dry_run, partial(check_named, file.path, found))
    if model and not kept and root is None:
        _require(dry_run, lambda: check_model(config, model, user))
    for file in files:
        if file in kept:
            click.echo(f"kept {file.path}")
        elif dry_run:
            click.echo(f"would write {file.path}:\n\n{file.text}")
        else:
            write(file)
            click.echo(f"wrote {file.path}")
    click.echo(
        "\nNext:\n" + "\n".join(f"  {line}" for line in next_commands(name, config, user, launcher, bool(model)))
    )


def _require(is_dry_run: bool, check: Callable[[], None]) -> None:
    """Run a check. A dry run writes nothing, so it warns and goes on to show the files."""
    try:
        check()
    except InstallError as error:
        if not is_dry_run:
            raise
        click.secho(f"warning: without --dry-run this is refused: {error}", fg="yellow", err=True)


def checked_name(name: str) -> str:
    """Return the instance's name. InstallError when it cannot name both a unit and a file."""
    if not _NAME.fullmatch(name):
        raise InstallError(f"{name!r} cannot name a service; use letters, digits, '_', '-' and '.', such as qwen3-32b")
    return name


def find_launcher() -> str:
    """Return the absolute path of this installation's ``mgpu-launch``."""
    launcher = Path(sys.executable).parent / "mgpu-launch"
    if not os.access(launcher, os.X_OK):
        raise InstallError(f"{launcher} is missing; install mgpu into this environment with pip")
    if not _UNIT_PATH.fullmatch(str(launcher)):
        raise InstallError(f"{launcher}: a unit file cannot name this path; install mgpu below one like /opt/mgpu")
    return str(launcher)


def installation_paths() -> list[str]:
    """List the paths that a process of this installation reads: the interpreter, its library, the package."""
    return [sys.executable, sys.prefix, sys.base_prefix, str(resources.files("mgpu.launch"))]


def check_reachable(paths: Iterable[str]) -> None:
    """Raise InstallError when the system service, another user in a sandbox, could not read one of these paths."""
    way_out = "install it for the whole machine (python3 -m venv /opt/mgpu), or use --user"
    for path in map(Path, paths):
        _check_hidden(path, HIDDEN, f"mgpu runs from {path}", way_out)
        for folder in (path, *path.parents, *path.resolve().parents):
            if folder.is_dir() and not folder.stat().st_mode & stat.S_IXOTH:
                mode = stat.S_IMODE(folder.stat().st_mode)
                raise InstallError(f"mgpu runs from {path}, and {folder} is closed to others ({mode:04o}): {way_out}")
        _check_hidden(path, REPLACED, f"mgpu runs from {path}", way_out)


def check_named(file: Path, config: ServeConfig) -> None:
    """Raise InstallError when a configuration, or what it names by an absolute path, is hidden from the service."""
    named = {f"the configuration {file}": str(file)}
    for option in ("model", "keys", "bind"):
        value = str(getattr(config, option)).removeprefix("ipc://")
        named[f"{file} has {option} = {value!r}"] = value
    for subject, path in named.items():
        if path.startswith("/"):
            way_out = "move it, such as below /var/lib/mgpu, or use --user"
            _check_hidden(Path(path), HIDDEN + REPLACED, subject, way_out)


def check_model(config: Path, model: str, user: bool) -> None:
    """Raise InstallError for a path that does not exist, or that the system service cannot see."""
    if model.startswith(("/", ".")) and not os.path.exists(model):
        raise InstallError(f"-m {model}: no such file or folder")
    if not user:
        check_named(config, ServeConfig(model=model))


def _check_hidden(path: Path, hidden_folders: Iterable[Path], subject: str, way_out: str) -> None:
    for place in places_on_the_way(path):
        for hidden in hidden_folders:
            if place.is_relative_to(hidden) or place.is_relative_to(os.path.realpath(hidden)):
                link = "" if place == path else f", which leads to {place}"
                raise InstallError(f"{subject}{link}, and {hidden} is hidden from a system service: {way_out}")


def places_on_the_way(path: Path) -> list[Path]:
    """Return every path that the system passes on the way to ``path``: itself, and one for each link followed."""
    places = [Path(os.path.normpath(path))]
    for _ in range(_MAX_LINKS):
        here = places[-1]
        link = next((part for part in (*reversed(here.parents), here) if part.is_symlink()), None)
        if link is None:
            break
        places.append(Path(os.path.normpath(link.parent / os.readlink(link) / here.relative_to(link))))
    return places


def config_dir(user: bool, environ: Mapping[str, str]) -> Path:
    """Return the folder that the unit's %E/mgpu stands for."""
    own = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return own / "mgpu" if user else Path("/etc/mgpu")


def service_files(config: Path, user: bool, launcher: str, model: str = "") -> Iterator[ServiceFile]:
    """Yield the files of a service, the configuration last."""
    unit_dir = config.parent.parent / "systemd" / ("user" if user else "system")
    unit = shipped("mgpu-user@.service" if user else "mgpu@.service")
    yield ServiceFile(unit_dir / "mgpu@.service", unit.replace(PACKAGED_LAUNCHER, launcher))
    if not user:
        yield ServiceFile(Path("/etc/sysusers.d/mgpu.conf"), shipped("mgpu.sysusers.conf"))
        yield ServiceFile(Path("/etc/tmpfiles.d/mgpu.conf"), shipped("mgpu.tmpfiles.conf"))
    yield ServiceFile(config, example_config(model, user), keep=True)


def example_config(model: str, user: bool = False) -> str:
    """Return the shipped configuration, with this model if one is named."""
    text = shipped("example.toml")
    for of_system, of_user in _USERS_WORDS if user else ():
        text = text.replace(of_system, of_user)
    return text.replace(_EXAMPLE_MODEL, f"model = {toml_value(model)}") if model else text


def shipped(name: str) -> str:
    """Read one of the files in ``launch/systemd``."""
    return (resources.files("mgpu.launch") / "systemd" / name).read_text(encoding="utf-8")


def at_root(file: ServiceFile, root: Path | None) -> ServiceFile:
    """Move a file below another root."""
    if root is None:
        return file
    return ServiceFile(root.absolute() / file.path.relative_to("/"), file.text, file.keep)


def is_there(path: Path) -> bool:
    """Return True if a file exists. NoPermission when this user may not look."""
    try:
        return path.exists()
    except PermissionError as error:
        raise _no_permission(path, "read") from error


def write(file: ServiceFile) -> None:
    """Write a file that all users may read, by one rename. NoPermission names the folder."""
    new = file.path.with_name(f".{file.path.name}.new")
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(file.text, encoding="utf-8")
        new.chmod(0o644)
        new.replace(file.path)
    except PermissionError as error:
        raise _no_permission(file.path, "write") from error
    except OSError as error:
        raise InstallError(f"cannot write {file.path}: {error.strerror}") from error


def _no_permission(path: Path, verb: str) -> NoPermission:
    return NoPermission(f"no permission to {verb} {path}: run it with sudo, or use --user for a service of your own")


def next_commands(name: str, config: Path, user: bool, launcher: str, has_model: bool = False) -> list[str]:
    """Return what to type after the files are written."""
    edit = [] if has_model else [f"{'$EDITOR' if user else 'sudoedit'} {config}    # name the model"]
    if user:
        return [
            *edit,
            f"{launcher} plan --config {config}    # does it fit?",
            "systemctl --user daemon-reload",
            f"systemctl --user enable --now mgpu@{name}",
            f"systemctl --user status mgpu@{name}; journalctl --user -fu mgpu@{name}",
            "loginctl enable-linger    # to keep it running when you log out",
        ]
    return [
        "sudo systemd-sysusers mgpu.conf && sudo systemd-tmpfiles --create mgpu.conf",
        *edit,
        f"sudo -u mgpu {launcher} plan --config {config}    # does it fit, may the service read it?",
        "sudo systemctl daemon-reload",
        f"sudo systemctl enable --now mgpu@{name}",
        f"systemctl status mgpu@{name}; journalctl -fu mgpu@{name}",
    ]
