"""A chat model in small: byte-level BPE, a real chat template, bfloat16 weights and a generation
config, as checkpoints on the hub have them."""
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = """\
{% if messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a small model.<|im_end|>\\n' }}{% endif %}\
{% for m in messages %}\
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = ["You are a small model.", "system user assistant", "What is 2 + 3? The answer is 5.",
        "the cat sees a dog"]


def tokenizer(template=TEMPLATE, pad="<|im_end|>"):
    "A byte-level tokenizer that can say everything; pad = eos, as in many checkpoints"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    how = dict(vocab_size=320, special_tokens=SPECIAL, show_progress=False,
               initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(TEXT, trainers.BpeTrainer(**how))
    named = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token=pad)
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template,
                                   clean_up_tokenization_spaces=False, **named)


def chat(folder, seed=0, template=TEMPLATE, pad="<|im_end|>", **config) -> Path:
    "Write a model folder; returns it"
    tok = tokenizer(template, pad)
    torch.manual_seed(seed)
    cfg = dict(vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
               num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
               initializer_range=.2, bos_token_id=1, eos_token_id=2, pad_token_id=2,
               tie_word_embeddings=True)
    model = LlamaForCausalLM(LlamaConfig(**cfg | config)).to(torch.bfloat16)
    theirs = dict(do_sample=True, temperature=.2, top_p=.9, repetition_penalty=1.2,
                  max_new_tokens=7)
    model.generation_config = GenerationConfig(eos_token_id=[0, 2], bos_token_id=1, pad_token_id=2,
                                               **theirs)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return Path(folder)
