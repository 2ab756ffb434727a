"""How long Hugging Face transformers takes from the start of its process to a first token, with weights from files.

    python -m bench.peers.hf_ready FOLDER cuda

Prints the seconds. `device_map` is used where `accelerate` is installed: weights then go straight to the GPU.
"""

import importlib.util
import sys
import time
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def load(folder: str, device: str) -> Any:
    """Return the model in the type that its configuration names."""
    if importlib.util.find_spec("accelerate"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=device)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load(*sys.argv[1:3])
    ids = torch.full((1, 8), 3, device=model.device)
    with torch.inference_mode():
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0
        )
    assert answer.cpu().shape[1] == 9
    print(time.time() - psutil.Process().create_time())


if __name__ == "__main__":
    main()
