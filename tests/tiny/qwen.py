"""What Qwen-Image and Z-Image have in common: Qwen's tokenizer, with few words, and its chat template."""

import json

from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Qwen2Tokenizer

WORDS = """system user assistant
Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects
 and background:
a red bag a blue coat"""
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE whose every word of Qwen-Image's system prompt is one token, as in the real one: the pipeline cuts
    off 34 tokens of it."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    model = json.loads(trained.to_str())["model"]
    special = ["<|im_start|>", "<|im_end|>"]
    merges = [tuple(pair) for pair in model["merges"]]
    return Qwen2Tokenizer(model["vocab"], merges, extra_special_tokens=special, chat_template=CHAT)
