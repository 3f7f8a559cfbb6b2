"""The planner against reality: the peak memory of a real training step beside what was foretold.

    python benchmarks/plan.py [--smollm FOLDER] [--out plan.json]

Every step runs in a process of its own. Measured is the resident memory of the process (VmHWM of
/proc), less what it held before the model was made, over one `policy_step`: rollouts, loss,
gradients. In the rows "generating" many answers are generated at once and few are learned from, so
that the full cache is the worst moment. Large tensors get memory pages of their own
(MALLOC_MMAP_THRESHOLD_), so that what is freed is given back. Linux only.
"""
import argparse, json, os, platform, random, subprocess, sys
from string import ascii_lowercase
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# 19M parameters
LLAMA = dict(model_type="llama", vocab_size=16384, hidden_size=384, intermediate_size=1024,
             num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2,
             tie_word_embeddings=True)
# 48M, Conv1D and biases
GPT2 = dict(model_type="gpt2", vocab_size=32000, n_embd=512, n_layer=10, n_head=8, n_positions=512)
TINY = dict(model_type="llama", vocab_size=64, hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
QUICK = dict(model_type="llama", vocab_size=4096, hidden_size=128, intermediate_size=256,
             num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


def memory(field):
    "A line of /proc/self/status in bytes"
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) * 1024


class Letters:
    "A tokenizer that says one id a letter, so that lengths are known"
    eos_token_id = pad_token_id = chat_template = None
    def __call__(self, text, **kw): return dict(input_ids=[2 + ord(c) % 50 for c in text])
    def decode(self, ids, **kw): return "".join(chr(97 + int(i) % 26) for i in ids)


def task_of(prompt, new):
    "Prompts of nearly equal length, and a reward that any answer gets"
    from transformer2_nbdev.tasks import Task
    # one pad token somewhere, as in real batches; no two prompts alike, for those would be read once
    words = random.Random(0)
    drawn = lambda i: "".join(words.choices(ascii_lowercase, k=prompt - i % 2))
    rows = [dict(prompt=drawn(i)) for i in range(256)]
    return Task("letters", examples=lambda split: rows, prompt=lambda e: e["prompt"],
                reward=lambda text, e: float(len(text) % 2) * 2 - 1, max_new_tokens=new)


def child(spec):
    "One real step; prints what it held"
    from transformer2_nbdev import scale
    from transformer2_nbdev.reinforce import policy_step
    torch.set_num_threads(1); torch.manual_seed(0)
    s = scale.Setup(**spec["setup"] | dict(dtype=torch.float32))
    # what libraries load at their first use is not the model's
    step_of(dict(spec, model=TINY, batch=2, micro=1), s)
    before = memory("VmRSS")
    run = step_of(spec, s, go=False)
    at_rest = memory("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")                           # the peak starts anew
    policy_step(run)
    peak, size = memory("VmHWM") - before, run.model.get_base_model().num_parameters()
    print("MEASURED" + json.dumps(dict(at_rest=at_rest, peak=peak, parameters=size)))


def step_of(spec, s, go=True):
    "A run with everything loaded, and its step where asked for"
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformer2_nbdev import scale
    from transformer2_nbdev.reinforce import ReinforceConfig, begin, policy_step
    if isinstance(spec["model"], str):
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec["model"]),
                                                 dtype=torch.float32)
    model.generation_config.eos_token_id = None                             # answers of full length
    model = scale.adapt(model.eval(), s)
    b, m = spec["batch"], spec["micro"]
    config = ReinforceConfig(batch_size=b, rollout_batch=b, micro_batch=m, steps=1,
                             fused=s.method == "fused", kl=s.kl, lr=1e-3)
    run = begin(model, Letters(), task_of(s.prompt, s.new), config, None)
    if go: policy_step(run)
    return run


def measure(spec):
    "A child's numbers"
    env = os.environ | dict(OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="65536",
                            MALLOC_TRIM_THRESHOLD_="65536", PYTHONPATH=str(ROOT))
    env.pop("MALLOC_TOP_PAD_", None)
    run = subprocess.run([sys.executable, __file__, "--child", json.dumps(spec)], env=env,
                         capture_output=True, text=True)
    if "MEASURED" not in run.stdout: raise RuntimeError(run.stderr[-1500:])
    return json.loads(run.stdout.split("MEASURED")[1])


def foretold(spec):
    "The plan's numbers for the same step"
    from transformers import AutoConfig
    from transformer2_nbdev import scale
    s = scale.Setup(**spec["setup"] | dict(dtype=torch.float32))
    model = spec["model"]
    config = (AutoConfig.from_pretrained(model) if isinstance(model, str)
              else AutoConfig.for_model(**model))
    told = scale.foretell(config, s)
    asking, learning = told(spec["batch"]), told(spec["micro"])
    seen = {k: asking[k].peak for k in scale.ASKING} | {k: learning[k].peak for k in scale.LEARNING}
    moment = max(seen, key=seen.get)
    return dict(at_rest=asking["at rest"].peak, peak=seen[moment], moment=moment)


def cases(a):
    "Name, and what to run"
    lengths = dict(prompt=32, new=32)
    models = {"quick": (QUICK, 16, 128)} if a.quick else {
        "llama 19M": (LLAMA, 16, 192), "gpt2 48M": (GPT2, 8, 96)}
    if a.smollm: models["SmolLM2-135M"] = a.smollm, 4, 64
    for name, (model, few, many) in models.items():
        for method in ("additive", "fused", "lora"):
            setup = lengths | dict(method=method)
            yield f"{name}, {method}", dict(model=model, batch=few, micro=few, setup=setup)
        setup = lengths | dict(method="additive")
        yield f"{name}, generating", dict(model=model, batch=many, micro=1, setup=setup)


def main(a):
    rows = {}
    for name, spec in cases(a):
        told, real = foretold(spec), measure(spec)
        ratio = round(told["peak"] / real["peak"], 3)
        rows[name] = dict(batch=spec["batch"], micro=spec["micro"], prompt=spec["setup"]["prompt"],
                          new=spec["setup"]["new"], foretold=told, measured=real, ratio=ratio)
        print(f"{name:26s}foretold {told['peak'] / 1e6:7.0f} MB ({told['moment']}), measured "
              f"{real['peak'] / 1e6:7.0f} MB, ratio {ratio:.3f}", flush=True)
        if a.out: Path(a.out).write_text(json.dumps(record(a, rows), indent=1) + "\n")
    return rows


def record(a, rows):
    words = ["--quick"] * a.quick + ["--smollm FOLDER"] * bool(a.smollm)
    command = " ".join(["python benchmarks/plan.py", *words])
    return dict(command=command, device=platform.processor() or platform.machine(), threads=1,
                dtype="float32", torch=torch.__version__, rows=rows)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--child"); p.add_argument("--smollm"); p.add_argument("--out")
    p.add_argument("--quick", action="store_true")
    a = p.parse_args()
    child(json.loads(a.child)) if a.child else main(a)
