"""What Sphinx does not look at in the site that it made: every file and every anchor that a page names is there, and no page
loads anything from another host.

    python docs/check_site.py build/docs
"""

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself, without a click.
LOADED = {("script", "src"), ("img", "src"), ("source", "srcset"), ("iframe", "src"), ("link", "href")}
# Of a stylesheet, the addresses that are not data.
FETCHED = re.compile(r"""(?:url\(|@import)\s*["']?(?!data:)([^"')\s;]+)""")


@dataclass
class Page(HTMLParser):
    """The anchors of a page, the addresses that it links to, and those that it loads."""

    path: Path
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src", "srcset") and value:
                (self.loads if (tag, name) in LOADED else self.links).append(value)
            elif name == "style" and value:
                self.loads += FETCHED.findall(value)


def problems(site: Path) -> list[str]:
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    found = [f"{site}: no page"] if not pages else []
    for page in pages.values():
        where = page.path.relative_to(site)
        for address in [*page.links, *page.loads]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in page.loads and parts.scheme != "data":
                    found.append(f"{where}: loads {address} from another host")
                continue
            target = page.path.parent / unquote(parts.path) if parts.path else page.path
            if not target.is_file():
                found.append(f"{where}: {address} is not there")
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in pages[target.resolve()].anchors:
                found.append(f"{where}: {address} has no such anchor")
    for sheet in sorted(site.rglob("*.css")):
        for address in FETCHED.findall(sheet.read_text(encoding="utf-8")):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                found.append(f"{sheet.relative_to(site)}: loads {address} from another host")
    return found


def main() -> int:
    found = problems(Path(sys.argv[1]))
    print("\n".join(found), file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
