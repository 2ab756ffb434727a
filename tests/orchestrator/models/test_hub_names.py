"""How a model of the hub may be named, and what each name means."""

import pytest

from mgpu.orchestrator.errors import ModelError
from mgpu.orchestrator.models.hub_names import HubName, parse_hub_name

FILE = "model-Q4_K_M.gguf"
REPO = "org/name-GGUF"
HUB = "https://huggingface.co"
NAMES: dict[str, HubName] = {
    "org/name": HubName("org/name"),
    " org/name ": HubName("org/name"),
    "Qwen/Qwen3-0.6B": HubName("Qwen/Qwen3-0.6B"),
    "org/name@main": HubName("org/name"),
    "org/name@v1.0": HubName("org/name", "v1.0"),
    "org/name@0123abc": HubName("org/name", "0123abc"),
    "org/name@refs/pr/3": HubName("org/name", "refs/pr/3"),
    f"{REPO}:Q4_K_M": HubName(REPO, quant="Q4_K_M"),
    f"{REPO}:UD-Q4_K_XL": HubName(REPO, quant="UD-Q4_K_XL"),
    f"{REPO}:Q4_K_M@v1": HubName(REPO, "v1", quant="Q4_K_M"),
    f"{REPO}@v1:Q4_K_M": HubName(REPO, "v1", quant="Q4_K_M"),
    f"{REPO}@refs/pr/3:Q8_0": HubName(REPO, "refs/pr/3", quant="Q8_0"),
    f"{REPO}/{FILE}": HubName(REPO, file=FILE),
    f"{REPO}/{FILE}@v1": HubName(REPO, "v1", FILE),
    f"{REPO}@v1/{FILE}": HubName(REPO, "v1", FILE),
    f"{REPO}@refs/pr/3/{FILE}": HubName(REPO, "refs/pr/3", FILE),
    f"{REPO}/Q8_0/m-00001-of-00002.GGUF": HubName(REPO, file="Q8_0/m-00001-of-00002.GGUF"),
    "hf:org/name": HubName("org/name"),
    "hf://org/name@v1": HubName("org/name", "v1"),
    "HF.co/org/name:Q8_0": HubName("org/name", quant="Q8_0"),
    "huggingface.co/org/name": HubName("org/name"),
    HUB + "/org/name": HubName("org/name"),
    HUB + "/org/name/": HubName("org/name"),
    HUB + "/org/name:Q8_0": HubName("org/name", quant="Q8_0"),
    "http://hf.co/org/name?library=transformers#top": HubName("org/name"),
    HUB + f"/{REPO}?show_file_info={FILE}": HubName(REPO, file=FILE),
    HUB + "/org/name/tree/main": HubName("org/name"),
    HUB + "/org/name/tree/v1": HubName("org/name", "v1"),
    HUB + f"/{REPO}/resolve/main/{FILE}?download=true": HubName(REPO, file=FILE),
    HUB + f"/{REPO}/blob/v1/Q8_0/{FILE}": HubName(REPO, "v1", f"Q8_0/{FILE}"),
    HUB + f"/{REPO}/blob/refs%2Fpr%2F7/{FILE}": HubName(REPO, "refs/pr/7", FILE),
    HUB + f"/{REPO}/resolve/refs/pr/7/{FILE}": HubName(REPO, "refs/pr/7", FILE),
    HUB + f"/{REPO}/resolve/main/a%20b.gguf": HubName(REPO, file="a b.gguf"),
    "https://mirror.example:8443/hub/org/name": HubName("org/name"),
    f"https://MIRROR.example:8443/hub/{REPO}/resolve/main/{FILE}": HubName(REPO, file=FILE),
}


@pytest.mark.parametrize("text", NAMES)
def test_a_name_of_the_hub(text: str) -> None:
    assert parse_hub_name(text, "https://mirror.example:8443/hub") == NAMES[text]


@pytest.mark.parametrize("name", [name for name in NAMES.values() if " " not in name.file])
def test_a_name_that_is_shown_means_the_same(name: HubName) -> None:
    assert parse_hub_name(str(name)) == name


@pytest.mark.parametrize("text", [
    "", "demo", "name", "a/b/c", "org/m.gguf", "./org/name", "/org/name", "../name", "org/../name.gguf", "org//name",
    "org/name/", "org/name:", "org/name@", "org/name@..", "org/name@a b", "org/name:a:b", "org/name:a@v1:b",
    "org/name/x.gguf:Q8_0", "org/name/../x.gguf", "org/name/.", "org/name/x.bin", "a b/c", "ö/ä", "org/-name",
    "org/" + "x" * 97, "C:\\models\\x.gguf", "org/na\0me", "org/name@refs/heads/x/y.gguf",
])  # fmt: skip
def test_what_has_no_form_of_the_hub(text: str) -> None:
    assert parse_hub_name(text) is None


@pytest.mark.parametrize(("text", "problem"), [
    ("https://example.com/org/name", "HF_ENDPOINT"),
    (HUB, "not the name"),
    (HUB + "/org", "not the name"),
    (HUB + "/datasets/org/name", "address of datasets"),
    (HUB + "/spaces/org/name", "address of spaces"),
    (HUB + "/api/models/org/name", "address of api"),
    (HUB + "/org/name/blob/main/model.safetensors", "org/name alone names the whole model"),
    (HUB + "/org/name/tree/main/subfolder", "org/name alone names the whole model"),
    (HUB + "/org/name/resolve/main/..%2F..%2Fx.gguf", "not a .gguf file"),
    (HUB + "/org/name/discussions/1", "not the name"),
    ("https://[::1/org/name", "not an address"),
    ("hf:name", "not the name"), ("hf://", "not the name"), ("hf.co/a/b/c/d", "not the name"),
])  # fmt: skip
def test_an_address_of_something_else_is_an_error_with_the_forms(text: str, problem: str) -> None:
    with pytest.raises(ModelError, match=problem) as caught:
        parse_hub_name(text)
    assert "ORG/NAME:Q4_K_M" in str(caught.value)
