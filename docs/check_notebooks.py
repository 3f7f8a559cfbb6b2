#!/usr/bin/env python
"""What notebooks must hold to and ruff cannot see: `python docs/check_notebooks.py [notebook ...]`.

Lines have at most 100 columns and cells at most 30 lines (directives and blank lines aside), in
teaching cells one statement a line; `#| export` stands once, at the head of its cell; every
notebook has one H1, no two the same, and its own Colab button; outputs hold no error, no execution
count and no path of the machine that ran them. Prints one line for each fault, and fails then.
`--mend` first breaks lines of prose that are too wide.
"""
import argparse, io, json, re, sys, textwrap, tokenize
from collections import Counter
from pathlib import Path

from reader import RE_BADGE, ROOT, read_room

COLUMNS, LINES = 100, 30
RE_EXPORT = re.compile(r"^#\|\s*exports?\b", re.M)
RE_DIRECTIVE = re.compile(r"^\s*#\|")
RE_MAGIC = re.compile(r"^\s*[%!]")
RE_FENCE = re.compile(r"^(```|~~~)")
RE_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s")
RE_EDGE = re.compile(r"^\s*$|:::|#|\||\$\$|```|~~~|<|!\[|\[!\[")          # where a paragraph ends
RE_HEAD = re.compile(r"^\s*(?:>\s?)?(?:(?:[-*]|\d+\.)\s+)?")
RE_WHOLE = re.compile(r"`[^`]*`|\$[^$]*\$|\[[^\]]*\]\([^)]*\)")              # never broken
RE_MACHINE = re.compile(r"(?<![\w./:-])"
                        r"/(?:home|root|work|Users|tmp|var/folders|content|mnt)/[\w.-]+")


def statements_on_a_line(source: str) -> list: # numbers of lines
    "Lines that hold more than one statement; a `;` at the end only hides an output"
    code = "\n".join("pass" if RE_MAGIC.match(l) else l for l in source.split("\n"))
    try: tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError): return []
    ends = (tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT, tokenize.ENDMARKER)
    return [t.start[0] for t, after in zip(tokens, tokens[1:])
            if t.type == tokenize.OP and t.string == ";" and after.type not in ends]


def long_prose(source: str) -> list: # numbers of lines
    "Lines of prose that are too wide; tables, links, formulas and code in fences may be"
    fenced, found = False, []
    for i, line in enumerate(source.split("\n"), 1):
        if RE_FENCE.match(line): fenced = not fenced
        free = fenced or line.startswith(("|", "[![", "<", "#")) or "](" in line or "$" in line
        if len(line) > COLUMNS and not free: found.append(i)
    return found


def broken(source: str) -> str:
    "Prose with the paragraphs refilled that have a line that is too wide"
    lines, stuck = source.split("\n"), 0
    while wide := [n for n in long_prose("\n".join(lines)) if n > stuck]:
        a = b = wide[0] - 1
        while a and not RE_ITEM.match(lines[a]) and not RE_EDGE.match(lines[a - 1]): a -= 1
        while b + 1 < len(lines) and not RE_EDGE.match(lines[b + 1]) \
                and not RE_ITEM.match(lines[b + 1]): b += 1
        head = RE_HEAD.match(lines[a])[0]
        rest = "> " if ">" in head else " " * len(head)
        more = [re.sub(r"^>\s?", "", l) for l in lines[a + 1:b + 1]]
        text = " ".join([lines[a][len(head):], *more])
        whole = RE_WHOLE.sub(lambda m: m[0].replace(" ", "\0"), re.sub(r"\s+", " ", text).strip())
        new = textwrap.wrap(whole, COLUMNS, initial_indent=head, subsequent_indent=rest,
                            break_long_words=False, break_on_hyphens=False)
        lines[a:b + 1] = [l.replace("\0", " ") for l in new]
        stuck = a + len(new)                       # what is still too wide there cannot be broken
    return "\n".join(lines)


def mend(path: Path):
    "Break what is too wide in a notebook's prose"
    nb = json.loads(path.read_text(encoding="utf-8"))
    for c in nb["cells"]:
        source = "".join(c["source"])
        if c["cell_type"] != "markdown" or not long_prose(source): continue
        c["source"] = broken(source).splitlines(keepends=True)
    text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if text != path.read_text(encoding="utf-8"): path.write_text(text, encoding="utf-8")


def faults_of_code(source: str):
    "What is wrong with the source of a code cell"
    lines = source.split("\n")
    for i, line in enumerate(lines, 1):
        if len(line) > COLUMNS and not RE_MAGIC.match(line):
            yield f"line {i} has {len(line)} columns"
    body = [l for l in lines if l.strip() and not RE_DIRECTIVE.match(l)]
    if len(body) > LINES: yield f"{len(body)} lines"
    exports = len(RE_EXPORT.findall(source))
    if exports > 1: yield f"`#| export` stands {exports} times"
    if exports and not RE_EXPORT.match(source): yield "`#| export` is not its first line"
    if not exports:
        for i in statements_on_a_line(source): yield f"line {i} holds more than one statement"


def faults_of_outputs(cell: dict):
    "What is wrong with what a cell printed"
    if cell.get("execution_count"): yield "has an execution count: run nbdev_clean"
    for o in cell.get("outputs", []):
        if o["output_type"] == "error": yield f"shows an error, {o.get('ename')}"
        data = o.get("data", {})
        for t in (o.get("text", ""), *(data[k] for k in data if k.startswith("text"))):
            if m := RE_MACHINE.search("".join(t)): yield f"shows a path of a machine, {m[0]}"


def faults(path: Path):
    "What is wrong with a notebook, one line each"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for i, c in enumerate(cells):
        source, where = "".join(c["source"]), f"cell {i} ({c.get('id')})"
        if c["cell_type"] == "markdown":
            yield from (f"{where}: line {n} is too wide" for n in long_prose(source))
        if c["cell_type"] == "code":
            yield from (f"{where}: {f}" for f in (*faults_of_code(source), *faults_of_outputs(c)))
    prose = [re.sub(r"^```.*?^```", "", "".join(c["source"]), flags=re.M | re.S)
             for c in cells if c["cell_type"] == "markdown"]
    titles = [t for p in prose for t in re.findall(r"^# .+", p, re.M)]
    if len(titles) != 1: yield f"{len(titles)} titles (H1): {', '.join(titles)}"
    if path.parent == ROOT: return                        # the front door needs no button
    badges = [m[1] for p in prose for m in RE_BADGE.finditer(p)]
    if path.stem[0].isdigit() and badges != [read_room(path).colab]:
        yield "has no Colab button of its own, or another's"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks; default: all")
    parser.add_argument("--mend", action="store_true", help="break lines that are too wide")
    args = parser.parse_args()
    paths = [p.resolve() for p in args.paths]
    paths = paths or [ROOT / "index.ipynb", *sorted((ROOT / "nbs").rglob("*.ipynb"))]
    if args.mend: list(map(mend, paths))
    found = [f"{p.relative_to(ROOT)}, {f}" for p in paths for f in faults(p)]
    titles = Counter(m[0] for p in paths
                     if (m := re.search(r'"# .+', p.read_text(encoding="utf-8"))))
    found += [f"{n} notebooks have the title {t[1:]}" for t, n in titles.items() if n > 1]
    print("\n".join(found) or f"{len(paths)} notebooks, no faults")
    sys.exit(bool(found))


if __name__ == "__main__": main()
