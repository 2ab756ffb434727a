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
_QUANT_OPTIONS = ("--quantization", "--quantize", "--bits", "--isq", "-q")
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
         "--ctx", "-ctx", "--max-sequence-len", "--max-sequence-length", "--max-seq-length", "--max-length",
         "--seq-len"),
        "--max-seq-len {}",
    ),
    **dict.fromkeys(
        ("--gpu-memory-utilization", "--mem-fraction-static", "--cache-max-entry-count"), "--memory-fraction {}"
    ),
    **dict.fromkeys(_QUANT_OPTIONS, "--quant {quant}"),
    **dict.fromkeys(("--load-in-4bit", "--load_in_4bit"), "--quant 4"),
    **dict.fromkeys(("--load-in-8bit", "--load_in_8bit"), "--quant 8"),
    **dict.fromkeys(("--served-model-name", "--alias", "--model-name", "-a"), "--served-name {}"),
    **dict.fromkeys(
        ("--max-num-seqs", "--max-running-requests", "--max-batch-size", "--max-seqs", "--parallel", "-np",
         "--max-concurrency", "--max-concurrent-requests"),
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
    **dict.fromkeys(("--data-parallel-size", "--dp-size", "-dp", "--dp"), "--replicas {}"),
    **dict.fromkeys(("--local-files-only", "--hf-offline"), "--offline"),
    **dict.fromkeys(("--enable-log-requests", "--log-requests"), "--access-log"),
    "--page-size": "--block-size {}",
    "--max-waiting-requests": "--max-sequences {}",
    **dict.fromkeys(("--api-key", "--api-keys", "--api-key-file"), "--http-keys FILE, each line a name and a key"),
}  # fmt: skip
"""Options of servers. ``{}`` stands for the value that was typed."""

_ALWAYS = "a server does that by itself; leave it out"
_CHOSEN = "kernels and graphs are chosen by the server; leave it out"
_FROM_TEMPLATE = "the model's chat template shows it; leave it out. --tool-format and --reasoning-format can set it"
_SAMPLING = "each request chooses its sampling; the model's generation_config.json has the defaults"
_ALL_ON_GPUS = (
    "all weights must fit the GPUs: 'mgpu-launch plan MODEL' shows what does, and --quant 4 makes them smaller"
)
_ONE_MACHINE = "a server is one machine, and starts its processes itself; leave it out"
_TEXT_ONLY = "a server here takes and makes text only"
_SERVE_REMARKS = {
    **dict.fromkeys(
        ("--n-gpu-layers", "--gpu-layers", "-ngl", "--num-gpu"),
        "all layers run on the GPUs; --device cpu runs all on the CPU",
    ),
    **dict.fromkeys(
        ("--main-gpu", "-mg", "--gpus", "--gpu", "--gpu-ids", "--device-ids"),
        "CUDA_VISIBLE_DEVICES chooses the GPUs, and --tp how many",
    ),
    "--trust-remote-code": "no code of a model is run; leave it out",
    **dict.fromkeys(
        ("--flash-attn", "-fa", "--attention-backend", "--enforce-eager", "--cuda-graph-max-bs", "--disable-cuda-graph",
         "--cuda-graph-sizes", "--compilation-config", "-O", "--enable-torch-compile", "--disable-custom-all-reduce"),
        _CHOSEN,
    ),
    **dict.fromkeys(
        ("--enable-chunked-prefill", "--cont-batching", "-cb", "--jinja", "--metrics", "--enable-metrics",
         "--disable-log-requests", "--no-enable-log-requests", "--disable-log-stats", "--async-scheduling",
         "--no-mmap", "--mmap", "--mlock", "--numa", "--warmup", "--tokenizer-mode", "--config-format"),
        _ALWAYS,
    ),
    **dict.fromkeys(("--reasoning-parser", "--tool-call-parser", "--enable-auto-tool-choice", "--enable-reasoning"),
                    _FROM_TEMPLATE),
    **dict.fromkeys(("--temp", "--temperature", "--top-p", "--top-k", "--min-p", "--repeat-penalty",
                     "--repetition-penalty", "--n-predict", "--max-tokens", "--max-new-tokens"), _SAMPLING),
    **dict.fromkeys(("--swap-space", "--cpu-offload-gb", "--cpu-moe", "--n-cpu-moe", "-ot", "--override-tensor"),
                    _ALL_ON_GPUS),
    **dict.fromkeys(("--distributed-executor-backend", "--nnodes", "--node-rank", "--dist-init-addr", "--master-addr",
                     "--master-port", "--rpc"), _ONE_MACHINE),
    **dict.fromkeys(("--embedding", "--embeddings", "--pooling", "--task", "--runner", "--rerank", "--mmproj",
                     "--limit-mm-per-prompt", "--is-embedding"), _TEXT_ONLY),
    **dict.fromkeys(("--enable-lora", "--lora", "--lora-modules", "--lora-paths", "--max-loras"),
                    "there are no adapters here: merge them into the weights"),
    **dict.fromkeys(("--speculative-config", "--speculative-algorithm", "--draft-model", "--model-draft", "-md",
                     "--num-speculative-tokens"), "there is no speculative decoding here; leave it out"),
    **dict.fromkeys(("--rope-scaling", "--rope-theta", "--rope-freq-base", "--rope-freq-scale", "--hf-overrides"),
                    "config.json says it: change it in a copy of the model's folder"),
    "--tokenizer": "the tokenizer comes from the model's folder or file",
    **dict.fromkeys(("--chat-template", "--chat-template-file"),
                    "the chat template comes from the model's folder or file"),
    "--revision": "write it behind the model: -m ORG/NAME@REVISION",
    **dict.fromkeys(("--hf-file", "-hff"), "write it behind the repository: -m ORG/NAME/FILE.gguf"),
    **dict.fromkeys(("--hf-token", "-hft", "--token"), "the environment variable HF_TOKEN has it"),
    **dict.fromkeys(("--download-dir", "--cache-dir"), "HF_HOME names the folder for downloaded models"),
    **dict.fromkeys(("--no-webui", "--no-ui"), "the page is a part of HTTP; --http none serves neither"),
    "--keep-alive": "a server keeps its model until it is stopped",
    **dict.fromkeys(("--verbose", "-v", "-vv"), "--log-level debug shows more"),
    "--log-file": "the log goes to standard error: 2> FILE",
    **dict.fromkeys(("--daemon", "-d"), "'mgpu-launch install-service NAME' makes a systemd service"),
    **dict.fromkeys(("--threads", "-t"), "each CPU worker takes its share of the cores; --workers sets their number"),
}  # fmt: skip
"""Options of servers that have no counterpart here."""

