"""Real workers and the real gateway are killed under load: every answer equals its undisturbed run."""

import psutil

from harness.waiting import eventually
from mgpu import Client
from mgpu.launch.server_process import ServerProcess

LIMIT_S = 60.0


def child(server: ServerProcess, module: str) -> psutil.Process:
    children = psutil.Process(server.process.pid).children()
    return next(each for each in children if each.cmdline()[-1] == module)


def test_answers_go_on_after_a_worker_and_then_the_gateway_is_killed(text_model: str) -> None:
    prompts = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "The first ten primes are"]
    options = [{"max_tokens": 240, "ignore_eos": True, "temperature": at % 2, "seed": at} for at in range(4)]
    options.append(
        {"max_tokens": 240, "temperature": 1, "seed": 5, "structured_outputs": {"regex": r"(\d+ [a-z]+, ){240}"}}
    )
    prompts.append("A list of animals: ")
    with (
        ServerProcess("-m", text_model, "--device", "cpu", "--workers", "2", "--max-seq-len", "1024") as server,
        Client(server.wait_ready(), silence_timeout_s=LIMIT_S) as client,
    ):
        streams = [client.stream(prompt, **each) for prompt, each in zip(prompts, options, strict=True)]
        undisturbed = [stream.completion() for stream in streams]
        for module in ("mgpu.worker", "mgpu.orchestrator.gateway"):
            streams = [client.stream(prompt, **each) for prompt, each in zip(prompts, options, strict=True)]
            firsts = [next(stream) for stream in streams]
            child(server, module).kill()
            for first, stream, expected in zip(firsts, streams, undisturbed, strict=True):
                pieces = [first, *stream]
                assert tuple(token for piece in pieces for token in piece.token_ids) == expected.token_ids
                assert "".join(piece.text for piece in pieces) == expected.text
        eventually(lambda: client.health().state == "ready")
        health, stats = client.health(), client.stats()
        assert (health.restarts, stats["gateway_restarts"], stats["replays"]) == (1, 1, 5)
        assert health.last_recovery_s > 0
        assert stats["kv_blocks_used"] == 0
