"""Models that see, in small and with random weights: a LLaVA for every test, and the other families' ways of
handing over a picture. Nothing is downloaded; the tokenizer is a byte-level one, built here."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)

from transformer2_nbdev.tasks import Task

COLOURS = "red", "green", "blue", "white"
TEMPLATE = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['content'] is string %}{{ m['content'] }}\
{% else %}{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}\
{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]


def tokenizer(special=SPECIAL, template=TEMPLATE):
    "A byte-level tokenizer with a token for each place of a picture"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(["Which colour is it? red green blue white"], trainers.BpeTrainer(
        vocab_size=len(special) + 270, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, clean_up_tokenization_spaces=False,
                                   bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>",
                                   additional_special_tokens=[s for s in special if s not in ("<pad>",)])


TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=2048, initializer_range=.2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
TOWER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=8)


def llava(seed=0, size=32, attend="sdpa"):
    "A LLaVA of two layers and its processor; a picture becomes (size / 8)^2 tokens"
    tok, side = tokenizer(), dict(height=size, width=size)
    processor = LlavaProcessor(CLIPImageProcessorPil(size=side, crop_size=side), tok, patch_size=8, chat_template=TEMPLATE,
                               vision_feature_select_strategy="default", num_additional_image_tokens=1)
    config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=size, **TOWER), text_config=LlamaConfig(vocab_size=len(tok), **TEXT),
                         image_token_id=tok.convert_tokens_to_ids("<image>"), tie_word_embeddings=False)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():     # pictures that the language model cannot overlook
        for p in model.model.multi_modal_projector.parameters(): p.normal_(0, .5)
    model.generation_config = GenerationConfig(eos_token_id=2, bos_token_id=1, pad_token_id=0)
    return model, processor


def picture(colour, size=(32, 32)): return Image.new("RGB", size, colour)


def ask(text, *pictures):
    "A prompt: messages in TRL's form"
    parts = [dict(type="image", image=p) for p in pictures]
    return [dict(role="user", content=[*parts, dict(type="text", text=text)])] if parts else [dict(role="user", content=text)]


def colours(n=12, prompt=lambda e: ask("Which colour is it?", e["image"]), size=(32, 32)):
    "A task: name a picture's colour. The reward counts an easy thing, so that a random model earns some"
    rows = [dict(image=picture(COLOURS[i % 4], size), colour=COLOURS[i % 4], i=i) for i in range(n)]
    reward = lambda said, e: 1. if any(c in said for c in e["colour"]) else -1.
    return Task("colours", lambda split: rows, prompt, reward, answer=lambda e: e["colour"], max_new_tokens=8)
