#!/usr/bin/env python
"""README.md from index.ipynb: `python docs/readme.py` writes it, `--check` fails if it is out of date. Nothing is executed."""
import argparse, base64, json, re, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from reader import RE_DIRECTIVE, ROOT, directives, settings, start

IMAGES = "docs/images"


def badges() -> str:
    "Links that only the README needs, from settings.ini."
    s = settings()
    site = s["doc_host"] + s["doc_baseurl"]
    tests = f"{s['git_url']}/actions/workflows/test.yaml"
    colab = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({start().colab})"
    return f"[![tests]({tests}/badge.svg)]({tests}) {colab} · [Read the book]({site}) · [Reference]({site}/docs/reference.html)"


def output(o: dict, images: dict) -> str:
    "One output of a cell as GitHub shows it; pictures are added to `images`."
    data = o.get("data", {})
    if "image/png" in data:
        name = f"{IMAGES}/index-{len(images) + 1}.png"
        images[name] = base64.b64decode("".join(data["image/png"]))
        return f"![The picture that the cell above draws]({name})"
    if "text/markdown" in data: return "".join(data["text/markdown"])
    text = "".join(o.get("text", data.get("text/plain", ""))).rstrip()
    return f"```\n{text}\n```" if text else ""


def readme(path: Path = ROOT / "index.ipynb") -> tuple:
    "The text of README.md, and its pictures as {path: bytes}."
    out, images = [], {}
    for i, c in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(c["source"])
        if c["cell_type"] == "markdown":
            if i == 0: source = re.sub(r"^(# .+\n)", lambda m: f"{m[1]}\n{badges()}\n", source)
            out.append(source); continue
        d = directives(source)
        if "hide" in d: continue
        if d.get("echo") != "false": out.append(f"```python\n{RE_DIRECTIVE.sub('', source).strip()}\n```")
        out += [output(o, images) for o in c.get("outputs", [])]
    return "<!-- generated from index.ipynb by docs/readme.py -->\n\n" + "\n\n".join(filter(None, out)) + "\n", images


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README.md or its pictures are out of date")
    args = parser.parse_args()
    text, images = readme()
    files = {"README.md": text.encode()} | images
    if args.check:
        stale = [n for n, b in files.items() if not (ROOT / n).exists() or (ROOT / n).read_bytes() != b]
        if stale: sys.exit(f"out of date: {', '.join(stale)}; run python docs/readme.py")
        return
    (ROOT / IMAGES).mkdir(exist_ok=True)
    for old in (ROOT / IMAGES).glob("index-*.png"): old.unlink()
    for n, b in files.items(): (ROOT / n).write_bytes(b)


if __name__ == "__main__": main()