_TALK = {
    **dict.fromkeys(("--host", "--port", "--url", "--base-url"), "--endpoint tcp://{host}:{port}"),
    **dict.fromkeys(("--max-new-tokens", "--n-predict", "--num-predict", "-n"), "--max-tokens {}"),
    "--temp": "--temperature {}",
    **dict.fromkeys(("--system-prompt", "-sys"), "--system {}"),
    **dict.fromkeys(("--format", "--response-format", "--guided-json", "--schema", "-j"), "--json-schema FILE"),
    **dict.fromkeys(("--replicas", "--worker-urls", "--workers", "--backends", "--upstream"), "--replica {}"),
    "--api-key": "--keys FILE",
}
_MORE = "other options of answers are those of mgpu.Client and of HTTP"
_TALK_REMARKS = {
    **dict.fromkeys(("--model", "-m"), "the model is chosen when the server starts: 'mgpu-launch serve MODEL'"),
    **dict.fromkeys(("--prompt", "-p"), "the prompt is an argument: 'mgpu-launch generate PROMPT'"),
    **dict.fromkeys(("--stream", "--no-stream"), "answers are shown as they come; leave it out"),
    **dict.fromkeys(("--watch", "-w", "--follow", "-f"), "'mgpu-launch top' shows the page of status, refreshed"),
    **dict.fromkeys(("--multiline", "--multiline-input"), 'a message of several lines stands between two lines of """'),
    **dict.fromkeys(("--system", "-s"), "'mgpu-launch chat' takes a system message"),
    **dict.fromkeys(("--grammar", "--repeat-penalty", "--repetition-penalty", "--presence-penalty", "--min-p",
                     "--frequency-penalty", "--logprobs", "--ignore-eos", "--num-return-sequences"), _MORE),
    "--json": "the answer is printed as text; mgpu.Client returns it with its fields",
}  # fmt: skip


def option_hint(typed: str, value: str, own: Sequence[str], host: str, port: str) -> str:
    """Return how an option of another program is written here, or ''. ``own`` holds the options of the command."""
    serves = "--max-rows" in own
    if typed == "-c" and value.endswith(".toml"):
        return f"here it is --config {value}"
    remarks = _SERVE_REMARKS if serves else _TALK_REMARKS
    tables = (_SERVE,) if serves else (_SERVE, _TALK) if "--http" in own else (_TALK,)
    patterns = [table[typed] for table in tables if typed in table]
    pattern = next((each for each in patterns if each.split()[0].strip(",") in own), "")
    if not pattern or typed in remarks:
        return remarks.get(typed, "")
    if "--bind" not in own:
        pattern = pattern.partition(" (--bind")[0]
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
