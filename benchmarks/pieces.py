"""What the long benchmarks share: finished pieces as files, and answers of a test set in a few bytes."""
import json, platform, time
from pathlib import Path

import peft, torch, transformers

from transformer2_nbdev.evaluate import write_atomic


class Work:
    "A folder of finished pieces: what is there is read, what is missing is made; an interrupted benchmark goes on from it"
    def __init__(self, folder): self.folder = Path(folder); self.folder.mkdir(parents=True, exist_ok=True)

    def do(self, key, make):
        path = self.folder / f"{key}.json"
        if not path.is_file():
            began = time.perf_counter()
            write_atomic(path, json.dumps(make()) + "\n")
            print(f"{time.strftime('%H:%M:%S')} {key} {time.perf_counter() - began:.0f} s {path.read_text()[:150].strip()}", flush=True)
        return json.loads(path.read_text())


def pack(items): # evaluate's items -> hex, one bit for each question
    "Which questions were answered rightly, so that any two rows of a record can be paired later"
    return f"{int('1' + ''.join(str(int(i['correct'])) for i in items), 2):x}"


def about(): # what numbers depend on
    return dict(processor=platform.processor() or platform.machine(), threads=torch.get_num_threads(),
                versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__))
