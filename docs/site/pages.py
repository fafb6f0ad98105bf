"""Pages of the site that stand nowhere as files: a hook of mkdocs.

The README is the first page; data/README.md and CHANGELOG.md are pages, too; each script of docs/gallery is one
with what it has printed and drawn (in build/gallery, see the Makefile); each room of the code is one of its docstrings.
Links that lead out of docs/ are turned to these pages.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DRAWN = ROOT / "build" / "gallery"
COPIES = {"README.md": "index.md", "data/README.md": "data.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)]*)?\)")


def scripts() -> list[Path]:
    """Those of the gallery, in the order of their pages."""
    first = ("own_pde", "inverse_problem", "classifier", "torch_loop", "restart_on_other_ranks", "reading_a_run")
    return sorted((ROOT / "docs/gallery").glob("*.py"), key=lambda p: [*first, p.stem].index(p.stem))


def rooms() -> dict[str, list[str]]:
    """The modules of each room; what stands directly in ddml/ and in solvers/ is a room."""
    found: dict[str, list[str]] = {}
    for package in ("ddml", "solvers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] != "__init__" or len(parts) == 2:
                found.setdefault(".".join(parts[:2]) if len(parts) > 2 else package, []).append(
                    ".".join(p for p in parts if p != "__init__")
                )
    return found


def script_page(script: Path) -> tuple[str, str]:
    """Title and text of a script's page."""
    source = script.read_text()
    title, _, text = (ast.get_docstring(ast.parse(source)) or "").partition(".\n\n")
    code = source.split('"""\n', 1)[1].strip()
    figure, printed = DRAWN / f"{script.stem}.png", DRAWN / f"{script.stem}.txt"
    if not (figure.exists() and printed.exists()):
        raise PluginError(f"{script.name} has drawn nothing in {DRAWN}: make docs runs the scripts first")
    return title, (
        f"# {title}\n\n{text}\n\n![What the script draws]({script.stem}.png)\n\nIt prints\n\n"
        f"```text\n{printed.read_text().strip()}\n```\n\n`docs/gallery/{script.name}`:\n\n```python\n{code}\n```\n"
    )


def room_page(room: str, modules: list[str]) -> str:
    """The docstrings of a room."""
    parts = [f"# {room}\n"]
    for name in dict.fromkeys((room, *modules)):
        options = "    options: {members: false, show_root_heading: false}\n" if name == room else ""
        parts.append(f"::: {name}\n{options}")
    return "\n".join(parts)


def pages() -> Iterator[tuple[str, str | None, Path | None]]:
    """Address, text and file of all of them."""
    for name, address in COPIES.items():
        yield address, (ROOT / name).read_text(), None
    yield "data/demo.png", None, ROOT / "data/demo.png"
    cards = []
    for script in scripts():
        title, text = script_page(script)
        cards.append(f"## [{title}]({script.stem}.md)\n\n![{title}]({script.stem}.png)\n")
        yield f"gallery/{script.stem}.md", text, None
        yield f"gallery/{script.stem}.png", None, DRAWN / f"{script.stem}.png"
    begin = "Short programs in `docs/gallery`, each with the figure that it has drawn when this site was built.\n"
    yield "gallery/index.md", "\n".join(["# Gallery\n", begin, *cards]), None
    for room, modules in rooms().items():
        yield f"api/{room}.md", room_page(room, modules), None


def on_config(config: Any) -> Any:
    """Put the gallery and the rooms into the navigation."""
    for entry in config.nav:
        if "Gallery" in entry:
            entry["Gallery"] = ["gallery/index.md", *(f"gallery/{script.stem}.md" for script in scripts())]
        if "Code" in entry:
            entry["Code"] += [{room: f"api/{room}.md"} for room in rooms()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for address, text, path in pages():
        files.append(File.generated(config, address, content=text, abs_src_path=path and str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links that lead out of docs/ to the pages that stand here for them."""
    here = next((Path(name) for name, address in COPIES.items() if address == page.file.src_uri), None)
    source = here or Path("docs") / page.file.src_uri
    up = "../" * page.file.src_uri.count("/")

    def turned(match: re.Match[str]) -> str:
        start, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (ROOT / source.parent / target).resolve()
        if not path.is_relative_to(ROOT):
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        if name.endswith(".py") and name.partition("/")[0] in ("ddml", "solvers"):
            module = name.removesuffix(".py").replace("/", ".")
            return f"{start}{up}api/{'.'.join(module.split('.')[:2])}.md#{module})"
        return f"{start}{up}{COPIES.get(name, name.removeprefix('docs/'))}{anchor})"

    return LINK.sub(turned, markdown)
