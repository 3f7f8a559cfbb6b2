"""A model, a tokenizer and a task so small that a training step takes milliseconds; also the program that the tests start as other processes."""
import argparse, os, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transformer2_nbdev.adapter import SvfConfig
from transformer2_nbdev.reinforce import ReinforceConfig, train_expert
from transformer2_nbdev.tasks import Task

WORDS = "<pad> <bos> <eos> <unk> the a cat dog bird sees hears and one two red blue".split()


def tokenizer():
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{f"{w}_token": f"<{w}>" for w in ("pad", "bos", "eos", "unk")})


def base(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                        max_position_embeddings=32, initializer_range=.2, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()


def policy(seed=0, method="svf"):
    torch.manual_seed(seed + 1)
    return get_peft_model(base(seed), SvfConfig(target_modules="all-linear") if method == "svf" else LoraConfig(r=4, target_modules="all-linear", lora_dropout=.1))


PROMPTS = ["the cat", "a bird sees", "the red dog hears", "one", "two blue", "a cat and the bird", "the", "a red bird and", "dog", "blue cat sees a"]
DOG = Task("dog", lambda split: [dict(prompt=p) for p in PROMPTS], lambda e: e["prompt"], lambda text, e: 1. if "dog" in text.split() else -1.,
           answer=lambda e: "the dog", max_new_tokens=6)
FAST = dict(steps=6, batch_size=32, rollout_batch=16, lr=3e-2, val_every=2, val_samples=1, micro_batch=6)

if __name__ == "__main__": # one training run, to be killed, resumed, or run by several processes
    p = argparse.ArgumentParser()
    p.add_argument("out"); p.add_argument("--resume", action="store_true"); p.add_argument("--steps", type=int, default=6); p.add_argument("--method", default="svf")
    p.add_argument("--fused", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(1)
    train_expert(policy(method=a.method), tokenizer(), DOG, ReinforceConfig(**FAST | dict(steps=a.steps, fused=bool(a.fused), dropout=a.method == "lora")), a.out, a.resume, progress=False)
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
