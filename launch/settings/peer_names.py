"""What users of other servers type, and the name that it has here. Only for error messages."""

import json
import re
from collections.abc import Collection, Mapping, Sequence

COMMANDS = {
    "run": "'mgpu-launch serve MODEL' starts a server, and 'mgpu-launch chat' talks to it",
    "start": "'mgpu-launch serve MODEL' starts a server; 'mgpu-launch install-service NAME' makes a systemd service",
    "server": "type 'mgpu-launch serve MODEL'",
    "up": "type 'mgpu-launch serve MODEL'",
    "api_server": "type 'mgpu-launch serve MODEL'",
    "launch": "type 'mgpu-launch serve MODEL'",
    "list": "a server has one model: 'mgpu-launch status' shows it; downloaded models are in the hub's cache",
    "ls": "a server has one model: 'mgpu-launch status' shows it; downloaded models are in the hub's cache",
    "ps": "type 'mgpu-launch status'",
    "show": "type 'mgpu-launch plan MODEL'",
    "pull": "'mgpu-launch serve MODEL' downloads a model of the hub by itself",
    "download": "'mgpu-launch serve MODEL' downloads a model of the hub by itself",
    "rm": "remove the model's folder, or its entry in the hub's cache",
    "stop": "end the server with Ctrl-C or SIGTERM; a systemd service with 'systemctl stop mgpu@NAME'",
    "kill": "end the server with Ctrl-C or SIGTERM; a systemd service with 'systemctl stop mgpu@NAME'",
    "version": "type 'mgpu-launch --version -v'",
    "help": "type 'mgpu-launch --help' or 'mgpu-launch COMMAND --help'",
    "check": "'mgpu-launch doctor' checks this machine",
    "env": "'mgpu-launch config' shows every option and where its value comes from",
    "completions": "type 'mgpu-launch completion bash', or zsh, or fish",
    "complete": "type 'mgpu-launch generate PROMPT'",
    "quantize": "'mgpu-launch serve MODEL --quant 8' (or 4, fp8) quantizes while it loads",
    "tune": "'mgpu-launch plan MODEL' shows what fits",
}
"""Commands of ollama, llama.cpp, vLLM, SGLang and mistral.rs."""

_QUANTS = {"": "8", "8": "8", "4": "4", "fp8": "fp8", "int8": "8", "8bit": "8", "bitsandbytes": "8", "int4": "4",
           "4bit": "4", "q4k": "4", "q8_0": "8", "float8": "fp8", "fp8_e4m3": "fp8"}  # fmt: skip
_QUANT_OPTIONS = ("--quantization", "--isq", "-q")
_OTHER_QUANT = (
    "{!r} names a format of files, and that comes from the model's files: leave it out. --quant 8, 4 or fp8 quantizes "
    "while loading"
)

_SERVE = {
    "--port": "--http {host}:{port} (--bind tcp://{host}:{port} is for mgpu's own clients)",
    "--host": "--http {host}:{port} (--bind tcp://{host}:{port} is for mgpu's own clients)",
    "--uds": "--http unix:{}",
    **dict.fromkeys(("--ssl-certfile", "--ssl-cert-file"), "--http-tls-cert {}"),
    **dict.fromkeys(("--ssl-keyfile", "--ssl-key-file"), "--http-tls-key {}"),
    **dict.fromkeys(("--allowed-origins", "--cors-allow-origins"), "--http-cors {}"),
    **dict.fromkeys(("--allowed-hosts", "--allowed-host", "--http-hosts"), "--http-allowed-hosts {}"),
    **dict.fromkeys(("--tensor-parallel-size", "--tp-size", "-tp", "--num-gpus", "--num-shard"), "--tp {}"),
    **dict.fromkeys(
        ("--max-model-len", "--ctx-size", "--context-length", "--max-total-tokens", "--num-ctx", "--session-len", "-c",
         "--max-sequence-len", "--max-sequence-length", "--max-seq-length", "--max-length", "--seq-len"),
        "--max-seq-len {}",
    ),
    **dict.fromkeys(
        ("--gpu-memory-utilization", "--mem-fraction-static", "--cache-max-entry-count"), "--memory-fraction {}"
    ),
    **dict.fromkeys(_QUANT_OPTIONS, "--quant {quant}"),
    **dict.fromkeys(("--served-model-name", "--alias", "--model-name", "-a"), "--served-name {}"),
    **dict.fromkeys(
        ("--max-num-seqs", "--max-running-requests", "--max-batch-size", "--max-seqs", "--parallel", "-np"),
        "--max-rows {}",
    ),
    **dict.fromkeys(
        ("--max-num-batched-tokens", "--chunked-prefill-size", "--batch-size", "--ubatch-size", "-b", "-ub"),
        "--max-batch-tokens {}",
    ),
    **dict.fromkeys(("--model-path", "--model-id", "--hf-repo", "-hf", "-hfr"), "-m {}"),
    **dict.fromkeys(("--cache-type-k", "--cache-type-v", "-ctk", "-ctv"), "--kv-cache-dtype fp8"),
    **dict.fromkeys(("--kv-cache-memory-bytes", "--kv-cache-memory"), "--kv-memory {}"),
    **dict.fromkeys(("--enable-prefix-caching", "--cache-prompt"), "--prefix-cache"),
    **dict.fromkeys(("--no-enable-prefix-caching", "--disable-radix-cache", "--no-cache-prompt"), "--no-prefix-cache"),
    **dict.fromkeys(("--tensor-split", "-ts", "--pipeline-parallel-size", "--pp-size", "-pp", "--num-device-layers"),
                    '--device-layers, for example --device-layers "0:32;1:32"'),
    "--page-size": "--block-size {}",
    "--max-waiting-requests": "--max-sequences {}",
    **dict.fromkeys(("--api-key", "--api-keys", "--api-key-file"), "--http-keys FILE, each line a name and a key"),
}  # fmt: skip
"""Options of servers. ``{}`` stands for the value that was typed."""

