"""Which files of a repository are fetched."""

import pytest

from mgpu.orchestrator.errors import ModelError
from mgpu.orchestrator.models.hub_files import INDEX, gguf_files, is_gguf_wanted, small_files, weight_files
from mgpu.orchestrator.models.hub_names import HubName

NAME = HubName("org/model")
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
UNWANTED = ["pytorch_model.bin", "model.pth", "modeling_x.py", "original/consolidated.00.pth", "onnx/model.onnx",
            "consolidated.safetensors", "adapter_model.safetensors", "README.md", "tf_model.h5", "tokenizer.model",
            "original/model.safetensors"]  # fmt: skip


def test_configuration_tokenizer_and_index_come_first() -> None:
    files = SMALL + UNWANTED + SHARDS + [INDEX]
    assert sorted(small_files(NAME, files, "all")) == sorted([*SMALL, INDEX])
    assert sorted(small_files(NAME, files, "no weights")) == sorted(SMALL)
    assert small_files(NAME, files, "config") == ["config.json", "generation_config.json"]


def test_a_whole_file_makes_the_shards_and_their_index_needless() -> None:
    files = [*SMALL, *SHARDS, INDEX, "model.safetensors", "model.fp16.safetensors"]
    assert INDEX not in small_files(NAME, files, "all")
    assert weight_files(NAME, files, {"a": SHARDS[0]}) == ["model.safetensors"]


def test_the_index_says_which_shards() -> None:
    files = [*SHARDS, "model-00001-of-00009.safetensors", *UNWANTED]
    assert weight_files(NAME, files, {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[1]}) == SHARDS


def test_without_an_index_all_safetensors_count() -> None:
    assert weight_files(NAME, [*SHARDS, *UNWANTED], None) == SHARDS
    assert weight_files(NAME, ["pytorch.safetensors"], None) == ["pytorch.safetensors"]


@pytest.mark.parametrize(("files", "index"), [
    (SHARDS[:1], {"a": SHARDS[0], "b": SHARDS[1]}), (SHARDS[:1], None), ([], None), (SHARDS, {"a": "../x"}),
    (SHARDS, {}),
])  # fmt: skip
def test_a_shard_that_is_absent_is_named(files: list[str], index: dict[str, object] | None) -> None:
    with pytest.raises(ModelError, match="is not there"):
        weight_files(NAME, files, index)


@pytest.mark.parametrize(("files", "said"), [
    (["config.json", "pytorch_model.bin"], r"only pytorch_model\.bin: mgpu loads no pickles.*org/model-GGUF"),
    (["config.json", "README.md"], "no weights: neither"),
    (["config.json", "m-Q8_0.gguf", "m-Q4_0.gguf"], "Name one: org/model:Q4_0, org/model:Q8_0"),
    (["README.md"], r"neither config\.json nor \.gguf"),
])  # fmt: skip
def test_a_repository_without_weights_says_what_it_has(files: list[str], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        small_files(NAME, files, "all")


# GGUF

MANY = ["README.md", "model-Q4_K.gguf", "model-Q4_K_M.gguf", "model.IQ4_XS.gguf", "model-q8_0.gguf", "mmproj-F16.gguf",
        "imatrix_unsloth.gguf", "UD/model-UD-Q4_K_XL.gguf",
        *(f"Q6_K/model-Q6_K-0000{part}-of-00003.gguf" for part in (1, 2, 3))]  # fmt: skip


@pytest.mark.parametrize(("quant", "expected"), [
    ("Q4_K_M", ["model-Q4_K_M.gguf"]), ("q4_k_m", ["model-Q4_K_M.gguf"]), ("Q4_K", ["model-Q4_K.gguf"]),
    ("IQ4_XS", ["model.IQ4_XS.gguf"]), ("Q8_0", ["model-q8_0.gguf"]), ("UD-Q4_K_XL", ["UD/model-UD-Q4_K_XL.gguf"]),
    ("Q4_K_XL", ["UD/model-UD-Q4_K_XL.gguf"]), ("Q6_K", MANY[-3:]), ("model-Q4_K", ["model-Q4_K.gguf"]),
])  # fmt: skip
def test_a_quantization_names_its_file_or_all_parts_of_it(quant: str, expected: list[str]) -> None:
    assert gguf_files(HubName("org/model", quant=quant), MANY) == expected


@pytest.mark.parametrize("part", [1, 2, 3])
def test_any_part_of_a_split_file_names_all_of_them(part: int) -> None:
    name = HubName("org/model", file=f"Q6_K/model-Q6_K-0000{part}-of-00003.gguf")
    assert gguf_files(name, MANY) == MANY[-3:]


@pytest.mark.parametrize(("quant", "said"), [
    ("Q2_K", r"no GGUF file of org/model is Q2_K\. It has .*org/model:Q4_K_M \(2\.0 GB\)"), ("Q4", "no GGUF file"),
    ("XS", "no GGUF file"), ("F16", "no GGUF file"), ("model", "several files are model.*org/model:IQ4_XS"),
])  # fmt: skip
def test_no_match_and_several_list_what_there_is(quant: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        gguf_files(HubName("org/model", quant=quant), MANY, dict.fromkeys(MANY, 2 * 10**9))


def test_files_that_have_the_same_quantization_are_listed_by_their_names() -> None:
    files = ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"]
    with pytest.raises(ModelError, match=r"org/model/a-Q4_K_M\.gguf@v1, org/model/b-Q4_K_M\.gguf@v1"):
        gguf_files(HubName("org/model", "v1", quant="Q4_K_M"), files)


def test_a_repository_without_gguf_files_names_the_other_way() -> None:
    with pytest.raises(ModelError, match="has no GGUF files; without :Q4_K_M, --quant 8, 4 or fp8"):
        gguf_files(HubName("org/model", quant="Q4_K_M"), ["config.json", *SHARDS])


def test_a_file_that_is_not_there_and_a_part_that_is_missing() -> None:
    with pytest.raises(ModelError, match=r"org/model has no file x\.gguf\. It has .*org/model:Q4_K,"):
        gguf_files(HubName("org/model", file="x.gguf"), MANY)
    with pytest.raises(ModelError, match=r"Q6_K-00003-of-00003\.gguf is not there, one of 3 parts"):
        gguf_files(HubName("org/model", quant="Q6_K"), MANY[:-1])


def test_which_format_a_repository_is_taken_in() -> None:
    both = ["config.json", "model.safetensors", "model-Q8_0.gguf"]
    assert not is_gguf_wanted(NAME, both)
    assert is_gguf_wanted(HubName("org/model", quant="Q8_0"), both)
    assert is_gguf_wanted(NAME, ["model-Q8_0.gguf", "README.md"])
    assert gguf_files(NAME, ["model-Q8_0.gguf", "mmproj.gguf", "README.md"]) == ["model-Q8_0.gguf"]
    assert not is_gguf_wanted(NAME, ["mmproj.gguf"])
