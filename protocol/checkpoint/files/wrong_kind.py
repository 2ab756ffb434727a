"""Say what a file or a folder is that is not what its name promises: the usual slips of a download."""

from pathlib import Path

HEAD_BYTES = 64
"""How much of a file tells its kind."""
_LFS = "is a pointer of Git LFS, and not the file itself: type `git lfs pull` in the repository, or download the file"
_KINDS = (
    (b"version https://git-lfs", _LFS),
    (b"/annex/objects/", "is a pointer of git-annex, and not the file itself: type `git annex get` in the repository"),
    (b"<!doctype html", "is a web page (HTML), and not the file itself: download the file again"),
    (b"<html", "is a web page (HTML), and not the file itself: download the file again"),
    (b"gguf", "is a GGUF file: name it so that it ends in .gguf"),
    (b"pk\x03\x04", "is a zip archive, as torch.save writes them, which is not read because it can run code"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd: unpack it"),
)


def wrong_kind(head: bytes) -> str:
    """Return what a file that begins with ``head`` is instead, as the end of a sentence; empty if that is not known."""
    if not head:
        return "is empty: the download has not ended, or the disk was full"
    plain = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((text for mark, text in _KINDS if plain.startswith(mark)), "")


def folder_without_config(folder: Path) -> str:
    """Return what a folder without config.json seems to be, and what to name instead; empty if that is not known."""
    names = sorted(each.name for each in folder.iterdir())
    if "adapter_config.json" in names:
        return "it holds an adapter (LoRA): merge it into its base model first, with peft's merge_and_unload"
    if "model_index.json" in names:
        return "it holds a pipeline that makes images; language models are served here"
    if files := [name for name in names if name.lower().endswith(".gguf")]:
        others = f" and {len(files) - 1} more .gguf" if len(files) > 1 else ""
        return f"it holds {files[0]}{others}: name the file, {'such as ' if others else ''}{folder / files[0]}"
    if "params.json" in names:
        return "it holds weights in the form of their makers: download, or convert to, the form of transformers"
    below = [path.parent for path in (*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json"))]
    if below:
        return f"there is one in {sorted(below)[0]}: name that folder"
    return ""
