"""GRPO by TRL with singular value experts: TRL runs the loop, this package brings the adapter.

On a GPU with vLLM, on a laptop without it, on several GPUs:

    python examples/grpo_svf.py --model Qwen/Qwen3-4B --task gsm8k --data-dir DATA \\
        --vllm colocate --out runs/grpo
    python examples/grpo_svf.py --model lab:A --task lab:math --steps 20 --lr 1e-2 --out runs/lab
    accelerate launch --num_processes 4 examples/grpo_svf.py ...

What happens with vLLM: before it generates with new weights, TRL merges the active adapter into
them (SVF composes W' = W + Q diag(d) Q'W), sends every matrix to vLLM under the base's own name,
and unmerges, which for SVF puts the base's tensors back bit for bit. So vLLM holds a plain model,
knows nothing of adapters, and generates at its full speed. While weights travel, the adapted
matrices are in memory twice. vLLM keeps a share of the card of its own (--vllm-share with
"colocate"), or a card of its own ("server": start `trl vllm-serve --model M` there first).

What to set: `beta` is the weight of the KL term (the reference is the model with its adapter off,
no second copy); `num_generations` is the size of a group; per_device_train_batch_size x
gradient_accumulation_steps x processes must be a multiple of it; the learning rate acts on
d = z - 1: 1e-3 to 1e-2, far above LoRA's.
"""
import argparse

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from transformer2_nbdev import lab
from transformer2_nbdev.adapter import SvfConfig
from transformer2_nbdev.tasks import get_task, render


def load(name):
    "Model and tokenizer, from the lab, a folder or the hub"
    if name.startswith("lab:"): return lab.load(name[4:])[:2]
    return AutoModelForCausalLM.from_pretrained(name,
                                                dtype="auto"), AutoTokenizer.from_pretrained(name)


def dataset(task, tokenizer, split, limit=None):
    "A task's questions as TRL wants them; the example itself travels by its number"
    examples = list(task.examples(split))[:limit]
    return examples, Dataset.from_list([dict(prompt=render(task, e, tokenizer), row=i) for i,
                                        e in enumerate(examples)])


def reward_of(task, examples):
    "A task's verdicts as a TRL reward function"
    def reward(completions, row, **kwargs):
        return [task.judge(c, examples[i]).reward for c, i in zip(completions, row)]
    reward.__name__ = task.name.replace(":", "_")
    return reward


def config_of(a):
    "Every setting that matters, and why"
    gpu = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=a.out, max_steps=a.steps, learning_rate=a.lr, seed=a.seed, beta=a.kl,
        temperature=1.0, num_generations=a.group, per_device_train_batch_size=a.batch,
        gradient_accumulation_steps=a.accumulate, max_completion_length=a.new,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch",
        bf16=gpu and torch.cuda.is_bf16_supported(), fp16=False, use_cpu=not gpu,
        use_vllm=a.vllm != "off", vllm_mode="colocate" if a.vllm == "off" else a.vllm,
        vllm_gpu_memory_utilization=a.vllm_share, gradient_checkpointing=a.checkpointing,
        save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True)


def train(a):
    "Train and save an expert; returns the trainer"
    torch.manual_seed(a.seed)
    model, tokenizer = load(a.model)
    if tokenizer.pad_token is None: tokenizer.pad_token = tokenizer.eos_token
    task = lab.tasks()[a.task[4:]] if a.task.startswith("lab:") else get_task(a.task, a.data_dir)
    examples, data = dataset(task, tokenizer, "train", a.limit)
    model = get_peft_model(model, SvfConfig(target_modules=a.target_modules, rank=a.rank,
                                            task_type="CAUSAL_LM"))
    trainer = GRPOTrainer(model=model, reward_funcs=reward_of(task, examples), args=config_of(a),
                          train_dataset=data, processing_class=tokenizer)
    trainer.train()
    # an adapter folder, as from `transformer2 train`
    trainer.save_model(a.out)
    return trainer


def options(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True); p.add_argument("--task", required=True)
    p.add_argument("--data-dir"); p.add_argument("--out", required=True)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--kl", type=float, default=.04)
    p.add_argument("--group", type=int, default=8); p.add_argument("--batch", type=int, default=8)
    p.add_argument("--accumulate", type=int, default=8)
    p.add_argument("--new", type=int, default=256); p.add_argument("--limit", type=int)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--target-modules", default="all-linear"); p.add_argument("--rank", type=int)
    p.add_argument("--checkpointing", action="store_true")
    p.add_argument("--vllm", choices=("off", "colocate", "server"), default="off")
    p.add_argument("--vllm-share", type=float, default=.3)
    return p.parse_args(words)


if __name__ == "__main__":
    trainer = train(options())
    for m in trainer.state.log_history:
        if "reward" in m: print(f"step {m.get('step', 0)}: reward {m['reward']:+.3f}")
