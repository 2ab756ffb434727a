"""`mgpu-launch config` in its three forms."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mgpu.launch.commands.show_config import config_command
from mgpu.launch.settings.config import declared_options, load_config


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    for option in declared_options():
        monkeypatch.delenv(option.variable, raising=False)
    monkeypatch.setenv("MGPU_TP", "2")
    (tmp_path / "c.toml").write_text("max_rows = 9\nkv_memory = '1GiB'\n")
    return ["--config", str(tmp_path / "c.toml"), "-m", "demo"]


def test_json_has_values_and_origins(shown: list[str], tmp_path: Path) -> None:
    values = json.loads(CliRunner().invoke(config_command, [*shown, "--json"]).output)
    assert values["tp"] == {"value": 2, "origin": "MGPU_TP"}
    assert values["max_rows"] == {"value": 9, "origin": str(tmp_path / "c.toml")}
    assert values["seed"]["origin"] == "default"
    assert len(values) == len(declared_options())


def test_toml_is_a_file_that_gives_the_same_configuration(
    shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new.toml").write_text(CliRunner().invoke(config_command, [*shown, "--toml"]).output)
    monkeypatch.delenv("MGPU_TP")
    config, _ = load_config({}, {}, tmp_path / "new.toml")
    assert (config.model, config.tp, config.max_rows, config.kv_memory) == ("demo", 2, 9, 1 << 30)


def test_the_plain_form_is_a_line_an_option(shown: list[str]) -> None:
    assert len(CliRunner().invoke(config_command, shown).output.splitlines()) == len(declared_options())


@pytest.mark.parametrize(
    ("arguments", "sampling"),
    [((), "temperature 0.6, top_p 0.9"), (("--generation-config", "none"), "temperature 0 (greedy)")],
)
def test_the_models_sampling_is_shown(tmp_path: Path, arguments: tuple[str, ...], sampling: str) -> None:
    values = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    done = CliRunner().invoke(config_command, [str(tmp_path), *arguments])
    assert re.search(rf"^generation_config .*: {re.escape(sampling)}$", done.output, re.MULTILINE)


def test_without_a_model_only_options_are_shown() -> None:
    done = CliRunner().invoke(config_command, ["-m", "no/where"])
    assert done.exit_code == 0
    assert "temperature" not in done.output
