"""What the long benchmarks share: where records go, finished pieces as files, distances."""
import json, platform, time
from pathlib import Path

import peft, torch, transformers

from transformer2_nbdev.evaluate import write_atomic
from transformer2_nbdev.reinforce import reference
from transformer2_nbdev.rollout import kl_per_token, vocab_logprobs


RECORDS = Path(__file__).resolve().parent.parent / "transformer2_nbdev" / "data" / "records"


class Work:
    "A folder of finished pieces: what is there is read, what is missing is made, after a break too"
    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def do(self, key, make):
        path = self.folder / f"{key}.json"
        if not path.is_file():
            began = time.perf_counter()
            write_atomic(path, json.dumps(make()) + "\n")
            took = time.perf_counter() - began
            print(f"{time.strftime('%H:%M:%S')} {key} {took:.0f} s",
                  path.read_text()[:150].strip(), flush=True)
        return json.loads(path.read_text())


@torch.no_grad()
def nats_an_answer(model, r, size): # a PEFT model, its Rollouts, rows at a time -> one number each
    "KL(policy || base) along each answer, exact at every place"
    nats = []
    for i in range(0, len(r), size):
        q = r[list(range(i, min(i + size, len(r))))]
        args = q.ids, q.mask, q.prompt_len
        logp = vocab_logprobs(model, *args)
        with reference(model): ref = vocab_logprobs(model, *args)
        nats += (kl_per_token(logp, ref) * q.completion_mask).sum(1).tolist()
    return nats


def about(): # what numbers depend on
    known = dict(python=platform.python_version(), torch=torch.__version__,
                 transformers=transformers.__version__, peft=peft.__version__)
    return dict(processor=platform.processor() or platform.machine(),
                threads=torch.get_num_threads(), versions=known)
