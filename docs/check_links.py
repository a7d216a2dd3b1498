"""Check that every link of the built site leads to a page and, where it names one, to an anchor of it.

python docs/check_links.py [FOLDER]     exits with 1 and a line for each broken link
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "Links and anchors of one page."

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        link = found.get("href") if tag in ("a", "link") else found.get("src")
        if link:
            self.links.append(link)


def broken(folder):
    "(page, link) of every link that leads nowhere."
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else path.parent / unquote(parts.path)
            if parts.path.startswith("/"):
                target = folder / unquote(parts.path).lstrip("/")
            target = (target / "index.html" if target.is_dir() else target).resolve()
            if not target.is_file() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors
            ):
                yield path.relative_to(folder), link


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "_docs").resolve()
    found = sorted({(str(page), link) for page, link in broken(folder) if page.name != "404.html"})
    for page, link in found:
        print(f"{page}: {link} leads nowhere")
    print(f"{len(list(folder.rglob('*.html')))} pages, {len(found)} broken links")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
