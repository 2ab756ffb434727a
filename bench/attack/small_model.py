"""A model to be attacked where the demo model is not: a small llama of random weights that reads and writes text."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

NAME = "small"
"""What ``--model`` calls it."""
VOCABULARY = 49_152
"""As the demo model's: sampling and texts cost what they do there. Honest streams draw their prompts below it."""
HIDDEN_SIZE = 576
"""As the demo model's: a step of 16 streams takes some 15 ms of a core. With steps of a millisecond the clients of the
bench would be most of what is measured."""
LEARNT = 4096
"""Tokens that are learnt from a text. The others have a text too, so that every answer can be read."""
TEXT = Path(__file__).parents[1] / "data" / "public_domain.txt"
TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"


def config(hidden_size: int = HIDDEN_SIZE) -> dict[str, object]:
    """Return the configuration; weights are for ``--load-format dummy`` to draw."""
    return {
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden_size, "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2, "num_attention_heads": hidden_size // 32, "num_key_value_heads": hidden_size // 64,
        "vocab_size": VOCABULARY, "max_position_embeddings": 512,
    }  # fmt: skip


def write_small_model(folder: Path) -> Path:
    """Write configuration, tokenizer and chat template into a new folder and return it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config()))
    write_tokenizer(folder, VOCABULARY)
    return folder


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write tokenizer and chat template of a model with so many tokens into its folder."""
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(vocabulary)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def _tokenizer(size: int) -> dict[str, object]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(size, LEARNT), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT.read_text(), "hello world hello there " * 100], trainer)
    found: dict[str, object] = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = found["model"]["vocab"]  # type: ignore[index]
    for token_id in range(len(vocabulary), size):
        vocabulary["Ġ" * (1 + token_id % 20) + f"{token_id:x}~"] = token_id
    return found