_SERVE_REMARKS = {
    **dict.fromkeys(
        ("--n-gpu-layers", "--gpu-layers", "-ngl", "--num-gpu"),
        "all layers run on the GPUs; --device cpu runs all on the CPU",
    ),
    **dict.fromkeys(
        ("--main-gpu", "-mg", "--gpus", "--device-ids"), "CUDA_VISIBLE_DEVICES chooses the GPUs, and --tp how many"
    ),
    **dict.fromkeys(("--data-parallel-size", "--dp-size", "-dp"), "start one server for each group of GPUs"),
    "--trust-remote-code": "mgpu runs no code of a model; leave it out",
    "--flash-attn": "mgpu chooses the attention kernel itself; leave it out",
    "-fa": "mgpu chooses the attention kernel itself; leave it out",
    "--enforce-eager": "leave it out",
    "--tokenizer": "the tokenizer comes from the model's folder or file",
    "--chat-template": "the chat template comes from the model's folder or file",
    "--revision": "write it behind the model: -m ORG/NAME@REVISION",
    **dict.fromkeys(("--hf-file", "-hff"), "write it behind the repository: -m ORG/NAME/FILE.gguf"),
    "--download-dir": "HF_HOME names the folder for downloaded models",
    **dict.fromkeys(("--verbose", "-v"), "--log-level debug shows more"),
    **dict.fromkeys(("--daemon", "-d"), "'mgpu-launch install-service NAME' makes a systemd service"),
    **dict.fromkeys(("--threads", "-t"), "each CPU worker takes its share of the cores; --workers sets their number"),
}

_TALK = {
    **dict.fromkeys(("--host", "--port", "--url", "--base-url"), "--endpoint tcp://{host}:{port}"),
    **dict.fromkeys(("--max-new-tokens", "--n-predict", "--num-predict", "-n"), "--max-tokens {}"),
    "--temp": "--temperature {}",
    **dict.fromkeys(("--system-prompt", "-sys"), "--system {}"),
    "--api-key": "--keys FILE",
}
_TALK_REMARKS = {
    **dict.fromkeys(("--model", "-m"), "the model is chosen when the server starts: 'mgpu-launch serve MODEL'"),
    **dict.fromkeys(("--prompt", "-p"), "the prompt is an argument: 'mgpu-launch generate PROMPT'"),
    "--json": "the answer is printed as text; mgpu.Client returns it with its fields",
}


def option_hint(typed: str, value: str, own: Sequence[str], host: str, port: str) -> str:
    """Return how an option of another program is written here, or ''. ``own`` holds the options of the command."""
    serves = "--max-rows" in own
    remarks = _SERVE_REMARKS if serves else _TALK_REMARKS
    if typed in remarks:
        return remarks[typed]
    pattern = (_SERVE if serves else _TALK).get(typed, "")
    if not pattern or pattern.split()[0].strip(",") not in own:
        return ""
    quant = _QUANTS.get(value.lower(), "")
    if typed in _QUANT_OPTIONS and not quant:
        return _OTHER_QUANT.format(value[:40])
    return "here it is " + pattern.format(value or "VALUE", host=host, port=port, quant=quant)


def key_hint(typed: str, table: Mapping[str, object], own: Collection[str]) -> str:
    """Return how a key of a configuration file that another program's option resembles is written here, or ''.

    ``own`` holds the keys there are.
    """
    name, value = typed.replace("_", "-"), table[typed]
    options = [f"--{key.replace('_', '-')}" for key in own] + ["--no-prefix-cache", "-m"]
    text = "" if isinstance(value, (dict, list, bool)) else str(value)
    host, port = str(table.get("host", "127.0.0.1")), str(table.get("port", "PORT"))
    for option in (f"--{name}", f"-{name}"):
        hint = option_hint(option, text, options, host, port)
        if hint.startswith("here it is "):
            return _OPTION.sub(lambda found: _as_key(found, is_off=value is False), hint)
        if hint:
            return hint
    return ""


_OPTION = re.compile(r'(--[a-z-]+|-m\b)(?: ("[^"]*"|[^\s,)]+(?<!:)))?')


def _as_key(found: re.Match[str], is_off: bool) -> str:
    """Write an option of the command line as a line of the file."""
    option, value = found.groups()
    name = "model" if option == "-m" else option.removeprefix("--").replace("-", "_")
    if name in ("prefix_cache", "no_prefix_cache"):
        return f"prefix_cache = {json.dumps((name == 'prefix_cache') != is_off)}"
    if value is None:
        return name
    is_plain = re.fullmatch(r"[0-9]+(\.[0-9]+)?", value) and name != "quant"
    return f"{name} = {value if is_plain or value[0] == chr(34) else json.dumps(value, ensure_ascii=False)}"
